"""Full-size models on the device, with random weights that keep activations finite and of variance near 1."""

from __future__ import annotations

import contextlib
import gc
import logging
from pathlib import Path
from typing import Any, cast

from speedlab.common.dtypes import CheckpointPrecision, unet_options
from speedlab.plans.techniques import Parts

from .. import synthetic
from ..synthetic.spec import DtypeName, Family

log = logging.getLogger(__name__)

FAMILIES: dict[str, Family] = {"sdxl": "sdxl", "sd15": "sd15", "refiner": "sdxl_refiner"}


class Models:
    """Models by name and dtype; only those of the last request are kept. `small`: the tiny SD 1.5 for each of them.

    `from_files`: loaded from a checkpoint, as users do, which ComfyUI's dynamic VRAM reads from and loads again.
    """

    def __init__(self, device: Any, small: bool, from_files: bool = False) -> None:
        self._device, self._small, self._from_files = device, small, from_files
        self._known: dict[tuple[str, str], Parts] = {}

    def parts(self, name: str, dtype: str) -> Parts:
        """One model; any other leaves memory."""
        return self.together([(name, dtype)])[0]

    def together(self, wanted: list[tuple[str, str]]) -> list[Parts]:
        """Several models at once; any other leaves memory."""
        if any(key not in wanted for key in self._known):
            gone = self._known.keys() - wanted
            self._known = {key: parts for key, parts in self._known.items() if key in wanted}
            release()
            for key in gone:
                with contextlib.suppress(OSError):  # Windows keeps a file that is mapped; it goes with the folder
                    _file_of(*key).unlink()
        for key in wanted:
            if key not in self._known:
                self._known[key] = self._build(*key)
        return [self._known[key] for key in wanted]

    def spec(self, name: str, dtype: str) -> synthetic.CheckpointSpec:
        """What a model is made from."""
        seed = 1 if name == "refiner" else 0
        if self._small:
            return synthetic.CheckpointSpec("sd15", "small", cast(DtypeName, dtype), seed)
        return synthetic.CheckpointSpec(FAMILIES[name], "full", cast(DtypeName, dtype), seed)

    def _build(self, name: str, dtype: str) -> Parts:
        import comfy.sd
        import folder_paths
        from safetensors.torch import save_file

        log.info("building %s in %s on %s", name, dtype, self._device)
        options, te_options = unet_options(cast(CheckpointPrecision, dtype))
        weights = synthetic.build_state_dict(self.spec(name, dtype), self._device)
        settings: dict[str, Any] = {
            "embedding_directory": folder_paths.get_folder_paths("embeddings"),
            "model_options": options,
            "te_model_options": te_options,
        }
        if self._from_files:
            path = _file_of(name, dtype)
            save_file({key: tensor.cpu().contiguous() for key, tensor in weights.items()}, path)
            weights.clear()
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path), **settings)[:3]
        else:
            model, clip, vae = comfy.sd.load_state_dict_guess_config(weights, **settings)[:3]
            weights.clear()
        release()
        return Parts(model, clip, vae)


def _file_of(name: str, dtype: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_folder_paths("checkpoints")[0]) / f"speedlab_gpu_{name}_{dtype}.safetensors"


def release() -> None:
    """Take every model off the device and give cached memory back."""
    import comfy.model_management as mm

    mm.unload_all_models()
    gc.collect()
    mm.soft_empty_cache()

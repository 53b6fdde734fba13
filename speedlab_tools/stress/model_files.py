"""The readers of model files and of their names, which go through ComfyUI's loaders. Needs ComfyUI in this process."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

from . import samples as valid
from .mutate import of_bytes, of_text
from .outcome import Broken, Target

_executed: list[str] = []
_TENSORS = ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", "a.b.processor.lora_A.default.weight", "x.hada_w1_a")
_NAMES = ("a.safetensors", "sub/a.safetensors", "../a.safetensors", "..\\a.ckpt", "/etc/passwd", "C:\\a.ckpt")


class Trap:
    """A pickle of this runs `spring` when it is loaded by a loader that runs code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return spring, ("executed",)


def spring(what: str) -> None:
    """Leave a trace of having been run."""
    _executed.append(what)


def model_targets(models: Path) -> list[Target]:
    """All of them; `models` is a models folder that ComfyUI looks into."""
    from speedlab.models.loading import load_checkpoint, load_vae

    weights = of_bytes([valid.safetensors()])

    def checkpoint(data: bytes) -> object:
        (models / "checkpoints" / "fuzz.safetensors").write_bytes(data)
        return load_checkpoint("fuzz.safetensors", "auto", "contiguous")

    def vae(data: bytes) -> object:
        (models / "vae" / "fuzz.safetensors").write_bytes(data)
        return load_vae("fuzz.safetensors", "auto")

    def pickled(data: bytes) -> None:
        (models / "checkpoints" / "fuzz.ckpt").write_bytes(data)
        _executed.clear()
        try:
            load_checkpoint("fuzz.ckpt", "auto", "contiguous")
        finally:
            if _executed:
                raise Broken("code of a pickle was run")

    return [
        Target("checkpoint file", weights, checkpoint),
        Target("VAE file", weights, vae),
        Target("pickle file", of_bytes(_pickles()), pickled),
        Target("tensor names", of_text(_TENSORS), _tensor_reader),
        Target("model names", of_text(_NAMES), _name_reader(models)),
    ]


def _tensor_reader(name: str) -> object:
    import torch

    from speedlab.models.lora import content_of

    return content_of({name: torch.zeros(1), "b.lora_up.weight": torch.zeros(1, 1)})


def _name_reader(models: Path) -> Callable[[str], object]:
    from speedlab.models.loading import find_model_file

    (models / "checkpoints" / "a.safetensors").write_bytes(valid.safetensors())
    inside = (models / "checkpoints").resolve()

    def read(name: str) -> object:
        path = find_model_file("checkpoints", name)
        if not path.resolve().is_relative_to(inside):
            raise Broken(f"{name!r} leads to {path}")
        return path

    return read


def _pickles() -> list[bytes]:
    """Weights as torch writes them, in both formats, and pickles that run code."""
    import torch

    made = [pickle.dumps({"state_dict": Trap()}, protocol) for protocol in (2, 4)]
    for new in (True, False):
        for content in ({"state_dict": {"a": torch.zeros(2)}}, {"a": torch.zeros(2), "trap": Trap()}):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=new)
            made.append(file.getvalue())
    return made


def trap_springs() -> bool:
    """Whether the trap works at all: a loader that runs code is caught by it."""
    _executed.clear()
    pickle.loads(pickle.dumps(Trap()))
    return bool(_executed)

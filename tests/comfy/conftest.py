"""Fixtures of the comfy tier: ComfyUI and the pack in this process, on small models with real layouts."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from speedlab_tools.scenarios import drawn

from .tiny_unet import fill

# What is seen in images of the model that draws needs its trained weights.
collect_ignore = [] if drawn.is_there() else ["test_drawn_oracle.py"]


@pytest.fixture(scope="session")
def engine(pack: ModuleType) -> Callable[[str], ModuleType]:
    """Modules of the engine once ComfyUI can be imported: `engine("sampling.profiled")`."""
    return lambda name: importlib.import_module(f"speedlab.{name}")


@pytest.fixture(scope="session")
def node(pack: ModuleType) -> Callable[[str], Any]:
    """A fresh instance of one of the pack's nodes by id."""
    return lambda node_id: pack.NODE_CLASS_MAPPINGS[node_id]()


@pytest.fixture(scope="session")
def core(comfy: ModuleType) -> ModuleType:
    """ComfyUI's own `nodes` module."""
    return importlib.import_module("nodes")


# The hidden inputs of a node whose chart nobody takes: drawing takes longer than sampling a narrow model.
NOT_DRAWN: dict[str, Any] = {"prompt": {"1": {"class_type": "SpeedLabProfileSampler", "inputs": {}}}, "unique_id": "1"}


@pytest.fixture(autouse=True)
def _inference_mode(request: pytest.FixtureRequest) -> Any:
    """ComfyUI executes prompts in inference mode; so do these tests."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny(comfy: ModuleType) -> SimpleNamespace:
    """A real SD 1.x `BaseModel` with a UNet narrow enough to sample in milliseconds, without a file.

    `tiny.model` is the patcher, `tiny.cond(seed)` conditioning, `tiny.latent(batch, h, w)` an empty LATENT.
    """
    import torch

    model_patcher = importlib.import_module("comfy.model_patcher")
    supported = importlib.import_module("comfy.supported_models")
    unet = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "num_heads": 4, "num_head_channels": -1, "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 32,
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
        "use_temporal_attention": False, "legacy": False, "dtype": torch.float32,
    }  # fmt: skip
    with torch.inference_mode():
        torch.manual_seed(7)
        config = supported.SD15(unet)
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, "")
        for parameter in base.diffusion_model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            drawn = torch.randn_like(parameter) / fan_in**0.5
            parameter.data.copy_(drawn if parameter.dim() > 1 else torch.full_like(parameter, 0.1))
        # A gentle prediction keeps the adaptive sampler from shrinking its steps for ever.
        base.diffusion_model.out[2].weight.data.mul_(0.05)
        patcher = model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))

    def cond(seed: int, tokens: int = 8) -> list:
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, tokens, 32, generator=generator), {"pooled_output": None}]]

    def latent(batch: int = 1, height: int = 8, width: int = 8) -> dict:
        return {"samples": torch.zeros(batch, 4, height, width)}

    return SimpleNamespace(model=patcher, cond=cond, latent=latent)


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], Callable[[], list[Any]]]:
    """Watches a class from here on: gives a function that lists those of its objects that are alive.

    `gc.get_objects` would say the same, after a look at every object of the process.
    """

    def watch(cls: type) -> Callable[[], list[Any]]:
        made: list[weakref.ref[Any]] = []
        real = cls.__init__

        def noted(self: Any, *args: Any, **options: Any) -> None:
            made.append(weakref.ref(self))
            real(self, *args, **options)

        monkeypatch.setattr(cls, "__init__", noted)

        def alive() -> list[Any]:
            assert made, f"no {cls.__name__} was made"
            return [one for ref in made if (one := ref()) is not None]

        return alive

    return watch


@pytest.fixture(scope="session")
def parts(pack: ModuleType, model_files: Any) -> Any:
    """Model and text encoder of the demo checkpoint."""
    import torch

    with torch.inference_mode():
        return pack.NODE_CLASS_MAPPINGS["SpeedLabCheckpointLoader"]().load(
            "speedlab_demo_sd15.safetensors", "auto", "contiguous"
        )[:2]


@pytest.fixture
def written(model_files: Any) -> Any:
    """Writes tensors as a LoRA and gives its name; the file goes again after the test."""
    from safetensors.torch import save_file

    path = model_files / "loras" / "format.safetensors"

    def write(tensors: Any) -> str:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
        return path.name

    yield write
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def loaded(pack: ModuleType, model_files: Path, demo_checkpoint: Path) -> tuple[Any, Any, Any]:
    """The demo checkpoint with two of twelve layers in its text encoder and a narrow decoder.

    For what makes whole images: these two take two thirds of each.
    """
    import torch
    from comfy.ldm.modules.diffusionmodules.model import Decoder

    with torch.inference_mode():
        loader = pack.NODE_CLASS_MAPPINGS["SpeedLabCheckpointLoader"]()
        model, clip, vae = loader.load(demo_checkpoint.name, "fp32", "contiguous")[:3]
        decoder = Decoder(
            ch=32, out_ch=3, ch_mult=(1, 1, 1, 1), num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=64,
            z_channels=4,
        ).eval()  # fmt: skip
        fill(decoder, 6)
    vae.first_stage_model.decoder = decoder
    encoder = clip.cond_stage_model.clip_l.transformer.text_model.encoder
    encoder.layers = encoder.layers[:2]
    return model, clip, vae


@pytest.fixture
def output(tmp_path: Path, comfy: ModuleType) -> Iterator[Path]:
    """ComfyUI's output folder for one test."""
    folder_paths = importlib.import_module("folder_paths")
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)

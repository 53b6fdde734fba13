"""Synthetic model files in the real ComfyUI: detected, complete, finite, and different prompts matter."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from speedlab_tools.synthetic import (
    FAMILY_NAMES,
    CheckpointSpec,
    build_state_dict,
    lora_state_dict,
    shapes,
    write_taesd,
)
from speedlab_tools.synthetic.checkpoint import UNET_PREFIX

DETECTED = {
    "sd15": "SD15",
    "sd21": "SD20",
    "sdxl": "SDXL",
    "ssd1b": "SSD1B",
    "vega": "Segmind_Vega",
    "sdxl_refiner": "SDXLRefiner",
}
# ComfyUI names these for the published checkpoints too: parameters that such files never held, and one they do hold
# that it does not use.
USUAL = re.compile(
    r"'clip_l\.(logit_scale|transformer\.(text_projection\.weight|text_model\.embeddings\.position_ids))'"
)
PROMPT, OTHER = "a red cat on a table in the garden", "a painting of a house by the stormy sea"


@dataclass(frozen=True)
class Loaded:
    model: Any
    clip: Any
    vae: Any

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


def load(comfy: ModuleType, path: Path, **options: Any) -> Loaded:
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path), **options)[:3]
    return Loaded(model, clip, vae)


def sample(comfy: ModuleType, loaded: Loaded, positive: list, negative: list, *, steps: int = 4, size: int = 8) -> Any:
    """Euler at CFG 8 from fixed noise; size in latent pixels. Returns the latent in the model's own scale."""
    latent = torch.zeros(1, 4, size, size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    result = comfy.sample.sample(
        loaded.model, noise, steps, 8.0, "euler", "normal", positive, negative, latent, seed=0, disable_pbar=True
    )
    return result * loaded.model.model.latent_format.scale_factor


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()


def unallocated(spec: CheckpointSpec) -> dict[str, torch.Tensor]:
    """The checkpoint in shapes alone: every tensor is one zero, seen many times."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes(spec).items()}


@pytest.fixture(scope="module")
def sd15(comfy: ModuleType, demo_checkpoint: Path) -> Iterator[Loaded]:
    yield load(comfy, demo_checkpoint)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize(
    "family", ["sd15", *(pytest.param(name, marks=pytest.mark.full) for name in ("vega", "sd21", "sdxl_refiner"))]
)
def test_small_files_load_whole_and_sample(
    comfy: ModuleType, small_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture, family: str
) -> None:
    with caplog.at_level(logging.DEBUG):
        loaded = load(comfy, small_checkpoint(family))
    assert type(loaded.model.model.model_config).__name__ == DETECTED[family]
    assert loaded.model.model.model_type == comfy.model_base.ModelType.EPS
    complaints = [
        r.getMessage() for r in caplog.records if re.search("missing|unexpected|left.?over", r.getMessage(), re.I)
    ]
    assert [text for text in complaints if re.search(r"'\w+\.", USUAL.sub("", text))] == []

    positive, other, negative = (loaded.encode(text) for text in (PROMPT, OTHER, ""))
    assert difference(positive[0][0], other[0][0]) > 0.2
    first = sample(comfy, loaded, positive, negative)
    assert torch.isfinite(first).all()
    assert difference(first, sample(comfy, loaded, other, negative)) > 0.1
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_full_layouts_are_comfyui_s_own(comfy: ModuleType, family: str) -> None:
    spec = CheckpointSpec(family, "full")  # type: ignore[arg-type]
    empty = unallocated(spec)
    config = comfy.model_detection.model_config_from_unet(empty, UNET_PREFIX)
    assert type(config).__name__ == DETECTED[family]
    config.set_inference_dtype(torch.float16, None)
    diffusion_model = config.get_model(empty, UNET_PREFIX, device=torch.device("meta")).diffusion_model
    expected = {UNET_PREFIX + name: tuple(tensor.shape) for name, tensor in diffusion_model.state_dict().items()}
    assert {name: shape for name, shape in shapes(spec).items() if name.startswith(UNET_PREFIX)} == expected


@pytest.mark.full
def test_twenty_steps_end_with_a_latent_and_a_picture_of_usual_strength(comfy: ModuleType, sd15: Loaded) -> None:
    latent = sample(comfy, sd15, sd15.encode(PROMPT), sd15.encode(""), steps=20, size=16)
    assert torch.isfinite(latent).all()
    assert 0.4 < latent.std().item() < 3.0
    picture = sd15.vae.decode(latent[..., :8, :8] / sd15.model.model.latent_format.scale_factor)
    assert picture.shape == (1, 64, 64, 3)
    assert torch.isfinite(picture).all()
    assert 0.05 < picture.std().item() < 0.4
    assert torch.isfinite(sd15.vae.encode(picture)).all()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_one_forward_is_finite_and_predicts_noise(comfy: ModuleType, sd15: Loaded, dtype: str) -> None:
    # The module itself in that dtype: ComfyUI would compute in fp32 on a CPU it takes for unfit.
    compute = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **sd15.model.model.model_config.unet_config | {"dtype": compute}
    )
    unet.load_state_dict(sd15.model.model.diffusion_model.state_dict())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = sd15.encode(PROMPT)[0][0]
    with torch.inference_mode():
        predicted = unet(noise.to(compute), torch.tensor([801.0]).to(compute), context=context.to(compute)).float()
    assert torch.isfinite(predicted).all()
    assert predicted.std().item() == pytest.approx(1.0, abs=0.3)
    assert torch.nn.functional.cosine_similarity(predicted.flatten(), noise.flatten(), dim=0) > 0.8


def test_the_state_dict_is_what_the_file_holds(comfy: ModuleType, demo_checkpoint: Path) -> None:
    made = build_state_dict(CheckpointSpec("sd15"))
    found = comfy.utils.load_torch_file(str(demo_checkpoint))
    assert made.keys() == found.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in found.items())
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes(CheckpointSpec("sd15"))


@pytest.mark.parametrize(("keys", "share"), [("all", 1.0), ("partial", 0.5), ("none", 0.0)])
def test_lora_keys_match_as_asked(comfy: ModuleType, sd15: Loaded, keys: Any, share: float) -> None:
    weights = lora_state_dict(CheckpointSpec("sd15"), keys=keys)
    key_map = comfy.lora.model_lora_keys_unet(sd15.model.model, {})
    key_map = comfy.lora.model_lora_keys_clip(sd15.clip.cond_stage_model, key_map)
    targets = len(weights) // 3
    matched = comfy.lora.load_lora(weights, key_map)
    assert len(matched) == math.ceil(share * targets)
    if keys == "all":
        model, clip = comfy.sd.load_lora_for_models(sd15.model, sd15.clip, weights, 1.0, 1.0)
        changed = Loaded(model, clip, sd15.vae)
        plain = sample(comfy, sd15, sd15.encode(PROMPT), sd15.encode(""))
        patched = sample(comfy, changed, changed.encode(PROMPT), changed.encode(""))
        assert torch.isfinite(patched).all()
        assert difference(plain, patched) > 0.05


@pytest.mark.parametrize("family", ["sd21", "vega", "sdxl_refiner"])
def test_lora_layers_of_the_other_families_exist(comfy: ModuleType, family: str) -> None:
    spec = CheckpointSpec(family)  # type: ignore[arg-type]
    empty = unallocated(spec)
    config = comfy.model_detection.model_config_from_unet(empty, UNET_PREFIX)
    config.set_inference_dtype(torch.float16, None)
    key_map = comfy.lora.model_lora_keys_unet(config.get_model(empty, UNET_PREFIX, device=torch.device("meta")), {})
    target = config.clip_target(state_dict=empty).clip
    key_map = comfy.lora.model_lora_keys_clip(target(device=torch.device("meta"), dtype=torch.float16), key_map)
    weights = lora_state_dict(spec, rank=1)
    names = {name.split(".", 1)[0] for name in weights}
    assert names <= key_map.keys()


@pytest.mark.parametrize("name", ["taesd", "taesdxl"])
def test_tiny_autoencoders_load_and_stay_finite(comfy: ModuleType, tmp_path: Path, name: Any) -> None:
    from comfy.taesd.taesd import TAESD

    encoder, decoder = write_taesd(tmp_path, name)
    tiny = TAESD(str(encoder), str(decoder))
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        picture = tiny.decode(latent)
        again = tiny.encode(picture.clamp(-1, 1))
        half = tiny.half().decode(latent.half())
    assert picture.shape == (1, 3, 64, 64)
    assert 0.1 < picture.std().item() < 1.0
    assert again.shape == latent.shape
    assert 0.1 < again.std().item() < 3.0
    assert torch.isfinite(half).all()

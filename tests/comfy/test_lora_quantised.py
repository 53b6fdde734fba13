"""Load LoRA Stack on quantised weights: what they stand for counts, not how they are stored, and none is refused.

The classes below have the interfaces of the real ones, read in ComfyUI-GGUF (GGMLTensor), bitsandbytes (Params4bit) and
ComfyUI 0.33.0 (QuantizedTensor, which is used itself where this ComfyUI has it): packed bytes inside, and in the state
dict, and the logical shape where each keeps it.
"""

from __future__ import annotations

import copy
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .test_lora_formats import file_of, kohya_lora

SOUND = "kohya"


class Ggml(torch.Tensor):
    """`shape` is that of the weight; the bytes are fewer."""

    logical: tuple[int, ...]

    def detach(self) -> Any:
        return self

    @property
    def shape(self) -> Any:
        return torch.Size(self.logical)


class Unknown(torch.Tensor):
    """Packed bytes that say nothing of what they stand for."""

    def detach(self) -> Any:
        return self


def ggml(weight: torch.Tensor) -> Any:
    packed = torch.zeros(weight.shape[0], weight.shape[1] * 9 // 16, dtype=torch.uint8).as_subclass(Ggml)
    packed.logical = tuple(weight.shape)
    return torch.nn.Parameter(packed, requires_grad=False)


def bitsandbytes(weight: torch.Tensor) -> Any:
    packed = torch.nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=weight.shape)
    return packed


def unknown(weight: torch.Tensor) -> Any:
    packed = torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8).as_subclass(Unknown)
    return torch.nn.Parameter(packed, requires_grad=False)


def integers(weight: torch.Tensor) -> Any:
    return torch.nn.Parameter(torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.int8), requires_grad=False)


def kitchen(layout: str, **options: Any) -> Any:
    def quantised(weight: torch.Tensor) -> Any:
        from comfy.quant_ops import QuantizedTensor

        return torch.nn.Parameter(QuantizedTensor.from_float(weight.bfloat16(), layout, **options), requires_grad=False)

    return quantised


TELLING = {"ggml": ggml, "bitsandbytes": bitsandbytes}
if importlib.util.find_spec("comfy_kitchen"):
    TELLING |= {name: kitchen(name) for name in ("TensorCoreNVFP4Layout", "TensorCoreFP8E4M3Layout")}
    # 256 by default, which these small layers are no multiple of.
    rotated = ("TensorCoreConvRotW4A4Layout", "AsymW4A8Int8Layout")
    TELLING |= {name: kitchen(name, convrot_groupsize=64) for name in rotated}
SILENT = {"unknown": unknown, "integers": integers}


def quantised(model: Any, pack: Any) -> Any:
    """A model of its own whose attention is packed by `pack`, in the state dict too."""
    from comfy.model_patcher import ModelPatcher

    network = copy.copy(model.model)
    network._modules = {**network._modules, "diffusion_model": copy.deepcopy(network.diffusion_model)}
    for name, layer in network.named_modules():
        if "attn" in name and isinstance(layer, torch.nn.Linear):
            layer._parameters["weight"] = weight = pack(layer.weight.detach())
            layer._save_to_state_dict = _saving(getattr(weight, "_qdata", weight))  # type: ignore[method-assign]
    return ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))


def _saving(stored: torch.Tensor) -> Any:
    def save(destination: dict, prefix: str, _keep: bool) -> None:
        destination[f"{prefix}weight"] = torch.zeros(torch.Tensor.size(stored), dtype=torch.uint8, device="meta")

    return save


@pytest.mark.parametrize("kind", TELLING)
def test_a_lora_that_fits_quantised_weights_is_taken_without_a_word(
    kind: str,
    parts: Any,
    engine: Any,
    written: Any,
) -> None:
    module = engine("models.lora")
    model, clip = quantised(parts[0], TELLING[kind]), parts[1]
    name = written(file_of(SOUND, *parts))
    patched, _clip, (match,) = module.apply_stack(model, clip, [module.LoraChoice(name, 1.0)])
    assert match.matched == match.total == 5
    assert not match.warnings()
    assert len(patched.patches) == 4


@pytest.mark.parametrize("kind", SILENT)
def test_weights_that_do_not_tell_their_size_refuse_nothing_and_say_so(
    kind: str,
    parts: Any,
    engine: Any,
    written: Any,
) -> None:
    module = engine("models.lora")
    model, clip = quantised(parts[0], SILENT[kind]), parts[1]
    name = written(file_of(SOUND, *parts))
    patched, _clip, (match,) = module.apply_stack(model, clip, [module.LoraChoice(name, 1.0)])
    assert (match.matched, match.total, match.unsure) == (5, 5, 4)
    assert ["4 of its modules change quantised weights" in text for text in match.warnings()] == [True]
    assert len(patched.patches) == 4


def test_plain_weights_of_another_size_are_refused_as_ever(
    parts: Any,
    engine: Any,
    written: Any,
) -> None:
    module = engine("models.lora")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    file = written(kohya_lora(name, 24, 48, torch))
    with pytest.raises(engine("common.errors").ModelFileError, match="made for another model family"):
        module.apply_stack(*parts, [module.LoraChoice(file, 1.0)])

"""LoRA files in kohya's format that fit the synthetic checkpoints, wholly, in part or not at all.

A ControlNet with random weights, in the layout of the published files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from .files import AFTER_SILU, Layout, Weight, describe, draw, write_weights
from .spec import CheckpointSpec, Size, TextConfig, UNetConfig, architecture
from .unet import input_half, unet_layout

Keys = Literal["all", "partial", "none"]

_TRANSFORMER_LAYER = re.compile(r"\.(proj_in|proj_out|to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)\.weight$")


@dataclass(frozen=True)
class _Target:
    """A layer that the LoRA changes: its kohya name, weight shape and the standard deviation of its weights."""

    name: str
    shape: tuple[int, ...]
    std: float


def write_lora(
    path: str | Path,
    spec: CheckpointSpec,
    rank: int = 4,
    seed: int = 0,
    scale: float = 0.1,
    text_encoder: bool = True,
    keys: Keys = "all",
) -> Path:
    """Writes a LoRA for the checkpoint of `spec`; an equal complete file is left alone.

    `scale` is the rms of the change at strength 1 as a share of the rms of the weights. Of the layers named in the
    file, `keys` makes all, every second one, or none exist in the model. Raises ValueError for arguments out of
    range and OSError when the file cannot be written.
    """
    weights = _lora_layout(spec, rank, scale, text_encoder, keys)
    metadata = describe(
        "demo LoRA",
        **{**spec.as_dict(), "seed": seed},
        rank=rank,
        scale=scale,
        text_encoder=text_encoder,
        keys=keys,
    )
    return write_weights(Path(path), weights, seed, spec.torch_dtype, metadata)


def lora_state_dict(
    spec: CheckpointSpec,
    rank: int = 4,
    seed: int = 0,
    scale: float = 0.1,
    text_encoder: bool = True,
    keys: Keys = "all",
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """The tensors that `write_lora` writes, in memory."""
    weights = _lora_layout(spec, rank, scale, text_encoder, keys)
    return {name: draw(name, weight, seed, spec.torch_dtype, device) for name, weight in weights.items()}


def _lora_layout(spec: CheckpointSpec, rank: int, scale: float, text_encoder: bool, keys: Keys) -> Layout:
    if rank < 1:
        raise ValueError(f"rank {rank} is out of range; use 1 or more")
    if keys not in get_args(Keys):
        raise ValueError(f"keys {keys!r} is unknown; choose one of {', '.join(get_args(Keys))}")
    layout = Layout()
    for index, target in enumerate(_targets(spec, text_encoder)):
        exists = keys == "all" or (keys == "partial" and index % 2 == 0)
        name = target.name if exists else re.sub(r"^(lora_(unet|te\d?))_", r"\1_absent_", target.name)
        fan_in, kernel = math.prod(target.shape[1:]), target.shape[2:]
        # up @ down then has scale times the standard deviation of the weight it changes.
        up_std = scale * target.std * math.sqrt(fan_in / rank)
        layout[f"{name}.lora_up.weight"] = Weight((target.shape[0], rank, *(1 for _ in kernel)), up_std)
        layout[f"{name}.lora_down.weight"] = Weight((rank, *target.shape[1:]), 1.0 / math.sqrt(fan_in))
        layout[f"{name}.alpha"] = Weight((), mean=float(rank))
    return layout


def _targets(spec: CheckpointSpec, text_encoder: bool) -> Iterator[_Target]:
    design = architecture(spec)
    # kohya names SD 1.x and 2.x layers after diffusers, SDXL's after the original checkpoint.
    diffusers_names = spec.family in ("sd15", "sd21")
    for name, weight in unet_layout(design.unet).items():
        if _TRANSFORMER_LAYER.search(name):
            layer = name.removesuffix(".weight")
            layer = _diffusers_name(layer, design.unet) if diffusers_names else layer
            yield _Target("lora_unet_" + layer.replace(".", "_"), weight.shape, weight.std)
    if text_encoder:
        for index, text in enumerate(design.text):
            number = str(index + 1) if len(design.text) > 1 else ""
            yield from _text_targets(f"lora_te{number}_text_model_encoder_layers", text)


def _text_targets(prefix: str, text: TextConfig) -> Iterator[_Target]:
    width = text.width
    layer_shapes = {f"self_attn_{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    layer_shapes |= {"mlp_fc1": (4 * width, width), "mlp_fc2": (width, 4 * width)}
    for index in range(text.layers):
        for layer, shape in layer_shapes.items():
            yield _Target(f"{prefix}_{index}_{layer}", shape, 1.0 / math.sqrt(shape[1]))


def _diffusers_name(layer: str, config: UNetConfig) -> str:
    """Name in diffusers of a transformer's layer: input_blocks.4.1.x (SD 1.5) is down_blocks.1.attentions.0.x."""
    part, rest = layer.split(".", 1)
    if part == "middle_block":
        return "mid_block.attentions.0." + rest.split(".", 1)[1]
    number, _, rest = rest.split(".", 2)
    per_level = config.num_res_blocks + 1
    if part == "input_blocks":  # block 0 is the first convolution
        level, index = divmod(int(number) - 1, per_level)
        return f"down_blocks.{level}.attentions.{index}.{rest}"
    level, index = divmod(int(number), per_level)
    return f"up_blocks.{level}.attentions.{index}.{rest}"


_HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256)
# Of the convolutions that hand residuals on. Published nets begin with 0; these add a little, so that the control image
# matters. A trained network's own signals are stronger: 0.2 moves the latent of a model that draws by 3 %, 1 by 21 %,
# with as many attributes right as without.
RESIDUAL_GAINS: Mapping[Size, float] = {"small": 0.2, "full": 0.2, "drawn": 1.0}


def controlnet_layout(spec: CheckpointSpec) -> Layout:
    """Every parameter of a ControlNet for the UNet of `spec`."""
    config, gain = architecture(spec).unet, RESIDUAL_GAINS[spec.size]
    layout = Layout()
    skips = input_half(layout, config)
    for index, (fan_in, fan_out) in enumerate(
        zip(_HINT_CHANNELS, (*_HINT_CHANNELS[1:], config.model_channels), strict=True)
    ):
        layout.conv(f"input_hint_block.{2 * index}", fan_in, fan_out, gain=1.0 if index == 0 else AFTER_SILU)
    for index, channels in enumerate(skips):
        layout.conv(f"zero_convs.{index}.0", channels, channels, kernel=1, gain=gain)
    layout.conv("middle_block_out.0", skips[-1], skips[-1], kernel=1, gain=gain)
    return layout


def write_controlnet(path: str | Path, spec: CheckpointSpec) -> Path:
    """Writes the safetensors file for `spec`'s UNet, unless a whole one lies there; OSError where it cannot."""
    metadata = describe("demo controlnet", residual=RESIDUAL_GAINS[spec.size], **spec.as_dict())
    return write_weights(Path(path), controlnet_layout(spec), spec.seed, spec.torch_dtype, metadata)

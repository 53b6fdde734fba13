"""Layout of the UNet, in the names of the original Stable Diffusion checkpoints.

A direct path for the noise through a random UNet, so that samplers treat it like a trained one.

A trained UNet predicts the noise in its input. A random one predicts something unrelated: every step then adds to
the latent instead of cleaning it, and the result is the starting noise, many times too strong. Here the first
group of channels carries the input, in pairs x and -x, from the first convolution over the outermost skip to the
output, where silu(x) - silu(-x) = x; everything else of the random net comes on top, scaled by DETAIL. The
prediction is the noise plus a small part that depends on timestep, prompt and image, as in a real model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from .files import AFTER_GELU, AFTER_SILU, RESIDUAL, SHARP, Adjust, Layout
from .spec import UNetConfig

IN_CHANNELS = OUT_CHANNELS = 4
# Rms of the timestep's sines and cosines is 0.7; of pooled text beside the size embeddings about 0.85.
_TIME_GAIN, _LABEL_GAIN = 1.41, 1.2


def unet_layout(config: UNetConfig) -> Layout:
    """Every parameter of the UNet, without prefix."""
    layout = Layout()
    skips = input_half(layout, config)
    _output_half(layout, config, skips)

    layout.norm("out.0", config.model_channels)
    layout.conv("out.2", config.model_channels, OUT_CHANNELS, gain=AFTER_SILU)
    carry_noise(layout, config.model_channels, len(skips) - 1)
    return layout


def input_half(layout: Layout, config: UNetConfig) -> list[int]:
    """Adds embeddings, input blocks and middle block; returns the channels that every input block hands on."""
    channels, emb = config.model_channels, 4 * config.model_channels
    _embedding_mlp(layout, "time_embed", channels, emb, _TIME_GAIN)
    if config.adm_channels is not None:
        _embedding_mlp(layout, "label_emb.0", config.adm_channels, emb, _LABEL_GAIN)
    layout.conv("input_blocks.0.0", IN_CHANNELS, channels)
    skips = _input_blocks(layout, config)
    channels = skips[-1]
    _res_block(layout, "middle_block.0", channels, channels, emb)
    if config.depth_middle >= 0:
        _transformer(layout, "middle_block.1", channels, config.depth_middle, config)
        _res_block(layout, "middle_block.2", channels, channels, emb)
    return skips


def _input_blocks(layout: Layout, config: UNetConfig) -> list[int]:
    """Adds the input blocks after the first; returns the channels that every input block hands to the other half."""
    channels, depths = config.model_channels, iter(config.depth_in)
    skips = [channels]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            name, width = f"input_blocks.{len(skips)}", mult * config.model_channels
            _res_block(layout, f"{name}.0", channels, width, 4 * config.model_channels)
            channels = width
            _transformer(layout, f"{name}.1", channels, next(depths), config)
            skips.append(channels)
        if level + 1 < len(config.channel_mult):
            layout.conv(f"input_blocks.{len(skips)}.0.op", channels, channels)
            skips.append(channels)
    return skips


def _output_half(layout: Layout, config: UNetConfig, skips: list[int]) -> None:
    channels, depths = skips[-1], iter(config.depth_out)
    index = 0
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for position in range(config.num_res_blocks + 1):
            name, width = f"output_blocks.{index}", mult * config.model_channels
            _res_block(layout, f"{name}.0", channels + skips[-1 - index], width, 4 * config.model_channels)
            channels, depth = width, next(depths)
            _transformer(layout, f"{name}.1", channels, depth, config)
            if level > 0 and position == config.num_res_blocks:
                layout.conv(f"{name}.{2 if depth else 1}.conv", channels, channels)
            index += 1


def _embedding_mlp(layout: Layout, name: str, fan_in: int, width: int, gain: float) -> None:
    layout.linear(f"{name}.0", fan_in, width, gain)
    layout.linear(f"{name}.2", width, width, AFTER_SILU)


def _res_block(layout: Layout, name: str, channels: int, width: int, emb: int) -> None:
    layout.norm(f"{name}.in_layers.0", channels)
    layout.conv(f"{name}.in_layers.2", channels, width, gain=AFTER_SILU)
    layout.linear(f"{name}.emb_layers.1", emb, width, 0.5 * AFTER_SILU)
    layout.norm(f"{name}.out_layers.0", width)
    layout.conv(f"{name}.out_layers.3", width, width, gain=RESIDUAL * AFTER_SILU)
    if channels != width:
        layout.conv(f"{name}.skip_connection", channels, width, kernel=1)


def _transformer(layout: Layout, name: str, channels: int, depth: int, config: UNetConfig) -> None:
    if depth == 0:
        return
    layout.norm(f"{name}.norm", channels)
    _projection(layout, f"{name}.proj_in", channels, config, gain=1.0)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        _attention(layout, f"{block}.attn1", channels, channels, depth)
        layout.linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        layout.linear(f"{block}.ff.net.2", 4 * channels, channels, RESIDUAL * AFTER_GELU)
        _attention(layout, f"{block}.attn2", channels, config.context_dim, depth)
        for norm in ("norm1", "norm2", "norm3"):
            layout.norm(f"{block}.{norm}", channels)
    _projection(layout, f"{name}.proj_out", channels, config, gain=RESIDUAL)


def _projection(layout: Layout, name: str, channels: int, config: UNetConfig, gain: float) -> None:
    if config.linear_projection:
        layout.linear(name, channels, channels, gain)
    else:
        layout.conv(name, channels, channels, kernel=1, gain=gain)


def _attention(layout: Layout, name: str, channels: int, context: int, depth: int) -> None:
    # What comes from the prompt enters undamped, so that it matters; a deep stack shares it among its blocks.
    gain = RESIDUAL if name.endswith("attn1") else depth**-0.5
    layout.linear(f"{name}.to_q", channels, channels, SHARP, bias=False)
    layout.linear(f"{name}.to_k", context, channels, SHARP, bias=False)
    layout.linear(f"{name}.to_v", context, channels, bias=False)
    layout.linear(f"{name}.to_out.0", channels, channels, gain)


LATENT_CHANNELS = 4
GROUPS = 32
# Constant channels fill the rest of the group. They hold its normalisation nearly constant whatever the input's
# strength is, so that the path stays linear.
ANCHOR = 4.0
# Share of the prediction that the random net contributes.
DETAIL = 0.3


def carry_noise(layout: Layout, channels: int, last_block: int) -> None:
    """Edits the layout of a UNet of `channels` model channels whose last output block is number `last_block`."""
    group = channels // GROUPS
    carried = 2 * LATENT_CHANNELS
    scale = math.sqrt((ANCHOR**2 * (group - carried) + carried) / group)
    block = f"output_blocks.{last_block}"
    edits: dict[str, Adjust] = {
        "input_blocks.0.0.weight": partial(_write_pairs, group=group),
        "input_blocks.0.0.bias": partial(_write_anchors, group=group),
        f"{block}.0.skip_connection.weight": partial(_select_skip, group=group, offset=channels),
        f"{block}.0.skip_connection.bias": partial(_fill_rows, group=group, value=0.0),
        f"{block}.0.out_layers.3.weight": partial(_fill_rows, group=group, value=0.0),
        f"{block}.0.out_layers.3.bias": partial(_fill_rows, group=group, value=0.0),
        f"{block}.1.proj_out.weight": partial(_fill_rows, group=group, value=0.0),
        f"{block}.1.proj_out.bias": partial(_fill_rows, group=group, value=0.0),
        "out.0.weight": partial(_fill_rows, group=group, value=scale),
        "out.0.bias": partial(_fill_rows, group=group, value=0.0),
        "out.2.weight": partial(_read_pairs, group=group),
    }
    for name, adjust in edits.items():
        if name in layout:  # the last block has a transformer only in some families
            layout[name] = replace(layout[name], adjust=adjust)


def _each_pair(action: Callable[[int, int, float], None]) -> None:
    for latent in range(LATENT_CHANNELS):
        action(latent, 2 * latent, 1.0)
        action(latent, 2 * latent + 1, -1.0)


def _write_pairs(weight: torch.Tensor, group: int) -> None:
    weight[:group] = 0.0

    def put(latent: int, channel: int, sign: float) -> None:
        weight[channel, latent, 1, 1] = sign

    _each_pair(put)


def _write_anchors(bias: torch.Tensor, group: int) -> None:
    bias[:group] = 0.0
    bias[2 * LATENT_CHANNELS : group : 2] = ANCHOR
    bias[2 * LATENT_CHANNELS + 1 : group : 2] = -ANCHOR


def _select_skip(weight: torch.Tensor, group: int, offset: int) -> None:
    weight[:group] = 0.0
    for channel in range(group):
        weight[channel, offset + channel, 0, 0] = 1.0


def _fill_rows(tensor: torch.Tensor, group: int, value: float) -> None:
    tensor[:group] = value


def _read_pairs(weight: torch.Tensor, group: int) -> None:
    weight.mul_(DETAIL)
    weight[:, :group] = 0.0

    def put(latent: int, channel: int, sign: float) -> None:
        weight[latent, channel, 1, 1] = sign

    _each_pair(put)

"""A direct path for the noise through a random UNet, so that samplers treat it like a trained one.

A trained UNet predicts the noise in its input. A random one predicts something unrelated: every step then adds to
the latent instead of cleaning it, and the result is the starting noise, many times too strong. Here the first
group of channels carries the input, in pairs x and -x, from the first convolution over the outermost skip to the
output, where silu(x) - silu(-x) = x; everything else of the random net comes on top, scaled by DETAIL. The
prediction is the noise plus a small part that depends on timestep, prompt and picture, as in a real model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from .weights import Adjust, Layout

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

"""Tensors rounded to 8 bits: inputs of layers as a whole, weights by output channel."""

from __future__ import annotations

import torch

# The least and the greatest value that a layer gets; 0 is between them.
Range = tuple[float, float]


def steps_of(limits: Range) -> tuple[float, int]:
    """The size of 255 steps, and which of them is 0 exactly: convolutions pad with it."""
    step = max(limits[1] - limits[0], 1e-12) / 255.0
    return step, round(-limits[0] / step)


def rounded_input(x: torch.Tensor, limits: Range) -> torch.Tensor:
    """A tensor of 256 values."""
    return torch.fake_quantize_per_tensor_affine(x, *steps_of(limits), 0, 255)


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights of 255 values, of each output channel's own size."""
    most = largest_weights(weight)
    return torch.fake_quantize_per_channel_affine(
        weight, most / 127.0, torch.zeros(len(most), dtype=torch.int32, device=weight.device), 0, -127, 127
    )


def largest_weights(weight: torch.Tensor) -> torch.Tensor:
    """The largest size of each output channel's weights."""
    return weight.abs().flatten(1).amax(1).clamp_min(1e-12)

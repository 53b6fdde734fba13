"""The memory layout of convolution weights, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def conv_weights_in(module: torch.nn.Module, layout: torch.memory_format, device: torch.device) -> Iterator[int]:
    """Keep the 2-D convolution weights of `module` in `layout`; yields how many have it now.

    Only weights that lie on `device`: those that ComfyUI copies there for each call may be pinned, which a copy is
    not, and the convolution converts them by itself. One weight at a time is held twice, so memory does not double.
    Afterwards every weight has the strides it had, wherever it lies by then, and the numbers that it has by then,
    since hooks may change weights during a run.
    """
    changed: list[tuple[torch.nn.Conv2d, tuple[int, ...]]] = []
    laid_out = 0
    try:
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d) and _can_change(part.weight, device):
                # Strides and not is_contiguous: a 1x1 weight is contiguous in both layouts, but its strides decide
                # which one the convolution computes in.
                wanted = torch.empty_like(part.weight, device="meta", memory_format=layout).stride()
                if part.weight.stride() != wanted:
                    changed.append((part, part.weight.stride()))
                    _lay_out(part, wanted)
                laid_out += 1
        yield laid_out
    finally:
        for part, strides in changed:
            if part.weight.stride() != strides:
                _lay_out(part, strides)


def _can_change(weight: torch.Tensor, device: torch.device) -> bool:
    # Quantised weights are tensors of a class of their own.
    return type(weight.data) is torch.Tensor and weight.device == device


def _lay_out(part: torch.nn.Conv2d, strides: tuple[int, ...]) -> None:
    weight = part.weight
    # A weight loaded outside of inference mode must stay one that may be used outside.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        laid_out = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
        weight.data = laid_out.copy_(weight)

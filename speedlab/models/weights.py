"""What a weight stands for: quantised ones are tensors of a class of their own, or bytes with two values in each."""

from __future__ import annotations

from typing import Any

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def logical_shape(weight: Any) -> tuple[int, ...]:
    """The shape of what a weight stands for, which is not that of its bytes where it is packed."""
    state = getattr(weight, "quant_state", None)  # bitsandbytes keeps it apart
    return tuple(getattr(state, "shape", None) or weight.shape)


def is_plain(weight: Any) -> bool:
    """Whether a weight is a tensor of numbers of PyTorch's own class, so that its shape says how many it stands for."""
    return type(weight) in _PLAIN and not hasattr(weight, "quant_state") and weight.is_floating_point()

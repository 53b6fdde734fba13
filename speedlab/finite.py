"""Whether numbers are numbers."""

from __future__ import annotations

from typing import Any

# Values looked at at once: a few megabytes.
_AT_ONCE = 1 << 20


def is_finite(tensor: Any) -> bool:
    """Whether a tensor has neither NaN nor Inf. On a CPU part by part, so that a large picture is not copied whole."""
    import torch

    if tensor.device.type != "cpu" or tensor.numel() <= _AT_ONCE:
        return bool(torch.isfinite(tensor).all())
    longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
    rows = max(tensor.shape[longest] * _AT_ONCE // tensor.numel(), 1)
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(rows, dim=longest))

"""onediff_nexfort: OneDiff with its compiler nexfort, which is built for one version of PyTorch (2.4.0)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...core import compute_device
from . import MODES, CompileOptions
from .onediff import checked_mode, compiled, missing

NAME = "onediff_nexfort"
SUPPORTED_MODES = MODES
FOLLOWS_WEIGHTS = False
FIXED_SHAPES = True
REMEDY = "Choose inductor, or take the node out."
# On a CPU nexfort has its tracing mode alone. None of these folds weights.
_ON_CPU = "jit"
_ON_GPU = {
    "default": "O2",
    "reduce-overhead": "O2:cudagraphs",
    "max-autotune": "max-optimize:max-autotune:cudagraphs",
    "max-autotune-no-cudagraphs": "max-optimize:max-autotune",
}


def available() -> tuple[bool, str]:
    """Whether both packages are installed."""
    reason = missing("onediff", "nexfort")
    return not reason, reason and f"{reason} (nexfort needs Python 3.8 to 3.11 and PyTorch 2.4.0)"


def nexfort_mode(mode: str, device: torch.device | None = None) -> str:
    """The mode string that nexfort gets for a mode of the node. Raises ValueError for one that it does not know."""
    device = compute_device() if device is None else device
    return checked_mode(_ON_CPU if device.type == "cpu" else _ON_GPU.get(mode, mode))


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` compiled by nexfort."""
    device = options.example[0].device
    settings: dict[str, Any] = {"mode": nexfort_mode(options.mode, device)}
    if options.dynamic is not None and device.type != "cpu":
        settings["dynamic"] = options.dynamic
    return compiled(target, "nexfort", settings)

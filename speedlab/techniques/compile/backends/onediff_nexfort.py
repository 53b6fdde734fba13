"""onediff_nexfort: OneDiff with its compiler nexfort, which is built for one version of PyTorch (2.4.0).

Run with OneDiff 1.2.0 and nexfort 0.1.dev330 on a CPU, in mode `jit`; the modes for GPUs never ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....common.core import compute_device
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
# By itself nexfort puts the tanh approximation in the place of each GELU, 2e-4 beside eager in fp32.
_EXACT = {"common.optimize_gelu": False}


def available() -> tuple[bool, str]:
    """Whether both packages are installed."""
    absent = missing("onediff", "nexfort")
    if not absent:
        return True, ""
    return False, (
        f"{' and '.join(absent)} not installed: nexfort runs with PyTorch 2.4.0 alone, on Linux and Python 3.8 to "
        "3.11. Make a Python environment of its own for such a ComfyUI and run pip install torch==2.4.0 "
        "onediff==1.2.0 nexfort==0.1.dev330 there; in another one pip would replace its PyTorch"
    )


def nexfort_mode(mode: str, device: torch.device | None = None) -> str:
    """The mode string that nexfort gets for a mode of the node. Raises ValueError for one that it does not know."""
    device = compute_device() if device is None else device
    return checked_mode(_ON_CPU if device.type == "cpu" else _ON_GPU.get(mode, mode))


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` compiled by nexfort for the shapes of `options.example`."""
    device = options.example[0].device
    settings: dict[str, Any] = {
        "mode": nexfort_mode(options.mode, device),
        "dynamic": False,  # its traces do not know open sizes, and a second size would be compiled with some
        "options": dict(_EXACT),
    }
    return compiled(target, "nexfort", settings, options.example)

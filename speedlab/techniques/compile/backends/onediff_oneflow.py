"""onediff_oneflow: OneDiff with its older compiler, OneFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import CompileOptions, on_nvidia
from .onediff import compiled, missing

NAME = "onediff_oneflow"
SUPPORTED_MODES = ("default",)
FOLLOWS_WEIGHTS = False  # it keeps folded copies of convolution weights
FIXED_SHAPES = False
REMEDY = "Choose inductor, or take the node out."


def available() -> tuple[bool, str]:
    """Whether both packages are installed and there is a GPU for them."""
    absent = missing("onediff", "oneflow")
    if absent:
        return False, (
            f"{' and '.join(absent)} not installed: install them as OneDiff's installation page says (OneFlow's builds "
            "for GPUs are not on PyPI)"
        )
    return on_nvidia("OneFlow")


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` compiled by OneFlow."""
    return compiled(target, "oneflow", None, options.example)

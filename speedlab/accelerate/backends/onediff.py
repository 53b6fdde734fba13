"""What both OneDiff backends share: the package is imported only here, when a network is compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Words of nexfort's modes, joined by colons.
MODE_WORDS = (
    "O0", "O1", "O2", "O3", "max-optimize", "max-autotune", "cudagraphs", "benchmark", "low-precision", "cache-all",
    "dynamic", "jit", "freezing",
)  # fmt: skip


def missing(*packages: str) -> str:
    """Which of `packages` are not installed, and what to do; "" where all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    return f"{' and '.join(absent)} not installed: run pip install {' '.join(absent)} in ComfyUI's Python"


def checked_mode(mode: str) -> str:
    """`mode` itself. Raises ValueError for a word that nexfort does not know, or one that folds weights."""
    words = mode.split(":")
    unknown = [word for word in words if word not in MODE_WORDS]
    if unknown:
        raise ValueError(f"nexfort has no mode {', '.join(unknown)}; it knows {', '.join(MODE_WORDS)}")
    if "freezing" in words:
        raise ValueError(
            "nexfort's mode freezing folds weights, so that a later LoRA would have no effect; leave it out"
        )
    return mode


def compiled(target: torch.nn.Module, backend: str, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """`target` through OneDiff's own entry point."""
    from onediff.infer_compiler import compile as onediff_compile

    module = onediff_compile(target, backend=backend, options=None if options is None else dict(options))
    return lambda *inputs: module(*inputs)

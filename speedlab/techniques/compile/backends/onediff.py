"""What both OneDiff backends share: the package is imported only here, when a network is compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ....common.torch_private import dynamo_failures
from .dynamo import cause

# Words of the modes of nexfort 0.1.dev330, joined by colons.
MODE_WORDS = (
    "O2", "O3", "benchmark", "cache-all", "cpp-wrapper", "cudagraphs", "disable-inductor", "disable-runtime-fusion",
    "fast-accum", "freezing", "inductor-cudagraphs", "inductor-freezing", "jit", "low-precision", "max-autotune",
    "max-optimize", "quant",
)  # fmt: skip


def missing(*packages: str) -> tuple[str, ...]:
    """Those of `packages` that are not installed."""
    return tuple(name for name in packages if importlib.util.find_spec(name) is None)


def checked_mode(mode: str) -> str:
    """`mode` itself. Raises ValueError for a word that nexfort does not know, or one that folds weights."""
    words = mode.split(":")
    unknown = [word for word in words if word not in MODE_WORDS]
    if unknown:
        raise ValueError(f"nexfort has no mode {', '.join(map(repr, unknown))}; it knows {', '.join(MODE_WORDS)}")
    folding = [word for word in words if word.endswith("freezing")]
    if folding:
        raise ValueError(
            f"nexfort's mode {' and '.join(folding)} folds weights, so that a later LoRA would have no effect; "
            "leave it out"
        )
    return mode


def compiled(
    target: torch.nn.Module, backend: str, options: Mapping[str, Any] | None, example: tuple[torch.Tensor, ...]
) -> Callable[..., Any]:
    """`target` through OneDiff's own entry point, for the shapes of `example`.

    OneDiff compiles at the first call, which is therefore made here: what cannot be compiled fails as compiling does.
    """
    from onediff.infer_compiler import compile as onediff_compile

    module = onediff_compile(target, backend=backend, options=None if options is None else dict(options))
    try:
        module(*example)
    except dynamo_failures() as error:
        inner = cause(error)
        if inner is error:
            raise
        raise inner from error  # dynamo's own message begins with no more than the backend's name
    return lambda *inputs: module(*inputs)

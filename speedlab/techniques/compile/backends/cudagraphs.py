"""cudagraphs: ComfyUI's kernels, recorded once for each size and replayed without the cost of their launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from ....common.core import compute_device
from ....common.torch_private import cudagraphs_backend
from . import CompileOptions
from .dynamo import shared_function, switched_off

NAME = "cudagraphs"
SUPPORTED_MODES = ("default",)
REMEDY = "Choose inductor, or take the node out."


def available() -> tuple[bool, str]:
    """Whether CUDA graphs can be recorded on ComfyUI's device, else why not."""
    device = compute_device()
    if device.type != "cuda":
        return False, f"CUDA graphs need an NVIDIA GPU, and ComfyUI runs on {device.type}"
    reason = switched_off()
    return not reason, reason


def compile(target: Callable[..., Any], options: CompileOptions, kind: Hashable = None) -> Callable[..., Any]:
    """`target(module, *inputs)` recorded and replayed; equal `kind` and options give the same function."""
    return shared_function(target, (NAME, target.__name__, kind, options.dynamic), _compile_graph, options.dynamic)


def uses_cuda_graphs(_options: CompileOptions) -> bool:
    """Whether results lie in memory that the next call writes to."""
    return True


def _compile_graph(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    return cudagraphs_backend()(graph, inputs)

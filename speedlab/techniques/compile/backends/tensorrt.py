"""tensorrt: an engine built by NVIDIA TensorRT through torch-tensorrt. Building can take half an hour.

The weights are part of the engine: a LoRA is refused, and so are ControlNet and patches.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import CompileOptions, on_nvidia

NAME = "tensorrt"
SUPPORTED_MODES = ("default",)
FOLLOWS_WEIGHTS = False
FIXED_SHAPES = True
REFUSES_LORA = True
REMEDY = "Choose inductor, or take the node out."


def available() -> tuple[bool, str]:
    """Whether torch-tensorrt is installed and there is a GPU for it."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        return False, "torch-tensorrt is not installed: run pip install torch-tensorrt in ComfyUI's Python"
    return on_nvidia("TensorRT")


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` as an engine for the shapes of `options.example`."""
    import torch_tensorrt

    exported = torch.export.export(target.eval(), options.example, strict=False)
    inputs = [torch_tensorrt.Input(tuple(t.shape), dtype=t.dtype) for t in options.example]
    types = {tensor.dtype for tensor in options.example}
    build = torch_tensorrt.dynamo.compile
    return build(exported, inputs=inputs, truncate_double=True, **_typing(build, types))


def _typing(build: Callable[..., Any], types: set[torch.dtype]) -> dict[str, Any]:
    """How this torch-tensorrt is set to compute in the network's own types.

    Where it has `use_explicit_typing` it refuses a list of types beside it; the newest has neither and does so anyway.
    """
    known = inspect.signature(build).parameters
    if "use_explicit_typing" in known:
        return {"use_explicit_typing": True}
    if "enabled_precisions" in known:
        return {"enabled_precisions": types | {torch.float32}}
    return {}

"""inductor: PyTorch's own compiler. Graph by graph, with live weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ....common.core import compute_device
from ....common.errors import first_line
from ....common.torch_private import find_cpp_compiler, has_triton, inductor_code_modules, inductor_compile, innermost
from ...cpu.onednn import use_onednn
from . import MODES, CompileOptions
from .dynamo import shared_function, switched_off

NAME = "inductor"
SUPPORTED_MODES = MODES
CAN_FREEZE = True
REMEDY = "Choose another backend, or take the node out."


def available() -> tuple[bool, str]:
    """Whether inductor can compile for ComfyUI's device, else why not and what to do."""
    reason = switched_off() or _no_compiler(compute_device())
    return not reason, reason


def _no_compiler(device: torch.device) -> str:
    if device.type == "cuda":
        return "" if has_triton() else "Triton is not installed: install triton (on Windows triton-windows)"
    if device.type == "cpu":
        try:
            find_cpp_compiler()
        except Exception as error:
            return f"there is no C++ compiler ({first_line(error)}): install one (g++, clang, or MSVC on Windows)"
    return ""


def compile(target: Callable[..., Any], options: CompileOptions, kind: Hashable = None) -> Callable[..., Any]:
    """`target(module, *inputs)` compiled; equal `kind` and options give the same function."""
    key = (NAME, target.__name__, kind, options.mode, options.dynamic, options.freeze)
    return shared_function(target, key, partial(_compile_graph, options), options.dynamic)


def uses_cuda_graphs(options: CompileOptions) -> bool:
    """Whether results lie in memory that the next call writes to."""
    cuda = options.device is not None and options.device.type == "cuda"
    return cuda and options.mode in ("reduce-overhead", "max-autotune")


def _compile_graph(options: CompileOptions, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    use_onednn(graph)
    keep = _copies_weights(options, inputs)
    before = {id(module) for module in inductor_code_modules()}
    program = inductor_compile(graph, inputs, options.mode, options.dynamic, keep_layouts=keep)
    if options.freeze:
        made = [module for module in inductor_code_modules() if id(module) not in before]
        # Inductor keeps the modules of its code until the process ends, and frozen weights are attributes of theirs.
        weakref.finalize(innermost(program), _release_tensors, made).atexit = False
    return program


def _release_tensors(modules: list[ModuleType]) -> None:
    for module in modules:
        for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
            delattr(module, name)


def _copies_weights(options: CompileOptions, inputs: list[Any]) -> bool:
    """Whether inductor would copy weights of convolutions to another layout in every call.

    On a CPU it computes convolutions channels-last. Frozen weights are converted once, live ones each time, which takes
    longer than the convolution gains.
    """
    on_cpu = any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in inputs)
    return on_cpu and not options.freeze

"""What the backends on torch.compile share: functions of their own code, counted graphs, and limits for a while.

Dynamo keeps what it compiled at the code object of a function, at most 8 graphs each and then runs on uncompiled. So
each kind of block gets a copy of the code for itself: kinds neither share a limit nor try each other's guards, while
all blocks of one kind share their graphs, for the block is an argument and its weights are inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from ....common.timing import apart, watch_dynamo
from ....common.torch_private import (
    FxCompiler,
    dynamo_counters,
    dynamo_limits,
    forget_code_of,
    inductor_folder,
    inductor_settings,
    is_dynamo_off,
    load_compiler,
)
from ...cpu.vectors import known_to_work

# Graphs of one kind of block, at most: batch 1 and more, fixed and changing sizes, another prompt length,
# another layout or type of the weights, and room.
GRAPHS_PER_KIND = 16
# With dynamic off each size is a graph of its own.
GRAPHS_PER_KIND_STATIC = 64
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRITON_VARIABLE = "TRITON_CACHE_DIR"


@dataclass
class GraphCount:
    """Graphs compiled by this pack since the process began, and those of them whose code was kept on disk."""

    graphs: int = 0
    from_disk: int = 0


COUNT = GraphCount()
_functions: dict[Hashable, Callable[..., Any]] = {}


def shared_function(
    call: Callable[..., Any], key: Hashable, compiler: FxCompiler, dynamic: bool | None
) -> Callable[..., Any]:
    """`call` compiled, one function for each `key`; `compiler` makes a callable of a graph and example inputs."""
    if key not in _functions:
        with apart():  # the first one loads dynamo
            _functions[key] = torch.compile(
                _own_code(call, len(_functions)), backend=_counted(compiler), dynamic=dynamic
            )
        watch_dynamo()
    return _functions[key]


def forget(word: Hashable) -> None:
    """Release the functions whose kind ends in that word, and all that was compiled for them."""
    for key in [key for key in _functions if isinstance(key, tuple) and any(_ends_in(part, word) for part in key)]:
        forget_code_of(_functions.pop(key))


def _ends_in(part: Hashable, word: Hashable) -> bool:
    return isinstance(part, tuple) and bool(part) and part[-1] == word


def cause(error: BaseException) -> BaseException:
    """The error inside of a backend's failure, or the error itself."""
    return getattr(error, "inner_exception", None) or error.__cause__ or error


def is_limit(error: BaseException) -> bool:
    """Whether a function has come to its limit of graphs."""
    return "LimitHit" in type(error).__name__


def switched_off() -> str:
    """Why torch.compile would do nothing in this process; "" where it works."""
    if is_dynamo_off():
        return "torch.compile is switched off in this process (TORCHDYNAMO_DISABLE or torch._dynamo.config.disable)"
    return ""


def graphs_refused(device: torch.device | None) -> str:
    """Why this process cannot record CUDA graphs on `device`, and what to do; "" where it can."""
    if device is None or device.type != "cuda" or torch.cuda.get_allocator_backend() != "cudaMallocAsync":
        return ""
    return (
        "CUDA graphs need PyTorch's own memory allocator, and ComfyUI has chosen cudaMallocAsync. Start ComfyUI with "
        "--disable-cuda-malloc"
    )


@cache
def _loaded() -> None:
    with apart():
        load_compiler()


@contextmanager
def limits(
    graphs: int, device: torch.device | None = None, *, freeze: bool = False, folder: Path | None = None
) -> Iterator[None]:
    """Let each function have `graphs` graphs, make one more an error, and keep inductor's files in `folder`."""
    _loaded()
    on_cpu = device is not None and device.type == "cpu"
    with ExitStack() as stack:
        stack.enter_context(dynamo_limits(graphs))
        stack.enter_context(inductor_settings(freeze=freeze, vectors_work=known_to_work if on_cpu else None))
        if folder is not None:
            stack.enter_context(_variable(CACHE_VARIABLE, str(folder)))
            if device is not None and device.type == "cuda":
                # Inductor would choose a folder for Triton's programs once, and keep it whatever becomes of its own.
                stack.enter_context(_variable(TRITON_VARIABLE, str(folder / "triton")))
        yield


@contextmanager
def without_gradients(module: torch.nn.Module) -> Iterator[None]:
    """Switch `requires_grad` off for a while.

    A weight that ComfyUI patches a LoRA into has it off and the others have it on; as graphs differ by it, each mix of
    the two would be compiled again.
    """
    changed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(True)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    if before is not None and not _is_inductors_own(Path(before)):  # the user's choice
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _is_inductors_own(folder: Path) -> bool:
    """Inductor sets the variables itself once it has looked at them."""
    default = inductor_folder()
    return default is not None and folder.is_relative_to(default)


def _own_code(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    assert isinstance(function, FunctionType)
    name = f"{function.__name__}_{number}"
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def _counted(compiler: FxCompiler) -> FxCompiler:
    def backend(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        COUNT.graphs += 1
        before = _found_on_disk()
        with apart():  # where this PyTorch does not tell by itself when it compiles
            program = compiler(graph, inputs)
        COUNT.from_disk += _found_on_disk() > before
        return program

    return backend


def _found_on_disk() -> int:
    """How often inductor has found a graph's code."""
    counters = dynamo_counters() or {}
    return int(counters.get("inductor", {}).get("fxgraph_cache_hit", 0))

"""jit_trace: one evaluation recorded by torch.jit.trace and replayed without Python. One trace for each size.

Weights are inputs of the trace, so that a LoRA acts without a new one. With `freeze` they are folded into it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ....common.torch_private import function_of_graph, is_jit_on, optimise_frozen, traced_graph
from . import CompileOptions

NAME = "jit_trace"
SUPPORTED_MODES = ("default",)
CAN_FREEZE = True
FOLLOWS_WEIGHTS = True
FIXED_SHAPES = True
SEVERAL_TENSORS = True
KEEPS_ATTENTION = True
KEEPS_AUTOCAST = True
KEEPS_PATCHES = True
REMEDY = "Choose inductor, or take the node out."


def available() -> tuple[bool, str]:
    """Whether torch.jit is on."""
    if not is_jit_on():
        return False, "torch.jit is switched off by the environment variable PYTORCH_JIT; remove it"
    return True, ""


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` as a trace for the shapes of `options.example`."""
    with warnings.catch_warnings():
        # Sizes become constants, which is meant here, and each of them is a warning; so is the coming end of torch.jit.
        warnings.simplefilter("ignore")
        return _frozen(target, options) if options.freeze else _with_live_weights(target, options)


def _with_live_weights(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    slots = ordered_slots(target)

    def weights() -> list[torch.Tensor]:
        return [read(slot) for slot in slots]

    program = function_of_graph(trace(target, slots, weights(), options.example))
    return lambda *inputs: program(*weights(), *inputs)


def _frozen(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """A trace with today's weights as constants, which PyTorch computes with in advance.

    `torch.jit.freeze` would do the same for a module, and keep its constants until the process ends: the code of a
    module is never released.
    """
    slots = ordered_slots(target)
    weights = [read(slot).detach() for slot in slots]
    graph = trace(target, slots, weights, options.example)
    graph.setInsertPoint(next(iter(graph.nodes())))
    for value, weight in zip(list(graph.inputs()), weights, strict=False):
        value.replaceAllUsesWith(graph.insertConstant(weight))
    for number in reversed(range(len(weights))):
        graph.eraseInput(number)
    optimise_frozen(graph)
    return function_of_graph(graph)


def trace(target: torch.nn.Module, slots: list[Slot], weights: Sequence[torch.Tensor], example: tuple[Any, ...]) -> Any:
    """One evaluation of `target`: a graph that takes the weights, then the inputs."""

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        with _in_place(slots, tensors[: len(slots)]):
            return target(*tensors[len(slots) :])

    return traced_graph(call, (*weights, *example))


Slot = tuple["weakref.ref[torch.nn.Module]", str]


def _slots(target: torch.nn.Module) -> list[tuple[str, Slot]]:
    """Where each weight is found at each call. Weak, for a program must not keep a model that ComfyUI releases."""
    found = []
    for prefix, module in target.named_modules():
        for name in (*module._parameters, *module._buffers):
            found.append((f"{prefix}.{name}" if prefix else name, (weakref.ref(module), name)))
    return found


def ordered_slots(target: torch.nn.Module) -> list[Slot]:
    """The places of all weights, parameters first."""
    slots = dict(_slots(target))
    return [slots[name] for name, _ in (*target.named_parameters(), *target.named_buffers())]


def read(slot: Slot) -> torch.Tensor:
    module = slot[0]()
    assert module is not None
    return getattr(module, slot[1])


@contextmanager
def _in_place(slots: list[Slot], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Other tensors where the modules look for their weights, while a trace is made (torch.func refuses traces)."""
    places = [_place(slot) for slot in slots]
    before = [place[name] for place, name in places]
    try:
        for (place, name), value in zip(places, values, strict=True):
            place[name] = value
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            place[name] = value


def _place(slot: Slot) -> tuple[dict[str, Any], str]:
    module = slot[0]()
    assert module is not None
    owner: Any = module._parameters if slot[1] in module._parameters else module._buffers
    return owner, slot[1]

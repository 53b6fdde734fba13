"""Another way to compute layers of a network, for as long as a context lasts.

Only the layer objects at hand are touched, in their own `__dict__`; their classes, which are ComfyUI's, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch


@dataclass
class Replaced:
    """How many layers have another way, how many another node computes already, and how often the way was taken."""

    layers: int = 0
    taken: int = 0
    calls: int = 0


@contextmanager
def forwards_replaced(
    layers: Iterable[torch.nn.Module],
    compute: Callable[[Any, Any], torch.Tensor],
    suits: Callable[[Any, Any], bool],
) -> Iterator[Replaced]:
    """While entered, `compute(layer, x)` is what each of `layers` does with an input `x` where `suits(layer, x)`.

    Layers whose weights ComfyUI casts or patches in use, and code that a compiler traces, compute as they always do; a
    layer with a forward that another node has set keeps it.
    """
    replaced = Replaced()

    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced() or len(args) != 1 or kwargs or casts(layer) or not suits(layer, args[0]):
            return type(layer).forward(layer, *args, **kwargs)
        replaced.calls += 1
        return compute(layer, args[0])

    ours: list[tuple[Any, Any, Any]] = []
    try:
        for layer in layers:
            before = layer.__dict__.get("forward")
            if before is not None and not _is_its_own(layer, before):
                replaced.taken += 1
                continue
            # Bound, so that a deep copy of the network computes with its own weights.
            layer.__dict__["forward"] = now = MethodType(forward, layer)
            ours.append((layer, before, now))
            replaced.layers += 1
        yield replaced
    finally:
        for layer, before, now in ours:
            if layer.__dict__.get("forward") is not now:
                continue  # set by another node since, which will remove it
            if before is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before


def _is_its_own(layer: Any, forward: Any) -> bool:
    """Whether this is just the class's forward, which ComfyUI leaves in a layer after taking a LoRA's bypass out."""
    of_class: Any = type(layer)
    return isinstance(forward, MethodType) and forward.__self__ is layer and forward.__func__ is of_class.forward


def computes_as(layer: Any, base: type[torch.nn.Module]) -> bool:
    """Whether `layer` computes what PyTorch's `base` does: it is one, or ComfyUI's with its ways of casting, and no
    class derived from them has a forward of its own."""
    if not isinstance(layer, base):
        return False
    owner = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    return owner is base or (issubclass(owner, base) and "forward_comfy_cast_weights" in vars(owner))


def is_traced() -> bool:
    """Whether a compiler or a tracer looks on: what it sees now has to hold for other sizes and weights too."""
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing())


def casts(layer: Any) -> bool:
    """Whether ComfyUI does something to the weights of `layer` on their way into the sums."""
    return bool(
        getattr(layer, "comfy_cast_weights", False)
        or getattr(layer, "weight_function", None)
        or getattr(layer, "bias_function", None)
    )


def is_fp32_on_cpu(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether these are plain fp32 tensors on the CPU that need no gradient."""
    return (
        not torch.is_autocast_enabled("cpu")
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.layout == torch.strided
        and (bias is None or (bias.dtype == torch.float32 and bias.device.type == "cpu" and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )

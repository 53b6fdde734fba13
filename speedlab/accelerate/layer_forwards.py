"""Another way to compute layers of a network, for as long as a context lasts.

Only the layer objects at hand are touched, in their own `__dict__`; their classes, which are ComfyUI's, are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# Another way must take at most this share of the time: two that are equally fast must not change places by chance, for
# then the same seed would give pictures that differ in the last bits.
MARGIN = 0.85
_ROUNDS = 5


@contextmanager
def forwards_replaced(
    layers: Iterable[torch.nn.Module], forward_of: Callable[[Any], Callable[..., Any]]
) -> Iterator[int]:
    """While entered, `forward_of(layer)` computes each of `layers` that has no forward of its own; yields how many."""
    changed: list[torch.nn.Module] = []
    try:
        for layer in layers:
            if "forward" not in layer.__dict__:
                layer.__dict__["forward"] = forward_of(layer)
                changed.append(layer)
        yield len(changed)
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


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
    """Whether these are plain fp32 tensors on the CPU of which nobody wants a gradient."""
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


def least_seconds(ways: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, float]:
    """The best time of each way. In turns, so that a busy moment hits all alike; the first turn loads kernels and does
    not count."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(_ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(*args)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best

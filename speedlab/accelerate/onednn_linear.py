"""Linear layers on a CPU through oneDNN, in place of the BLAS library that PyTorch asks for them.

PyTorch hands fp32 matrix products to MKL, which leaves the wide vector units of other makers' processors unused; its
convolutions already go to oneDNN, which does not. The sums are the same, in another order: equal to fp32 rounding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)

# oneDNN must take at most this share of the time: two that are equally fast must not change places by chance, for then
# the same seed would give pictures that differ in the last bits.
_MARGIN = 0.85
_ROUNDS = 5
# Rows, inputs and outputs of layers that an SD 1.x or SDXL UNet spends its time in.
_SHAPES = ((2048, 320, 320), (1024, 640, 640), (512, 1280, 1280), (512, 1280, 5120))
# With fewer rows a call costs more than the product.
_FEWEST_ROWS = 16


def why_not() -> str:
    """Why this PyTorch cannot compute linear layers with oneDNN; empty where it can."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    try:
        torch.ops.mkldnn._linear_pointwise  # noqa: B018
    except (AttributeError, RuntimeError):
        return f"PyTorch {torch.__version__} has no linear layer on oneDNN for plain weights"
    return ""


def is_traced() -> bool:
    """Whether a compiler or a tracer looks on: what it sees now has to hold for other sizes and weights too."""
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing())


@cache
def is_faster_here() -> bool:
    """Whether oneDNN computes linear layers clearly faster than PyTorch's own choice: measured once a process."""
    if why_not():
        return False
    seconds = {"PyTorch": 0.0, "oneDNN": 0.0}
    with torch.inference_mode():
        for rows, inputs, outputs in _SHAPES:
            x, weight, bias = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(outputs)
            for name, best in _least_seconds(
                {"PyTorch": torch.nn.functional.linear, "oneDNN": linear}, x, weight, bias
            ).items():
                seconds[name] += best
    faster = seconds["oneDNN"] <= _MARGIN * seconds["PyTorch"]
    told = ", ".join(f"{name} {1e3 * total:.2f} ms" for name, total in seconds.items())
    log.info("Precision: linear layers go to %s (%s).", "oneDNN" if faster else "PyTorch's own library", told)
    return faster


def _least_seconds(functions: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, float]:
    """In turns, so that a busy moment hits all alike; the first turn loads kernels and does not count."""
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(_ROUNDS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(*args)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN. The weight has to lie in rows."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@contextmanager
def linear_layers_on_onednn(network: torch.nn.Module) -> Iterator[int]:
    """While entered, the fp32 linear layers of `network` on the CPU are computed by oneDNN; yields how many.

    Layers whose weights ComfyUI casts or patches in use, and code that a compiler traces, are left as they are.
    """
    changed: list[torch.nn.Module] = []
    try:
        for part in network.modules():
            if _is_plain(part) and "forward" not in part.__dict__:
                part.__dict__["forward"] = _forward_of(part)
                changed.append(part)
        yield len(changed)
    finally:
        for part in changed:
            part.__dict__.pop("forward", None)


def _is_plain(part: torch.nn.Module) -> bool:
    """Whether a layer computes what PyTorch's does: PyTorch's own, or ComfyUI's with its ways of casting."""
    if not isinstance(part, torch.nn.Linear):
        return False
    return type(part).forward is torch.nn.Linear.forward or hasattr(part, "comfy_cast_weights")


def _forward_of(part: Any) -> Callable[..., Any]:
    plain = part.forward

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced() or args or kwargs or _casts(part) or not suits(x, part.weight, part.bias):
            return plain(x, *args, **kwargs)
        return linear(x, part.weight, part.bias)

    return forward


def _casts(part: Any) -> bool:
    """Whether ComfyUI does something to the weights on their way into the product."""
    return bool(
        getattr(part, "comfy_cast_weights", False)
        or getattr(part, "weight_function", None)
        or getattr(part, "bias_function", None)
    )


def suits(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether oneDNN computes these as PyTorch would: fp32 on the CPU, weights in rows, sizes that fit, no gradient."""
    return (
        not torch.is_autocast_enabled("cpu")
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or (bias.dtype == torch.float32 and bias.device.type == "cpu" and bias.is_contiguous()))
        # The operator reads the weight as if it were laid out in rows.
        and weight.ndim == 2
        and weight.is_contiguous()
        and x.ndim > 1
        and x.layout == torch.strided
        and x.numel() >= _FEWEST_ROWS * x.shape[-1] > 0
        # PyTorch's own error names the sizes that do not fit.
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        # The operator has no gradient.
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )

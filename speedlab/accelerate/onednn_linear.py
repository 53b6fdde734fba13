"""Linear layers on a CPU through oneDNN, in place of the BLAS library that PyTorch asks for them.

PyTorch hands fp32 matrix products to MKL, which leaves the wide vector units of other makers' processors unused; its
convolutions already go to oneDNN, which does not. The sums are the same, in another order: equal to fp32 rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from .layer_forwards import MARGIN, Replaced, casts, computes_as, forwards_replaced, is_fp32_on_cpu, least_seconds

log = logging.getLogger(__name__)

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


@cache
def is_faster_here() -> bool:
    """Whether oneDNN computes linear layers clearly faster than PyTorch's own choice: measured once a process."""
    if why_not():
        return False
    seconds = {"PyTorch": 0.0, "oneDNN": 0.0}
    with torch.inference_mode():
        for rows, inputs, outputs in _SHAPES:
            x, weight, bias = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(outputs)
            for name, best in least_seconds(
                {"PyTorch": torch.nn.functional.linear, "oneDNN": linear}, x, weight, bias
            ).items():
                seconds[name] += best
    faster = seconds["oneDNN"] <= MARGIN * seconds["PyTorch"]
    told = ", ".join(f"{name} {1e3 * total:.2f} ms" for name, total in seconds.items())
    log.info("Precision: linear layers go to %s (%s).", "oneDNN" if faster else "PyTorch's own library", told)
    return faster


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN. The weight has to lie in rows."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def may_gain(network: torch.nn.Module) -> bool:
    """Whether oneDNN may compute any linear layer of `network` faster here."""
    fp32 = (layer for layer in _linear_layers(network) if layer.weight.dtype == torch.float32 and not casts(layer))
    return next(fp32, None) is not None and is_faster_here()


def linear_layers_on_onednn(network: torch.nn.Module) -> AbstractContextManager[Replaced]:
    """While entered, the fp32 linear layers of `network` on the CPU are computed by oneDNN."""
    layers = _linear_layers(network)
    return forwards_replaced(layers, _product_of, lambda layer, x: suits(x, layer.weight, layer.bias))


def _linear_layers(network: torch.nn.Module) -> Iterator[Any]:
    return (part for part in network.modules() if computes_as(part, torch.nn.Linear))


def _product_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)


def suits(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether oneDNN computes these as PyTorch would: fp32 on the CPU, weights in rows, sizes that fit, no gradient."""
    return (
        is_fp32_on_cpu(x, weight, bias)
        # The operator reads the weight as if it were laid out in rows.
        and weight.ndim == 2
        and weight.is_contiguous()
        and x.ndim > 1
        and x.numel() >= _FEWEST_ROWS * x.shape[-1] > 0
        # PyTorch's own error names the sizes that do not fit.
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )

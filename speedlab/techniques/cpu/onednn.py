"""Linear layers on a CPU through oneDNN, in place of the BLAS library that PyTorch asks for them.

PyTorch hands fp32 matrix products to MKL, which leaves the wide vector units of other makers' CPUs unused; its
convolutions already go to oneDNN, which does not. The sums are the same, in another order: equal to fp32 rounding.

Attention on a CPU out of oneDNN's matrix products, a block of scores at a time.

SDPA's kernel for CPUs hands small products to MKL, which leaves the wide vector units of other makers' CPUs
unused. Here the scores of as many queries as stay in the cache are made, weighted and used before
the next ones (the tiling of Rabe and Staats, 2021, along the queries alone), all of it in fp32 whatever the model's
dtype: equal to SDPA to rounding.

Linear layers of a compiled graph on a CPU, by oneDNN where that is faster there.

PyTorch's compiler leaves fp32 matrix products to MKL, as eager PyTorch does, also with frozen
weights. An operator of our own takes their place in the graph before it is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from ...common.measured import measured_once
from ...common.timing import MARGIN, apart, least_seconds
from ...common.torch_private import has_onednn_linear, linear_functions, onednn_linear
from ...patching.layer_forwards import (
    Replaced,
    casts,
    computes_as,
    forwards_replaced,
    is_fp32_on_cpu,
    is_traced,
)

log = logging.getLogger(__name__)

# Rows, inputs and outputs of layers that an SD 1.x or SDXL UNet spends its time in.
_SHAPES = ((2048, 320, 320), (1024, 640, 640), (512, 1280, 1280), (512, 1280, 5120))
# With fewer rows a call costs more than the product.
_FEWEST_ROWS = 16


def why_not() -> str:
    """Why this PyTorch cannot compute linear layers with oneDNN; empty where it can."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    missing = f"PyTorch {torch.__version__} has no linear layer on oneDNN for plain weights"
    return "" if has_onednn_linear() else missing


_WAYS = ("PyTorch", "oneDNN")


@cache
def is_faster_here() -> bool:
    """Whether oneDNN computes linear layers clearly faster than PyTorch's own choice: measured once a machine."""
    return not why_not() and measured_once("linear layers", _faster, _WAYS) == "oneDNN"


@apart("Timing ways to compute")
def _faster() -> str:
    seconds = dict.fromkeys(_WAYS, 0.0)
    with torch.inference_mode():
        for rows, inputs, outputs in _SHAPES:
            x, weight, bias = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(outputs)
            ways = {"PyTorch": partial(F.linear, x, weight, bias), "oneDNN": partial(linear, x, weight, bias)}
            for name, best in least_seconds(ways).items():
                seconds[name] += best
    faster = _WAYS[seconds["oneDNN"] <= MARGIN * seconds["PyTorch"]]
    times = ", ".join(f"{name} {1e3 * total:.2f} ms" for name, total in seconds.items())
    log.info("Precision: linear layers go to %s (%s).", faster, times)
    return faster


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN. The weight has to lie in rows."""
    return onednn_linear(x, weight, bias)


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


# Scores in one block: 4 MB of fp32, which a core's share of the cache holds.
_SCORES = 1 << 20
_FEWEST_QUERIES = 64


def missing(device: torch.device) -> str | None:
    """What this attention lacks on a device; None where it can run."""
    if device.type != "cpu":
        return f"it is for CPUs, and this model runs on {device.type}"
    return why_not() or None


def onednn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Attention of q [B, H, queries, size], k and v [B, H, keys, size] without a mask; q's dtype and shape.

    Inside code that a compiler traces it is SDPA, which the compiler knows.
    """
    if is_traced():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    batch, heads, queries, size = q.shape
    keys, width = k.shape[-2], v.shape[-1]
    rows = min(queries, max(_FEWEST_QUERIES, _SCORES // max(keys, 1)))
    scaled = q.float() * (size**-0.5 if scale is None else scale)
    # Tokens first, as the layer behind reads it.
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device)
    for image in range(batch):
        for head in range(heads):
            query, key = scaled[image, head].contiguous(), k[image, head].float().contiguous()
            value = v[image, head].float().t().contiguous()
            for start in range(0, queries, rows):
                part = slice(start, start + rows)
                out[image, part, head] = linear(torch.softmax(linear(query[part], key), dim=-1), value)
    return out.transpose(1, 2)


# An operator exists as long as its library does.
_kept: list[torch.library.Library] = []


def use_onednn(graph: torch.fx.GraphModule) -> int:
    """Let oneDNN compute the fp32 linear layers of a Dynamo graph on the CPU where it is faster; returns how many."""
    found = [node for node in graph.graph.nodes if _is_linear(node)]
    # The operator has no gradient.
    if not found or torch.is_grad_enabled() or not is_faster_here():
        return 0
    operator = _operator()
    for node in found:
        node.target, node.args, node.kwargs = operator, _arguments(*node.args, **node.kwargs), {}
    graph.recompile()
    return len(found)


def _is_linear(node: torch.fx.Node) -> bool:
    if node.op != "call_function" or node.target not in linear_functions():
        return False
    return all(_is_fp32_on_cpu(value) for value in _arguments(*node.args, **node.kwargs)[:2])


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _is_fp32_on_cpu(value: Any) -> bool:
    known = value.meta.get("example_value") if isinstance(value, torch.fx.Node) else None
    return isinstance(known, torch.Tensor) and known.dtype == torch.float32 and known.device.type == "cpu"


@cache
def _operator() -> Any:
    """`speedlab::linear(x, weight, bias)`: a linear layer by oneDNN, or by PyTorch where oneDNN does not take it."""
    if not hasattr(torch.ops.speedlab, "linear"):  # the pack may be loaded under another name as well
        operators = torch.library.Library("speedlab", "FRAGMENT")
        operators.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
        operators.impl("linear", _compute, "CPU")
        operators.impl("linear", _shape, "Meta")
        _kept.append(operators)
    return torch.ops.speedlab.linear.default


def _compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if suits(x, weight, bias):
        return linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))

"""Linear layers of a compiled graph on a CPU, by oneDNN where that is faster there.

PyTorch's compiler leaves fp32 matrix products to MKL, as eager PyTorch does (see `onednn_linear`), also with frozen
weights. An operator of our own takes their place in the graph before it is compiled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .onednn_linear import is_faster_here, linear, suits

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
    if node.op != "call_function" or node.target not in (torch.nn.functional.linear, torch._C._nn.linear):
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

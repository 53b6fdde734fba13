"""Linear layers of a compiled graph by oneDNN: the graph's own sums, only where they are fp32 and oneDNN is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from speedlab.techniques.cpu import onednn

pytestmark = pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not() or "oneDNN is there")


class Network(torch.nn.Module):
    """Linear layers with and without bias, and one whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(32, 64)
        self.narrow = torch.nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.narrow(torch.relu(self.wide(x)))
        return x + torch.nn.functional.linear(y, self.wide.weight.t() @ self.wide.weight / 32)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def faster(monkeypatch) -> Callable[[bool], None]:
    """Say whether oneDNN was measured to be faster."""
    return lambda answer: monkeypatch.setattr(onednn, "is_faster_here", lambda: answer)


def compiled(network: Any, counts: list[int], run: Callable[..., Any] | None = None) -> Any:
    """`network` as Dynamo's graph with `use_onednn`, run as it is or by what `run` makes of it."""

    def backend(graph: Any, inputs: list[Any]) -> Any:
        counts.append(onednn.use_onednn(graph))
        return run(graph, inputs) if run else graph

    return torch.compile(network, backend=backend)


def targets(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes]


@torch.inference_mode()
def test_every_fp32_layer_is_computed_by_onednn_and_gives_the_same(faster):
    faster(True)
    network, x, counts, seen = Network().eval(), torch.randn(2, 40, 32), [], []

    def keep(graph: Any, _inputs: list[Any]) -> Any:
        seen.extend(targets(graph))
        return graph

    result = compiled(network, counts, keep)(x)
    assert counts == [3]
    assert seen.count("speedlab.linear.default") == 3
    assert torch.allclose(result, network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.full), True])
@torch.inference_mode()
def test_inductor_compiles_the_changed_graph_also_with_frozen_weights(faster, frozen):
    faster(True)
    network, x = Network().eval().requires_grad_(False), torch.randn(2, 40, 32)
    with torch._inductor.config.patch(freezing=frozen):
        result = compiled(network, [], lambda graph, inputs: torch._inductor.compile(graph, inputs))(x)
    assert torch.allclose(result, network(x), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_is_not_fp32_or_not_faster_stays(faster):
    faster(True)
    counts: list[int] = []
    compiled(Network().eval().bfloat16(), counts)(torch.randn(2, 40, 32, dtype=torch.bfloat16))
    torch._dynamo.reset()
    compiled(Network().eval().double(), counts)(torch.randn(2, 40, 32, dtype=torch.float64))
    torch._dynamo.reset()
    faster(False)
    compiled(Network().eval(), counts)(torch.randn(2, 40, 32))
    assert counts == [0, 0, 0]


def test_a_graph_that_needs_gradients_keeps_pytorchs_layers(faster):
    faster(True)
    counts: list[int] = []
    x = torch.randn(2, 40, 32, requires_grad=True)
    compiled(Network(), counts)(x).sum().backward()
    assert counts == [0]
    assert x.grad is not None


@torch.inference_mode()
def test_weights_that_change_are_seen(faster):
    faster(True)
    network, x = Network().eval(), torch.randn(2, 40, 32)
    program = compiled(network, [])
    first = program(x)
    network.wide.weight.mul_(2)
    assert not torch.allclose(program(x), first)
    assert torch.allclose(program(x), network(x), rtol=1e-4, atol=1e-4)


def test_the_operator_is_plain_pytorch_where_onednn_does_not_take_it():
    operator = onednn._operator()
    x, weight, bias = torch.randn(40, 32), torch.randn(32, 64).t(), torch.randn(64)
    assert torch.equal(operator(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(
        operator(x.double(), weight.double(), None), torch.nn.functional.linear(x.double(), weight.double())
    )
    assert onednn._operator() is operator

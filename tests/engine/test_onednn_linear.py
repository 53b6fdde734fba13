"""Linear layers on oneDNN: the same sums for every layout that may come, and left alone what is not theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speedlab.techniques.cpu import onednn
from speedlab.techniques.cpu.onednn import linear_layers_on_onednn

pytestmark = pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not() or "oneDNN is there")
linear = torch.nn.functional.linear


class _Counter(TorchDispatchMode):
    """Counts what reaches oneDNN's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "mkldnn._linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[_Counter]:
    with _Counter() as counter:
        yield counter


INPUTS = {
    "plain": lambda: torch.randn(2, 64, 32),
    "two dimensions": lambda: torch.randn(64, 32),
    "five dimensions": lambda: torch.randn(2, 3, 4, 5, 32),
    "transposed": lambda: torch.randn(2, 32, 64).transpose(1, 2),
    "columns of more": lambda: torch.randn(64, 40)[:, :32],
    "expanded": lambda: torch.randn(1, 1, 17, 32).expand(2, 3, 17, 32),
    "channels last": lambda: torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
}
WEIGHTS = {
    "plain": lambda: (torch.randn(48, 32), torch.randn(48)),
    "no bias": lambda: (torch.randn(48, 32), None),
    "parameters": lambda: (torch.nn.Parameter(torch.randn(48, 32)), torch.nn.Parameter(torch.randn(48))),
    "rows of more": lambda: (torch.randn(60, 32)[6:54], torch.randn(60)[6:54]),
    "transposed": lambda: (torch.randn(32, 48).t(), torch.randn(48)),
    "every second bias": lambda: (torch.randn(48, 32), torch.randn(96)[::2]),
}
LEFT_ALONE = {"transposed", "every second bias"}


def layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    """A linear layer on just these tensors."""
    made = torch.nn.Linear(1, 1, bias=bias is not None)
    made._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made._parameters["bias"] = torch.nn.Parameter(bias, requires_grad=False)
    return made


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("given", INPUTS)
def test_the_sums_are_the_same(given: str, weights: str) -> None:
    torch.manual_seed(3)
    x, (weight, bias) = INPUTS[given](), WEIGHTS[weights]()
    part = layer(weight.detach(), None if bias is None else bias.detach())
    with torch.inference_mode():
        expected = part(x)
        with counted() as counter, linear_layers_on_onednn(part) as replaced:
            result = part(x)
    assert replaced.layers == 1 and "forward" not in vars(part)
    assert counter.calls == (weights not in LEFT_ALONE)
    assert (result.shape, result.stride()) == (expected.shape, expected.stride())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 64, 32, dtype=torch.bfloat16), torch.randn(2, 64, 32, dtype=torch.float64), torch.randn(8, 32),
     torch.randn(32), torch.randn(0, 32), torch.randn(64, 0)],
    ids=["bf16", "fp64", "few rows", "a vector", "no rows", "no inputs"],
)  # fmt: skip
def test_what_is_left_to_pytorch(x: torch.Tensor) -> None:
    part = layer(torch.randn(48, x.shape[-1], dtype=x.dtype))
    with torch.inference_mode():
        expected = part(x)
        with counted() as counter, linear_layers_on_onednn(part):
            result = part(x)
    assert counter.calls == 0
    assert torch.equal(result, expected)


def test_gradients_and_autocast_are_left_to_pytorch() -> None:
    x, part = torch.randn(64, 32), torch.nn.Linear(32, 48)
    with counted() as counter, linear_layers_on_onednn(part):
        part(x).sum().backward()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert part(x).dtype == torch.bfloat16
    assert part.weight.grad is not None
    assert counter.calls == 0


def test_layers_of_another_kind_and_patched_ones_stay() -> None:
    class Own(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    own, patched = Own(32, 48), torch.nn.Linear(32, 48)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    before = patched.forward
    with linear_layers_on_onednn(torch.nn.ModuleList([own, patched])) as replaced:
        assert (replaced.layers, replaced.taken) == (0, 1) and patched.forward is before
    assert vars(patched)["forward"] is before


def test_weights_that_are_cast_in_use_are_left_alone() -> None:
    part: Any = torch.nn.Linear(32, 48).eval()
    part.comfy_cast_weights = True
    with torch.inference_mode(), counted() as counter, linear_layers_on_onednn(part):
        part(torch.randn(64, 32))
        part.comfy_cast_weights, part.weight_function = False, [lambda weight: weight]
        part(torch.randn(64, 32))
        assert counter.calls == 0
        part.weight_function = []
        part(torch.randn(64, 32))
        assert counter.calls == 1


def test_it_is_gone_afterwards_also_after_an_error() -> None:
    part = torch.nn.Linear(32, 48)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|mat1 and mat2"), linear_layers_on_onednn(part):
        part(torch.randn(64, 31))
    assert "forward" not in vars(part)


def test_a_compiled_module_computes_by_itself() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 32)).eval()
    x = torch.randn(64, 32)
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.inference_mode(), linear_layers_on_onednn(module):
        result = torch.compile(module, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(result, module(x), rtol=1e-5, atol=1e-5)
    assert targets.count(linear) == 2


@pytest.mark.usefixtures("unmeasured")
def test_the_choice_is_measured_once() -> None:
    onednn.is_faster_here.cache_clear()
    first = onednn.is_faster_here()
    assert first is onednn.is_faster_here()
    assert onednn.is_faster_here.cache_info().misses == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "size", "width"), [(300, 77, 40, 40), (64, 64, 80, 80), (5000, 300, 8, 8),
                                                                (17, 1, 32, 16), (1, 9, 8, 8)])  # fmt: skip
def test_attention_equals_sdpa(
    queries: int, keys: int, size: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_SCORES", 1 << 14)  # several blocks, the last one cut short
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, tokens, 3, last, generator=generator).to(dtype).transpose(1, 2)
        for tokens, last in ((queries, size), (keys, size), (keys, width))
    )
    before = [tensor.clone() for tensor in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.inference_mode():
        result = onednn.onednn_attention(q, k, v)
        scaled = onednn.onednn_attention(q, k, v, scale=0.25)
    assert result.dtype == dtype and result.shape == exact.shape
    assert float((result.double() - exact).norm() / exact.norm()) < (1e-6 if dtype == torch.float32 else 3e-3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.25)
    assert float((scaled.double() - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert all(torch.equal(one, other) for one, other in zip((q, k, v), before, strict=True))


def test_attention_inside_compiled_code_is_sdpa() -> None:
    q = torch.randn(1, 2, 32, 16)
    compiled = torch.compile(onednn.onednn_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_attention_on_a_card_is_refused() -> None:
    assert "for CPUs" in (onednn.missing(torch.device("cuda")) or "")

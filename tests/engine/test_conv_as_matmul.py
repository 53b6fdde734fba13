"""Convolutions as products: the same sums for what may come, and left alone what is not theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speedlab.techniques.cpu import conv_as_matmul, onednn
from speedlab.techniques.cpu.conv_as_matmul import few_pixels_as_products

pytestmark = pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not() or "oneDNN is there")
CHANNELS = 96


FEWEST_WEIGHTS = conv_as_matmul._FEWEST_WEIGHTS
measured = conv_as_matmul.most_pixels_here


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers and many pixels too, so that the tests are quick."""
    monkeypatch.setattr(conv_as_matmul, "_FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(conv_as_matmul, "most_pixels_here", lambda: 1 << 30)


class _Counter(TorchDispatchMode):
    """Counts products by oneDNN, and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += "mkldnn._linear_pointwise" in str(func)
        self.convolutions += "conv" in str(func)
        return func(*args, **(kwargs or {}))


LAYERS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "no padding": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "5x3": {"kernel_size": (5, 3), "padding": (2, 1)},
}
INPUTS = {
    "plain": lambda: torch.randn(2, CHANNELS, 8, 8),
    "one row": lambda: torch.randn(1, CHANNELS, 8, 12),
    "channels last": lambda: torch.randn(2, CHANNELS, 7, 9).contiguous(memory_format=torch.channels_last),
    "part of more": lambda: torch.randn(2, CHANNELS + 8, 8, 8)[:, 4:-4],
    "expanded": lambda: torch.randn(1, CHANNELS, 8, 8).expand(3, -1, -1, -1),
}


def layer(**settings: Any) -> torch.nn.Conv2d:
    torch.manual_seed(3)
    return torch.nn.Conv2d(CHANNELS, CHANNELS, **{"kernel_size": 3, "padding": 1, **settings}).requires_grad_(False)


@pytest.mark.parametrize("settings", LAYERS)
@pytest.mark.parametrize("given", INPUTS)
def test_the_sums_are_the_same(given: str, settings: str) -> None:
    part = layer(**LAYERS[settings])
    x = INPUTS[given]()
    before = x.clone(), part.weight.clone()
    with torch.inference_mode():
        expected = part(x)
        with _Counter() as counter, few_pixels_as_products(part) as replaced:
            result = part(x)
    assert (replaced.layers, replaced.calls) == (1, 1) and "forward" not in vars(part)
    assert (counter.products, counter.convolutions) == (1, 0)
    assert result.shape == expected.shape and result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before[0]) and torch.equal(part.weight, before[1])


@pytest.mark.parametrize(
    ("most", "outputs", "rows", "height", "width", "products"),
    [(64, 1280, 1, 8, 8, 1), (64, 1280, 2, 8, 8, 0), (128, 1280, 2, 8, 8, 1), (128, 1280, 1, 8, 17, 0),
     (128, 640, 1, 8, 8, 1), (128, 640, 2, 8, 8, 0), (16, 1280, 1, 4, 4, 1), (16, 1280, 1, 4, 5, 0),
     (0, 1280, 2, 8, 8, 1), (0, 1280, 1, 8, 17, 0), (128, 400, 1, 4, 4, 0)],
)  # fmt: skip
def test_only_where_weights_outweigh_pixels(
    most: int, outputs: int, rows: int, height: int, width: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many weights, and up to as many pixels, for 1280 channels, as products were measured to be faster at. Where they
    never were, whoever wants them all the same has them up to 128."""
    monkeypatch.setattr(conv_as_matmul, "_FEWEST_WEIGHTS", FEWEST_WEIGHTS)
    monkeypatch.setattr(conv_as_matmul, "most_pixels_here", lambda: most)
    part = torch.nn.utils.skip_init(torch.nn.Conv2d, 256, outputs, 3, padding=1)
    for parameter in part.parameters():
        torch.nn.init.ones_(parameter)
    x = torch.randn(rows, 256, height, width)
    with torch.inference_mode(), _Counter() as counter, few_pixels_as_products(part):
        part(x)
    assert (counter.products, counter.convolutions) == (products, 1 - products)


def test_a_kernel_of_one_pixel_is_left_alone() -> None:
    with few_pixels_as_products(layer(kernel_size=1, padding=0)) as replaced:
        assert replaced.layers == 0


def in_channels_last() -> torch.nn.Conv2d:
    return layer().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("part, x", [
    (layer(padding_mode="circular"), torch.randn(1, CHANNELS, 8, 8)),
    (layer(padding="same"), torch.randn(1, CHANNELS, 8, 8)),
    (layer(groups=4), torch.randn(1, CHANNELS, 8, 8)),
    (in_channels_last(), torch.randn(1, CHANNELS, 8, 8)),
    (layer().double(), torch.randn(1, CHANNELS, 8, 8).double()),
    (layer().bfloat16(), torch.randn(1, CHANNELS, 8, 8).bfloat16()),
    (layer(), torch.randn(CHANNELS, 8, 8)),
    (layer(), torch.randn(0, CHANNELS, 8, 8)),
], ids=["circular", "same", "groups", "channels last", "fp64", "bf16", "no batch", "no rows"])  # fmt: skip
def test_what_is_left_to_pytorch(part: torch.nn.Conv2d, x: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = part(x)
        with _Counter() as counter, few_pixels_as_products(part):
            result = part(x)
    assert counter.products == 0
    assert torch.equal(result, expected)


def test_gradients_and_autocast_are_left_to_pytorch() -> None:
    part = layer().requires_grad_(True)
    with _Counter() as counter, few_pixels_as_products(part):
        part(torch.randn(1, CHANNELS, 8, 8)).sum().backward()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert part(torch.randn(1, CHANNELS, 8, 8)).dtype == torch.bfloat16
    assert part.weight.grad is not None and counter.products == 0


def test_layers_of_another_kind_and_patched_ones_stay() -> None:
    class Own(torch.nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1.0

    class Seamless(torch.nn.Conv2d):
        def _conv_forward(self, input: Any, weight: Any, bias: Any) -> torch.Tensor:
            return super()._conv_forward(torch.nn.functional.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)

    patched, instance = layer(), layer()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    instance._conv_forward = lambda x, _weight, _bias: x  # type: ignore[method-assign]
    parts = torch.nn.ModuleList([Own(96, 96, 3), Seamless(96, 96, 3), patched, instance])
    with few_pixels_as_products(parts) as replaced:
        assert (replaced.layers, replaced.taken) == (0, 1)
    assert "forward" in vars(patched)


def test_weights_that_are_cast_in_use_are_left_alone() -> None:
    part: Any = layer()
    x = torch.randn(1, CHANNELS, 8, 8)
    part.comfy_cast_weights = True
    with torch.inference_mode(), _Counter() as counter, few_pixels_as_products(part):
        part(x)
        part.comfy_cast_weights, part.weight_function = False, [lambda weight: weight]
        part(x)
        assert counter.products == 0
        part.weight_function = []
        part(x)
        assert counter.products == 1


def test_it_is_gone_afterwards_also_after_an_error() -> None:
    part = layer()
    with pytest.raises(RuntimeError, match="channels"), few_pixels_as_products(part):
        part(torch.randn(1, CHANNELS + 1, 8, 8))
    assert "forward" not in vars(part)


def test_one_inside_another_changes_nothing() -> None:
    part = layer()
    with few_pixels_as_products(part):
        outer = vars(part)["forward"]
        with few_pixels_as_products(part) as inner:
            assert (inner.layers, inner.taken) == (0, 1) and vars(part)["forward"] is outer
        assert vars(part)["forward"] is outer
    assert "forward" not in vars(part)


def test_a_layers_own_forward_is_not_somebody_elses() -> None:
    """ComfyUI leaves a layer's own bound forward in it where it has taken a LoRA's bypass out."""
    part = layer()
    part.forward = own = part.forward  # type: ignore[method-assign]
    with torch.inference_mode(), few_pixels_as_products(part) as replaced:
        part(torch.randn(1, CHANNELS, 8, 8))
    assert (replaced.layers, replaced.calls) == (1, 1)
    assert vars(part)["forward"] is own


def test_a_forward_that_came_meanwhile_stays() -> None:
    part = layer()

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return x

    with few_pixels_as_products(part):
        part.forward = theirs  # type: ignore[method-assign]
    assert vars(part)["forward"] is theirs


def test_a_copy_computes_with_its_own_weights() -> None:
    part = layer()
    x = torch.randn(1, CHANNELS, 8, 8)
    with torch.inference_mode(), few_pixels_as_products(part) as replaced:
        twin = copy.deepcopy(part)
        twin.weight.zero_()
        assert float((twin(x) - part(x)).abs().max()) > 0.1
        assert replaced.calls >= 1


def test_input_by_name() -> None:
    part, x = layer(), torch.randn(1, CHANNELS, 8, 8)
    with torch.inference_mode(), few_pixels_as_products(part):
        torch.testing.assert_close(part(input=x), part(x), rtol=1e-5, atol=1e-5)


def test_where_products_are_less_exact_than_convolutions() -> None:
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(setting, "fp32_precision"):
        pytest.skip("this PyTorch has no such setting")
    part, x, before = layer(), torch.randn(1, CHANNELS, 8, 8), setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        with torch.inference_mode(), _Counter() as counter, few_pixels_as_products(part):
            part(x)
    finally:
        setting.fp32_precision = before
    assert (counter.products, counter.convolutions) == (0, 1)


def test_torchs_counter_knows_the_operations() -> None:
    """As many as of the convolution."""
    from speedlab.measure.flops import _flop_counter

    part, x = layer(), torch.randn(2, CHANNELS, 8, 8)
    totals = []
    with torch.inference_mode():
        with _flop_counter() as plain:
            part(x)
        with few_pixels_as_products(part), _flop_counter() as products:
            part(x)
    totals = [plain.get_total_flops(), products.get_total_flops()]
    assert totals == [2 * 2 * 64 * CHANNELS * CHANNELS * 9] * 2


def test_a_compiled_module_computes_by_itself() -> None:
    module = torch.nn.Sequential(layer(), torch.nn.SiLU(), layer()).eval()
    x = torch.randn(1, CHANNELS, 8, 8)
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.inference_mode(), few_pixels_as_products(module):
        result = torch.compile(module, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(result, module(x), rtol=1e-5, atol=1e-5)
    assert sum("conv2d" in target for target in targets) == 2


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("shares", "most"), [([0.5, 0.6, 0.8], 128), ([0.5, 0.6, 0.9], 64), ([0.5, 1.2, 0.1], 16), ([0.9, 0.1, 0.1], 0)]
)
def test_products_as_far_as_they_are_clearly_faster(
    shares: list[float], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16, 64 and 128 pixels, by what the clock says. The ways themselves are run, and equal."""
    left = iter(shares)
    results: list[torch.Tensor] = []

    def clock(ways: dict[str, Any], rounds: tuple[int, int]) -> dict[str, float]:
        results.extend(way() for way in ways.values())
        return {"convolution": 1.0, "product": next(left)}

    monkeypatch.setattr(conv_as_matmul, "least_seconds", clock)
    measured.cache_clear()
    try:
        assert measured() == most
        assert measured() == most and measured.cache_info().misses == 1
    finally:
        measured.cache_clear()
    for plain, product in zip(results[::2], results[1::2], strict=True):
        torch.testing.assert_close(plain, product, rtol=1e-5, atol=1e-2)


@pytest.mark.usefixtures("unmeasured")
def test_it_is_really_measured() -> None:
    measured.cache_clear()
    assert measured() in (0, 16, 64, 128)

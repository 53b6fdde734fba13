"""Precision on a CPU: linear layers, convolutions and freed memory in other hands while its model samples."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from .tiny_unet import TinyUNet, build, relative, watched


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("sd15")


@pytest.fixture(scope="module")
def modules(pack: ModuleType) -> SimpleNamespace:
    names = {
        "conv_as_matmul": "techniques.cpu.conv_as_matmul",
        "host_allocator": "techniques.cpu.host_allocator",
        "onednn_linear": "techniques.cpu.onednn",
        "patching": "patching.wrappers",
        "precision_flags": "techniques.precision.attach",
        "errors": "common.errors",
    }
    return SimpleNamespace(**{name: importlib.import_module(f"speedlab.{path}") for name, path in names.items()})


@pytest.fixture(scope="module")
def attach(modules: SimpleNamespace) -> Callable[..., Any]:
    precision = modules.precision_flags
    return lambda model, **options: precision.attach_precision(model, precision.PrecisionConfig(**options))


def _told(modules: SimpleNamespace, model: Any) -> str:
    """What the record would say of the model's techniques."""
    return " ".join(accelerator.describe() for accelerator in modules.patching.accelerators(model))


def _on_onednn(tiny: TinyUNet) -> list[str]:
    """The linear layers that have a forward of their own at the moment."""
    parts = tiny.unet.named_modules()
    return [name for name, part in parts if isinstance(part, torch.nn.Linear) and "forward" in vars(part)]


def test_linear_layers_on_onednn(tiny: TinyUNet, attach: Callable[..., Any]) -> None:
    """The same latents to rounding, with linear layers on oneDNN while sampling and only then."""
    seen: list[Any] = []
    stock = tiny.sample(tiny.model, steps=3)
    result = tiny.sample(watched(attach(tiny.model, linear="onednn"), lambda: _on_onednn(tiny), seen), steps=3)
    assert seen and all(len(names) > 20 for names in seen)
    assert relative(result, stock) < 1e-5  # 0 on CPUs where both ways add up in one order
    assert _on_onednn(tiny) == []
    assert torch.equal(tiny.sample(tiny.model, steps=3), stock)


def test_linear_is_undone_after_an_error(tiny: TinyUNet, attach: Callable[..., Any]) -> None:
    def fail() -> None:
        assert _on_onednn(tiny)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        tiny.sample(watched(attach(tiny.model, linear="onednn"), fail, []), steps=2)
    assert _on_onednn(tiny) == []


@pytest.mark.parametrize("faster", [True, False])
def test_linear_auto_takes_what_was_measured(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    monkeypatch.setattr(modules.onednn_linear, "is_faster_here", lambda: faster)
    model = attach(tiny.model, linear="auto")
    assert (model is tiny.model) is not faster
    assert ("linear=onednn" in _told(modules, model)) is faster


def test_linear_says_what_is_missing(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.precision_flags, "why_not", lambda: "this PyTorch was built without oneDNN")
    with pytest.raises(modules.errors.UnavailableError, match=r"without oneDNN\. Set linear to keep or auto"):
        attach(tiny.model, linear="onednn")


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_auto_is_for_what_computes_in_fp32(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(modules.onednn_linear, "is_faster_here", lambda: True)
    monkeypatch.setattr(modules.conv_as_matmul, "most_pixels_here", lambda: 128)
    monkeypatch.setattr(modules.conv_as_matmul, "_FEWEST_WEIGHTS", 1)
    assert f"{name}=" in _told(modules, attach(tiny.model, **{name: "auto"}))
    assert f"{name}=" not in _told(modules, attach(tiny.model, autocast="bf16", **{name: "auto"}))
    for part in tiny.unet.modules():
        part.comfy_cast_weights = True
    try:
        assert attach(tiny.model, **{name: "auto"}) is tiny.model
    finally:
        for part in tiny.unet.modules():
            del part.comfy_cast_weights


def _cannot_reuse(modules: SimpleNamespace) -> str:
    return str(modules.host_allocator.why_not_reused())


def test_memory_is_kept_for_a_run_and_the_picture_is_the_same(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace
) -> None:
    if _cannot_reuse(modules):
        pytest.skip(_cannot_reuse(modules))
    users, seen = modules.host_allocator._users, []
    stock = tiny.sample(tiny.model, steps=3)
    result = tiny.sample(watched(attach(tiny.model, memory="reuse"), lambda: users.runs, seen), steps=3)
    assert torch.equal(result, stock)
    assert seen and set(seen) == {1} and users.runs == 0

    def fail() -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        tiny.sample(watched(attach(tiny.model, memory="reuse"), fail, []), steps=2)
    assert users.runs == 0


@pytest.mark.parametrize("reason", ["", "this is glibc's, the C library of Linux"])
def test_memory_auto_and_what_is_missing(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(modules.precision_flags, "why_not_reused", lambda: reason)
    model = attach(tiny.model, memory="auto")
    assert (model is tiny.model) is bool(reason)
    assert ("memory=reuse" in _told(modules, model)) is not bool(reason)
    if reason:
        with pytest.raises(modules.errors.UnavailableError, match=r"of Linux\. Set memory to keep or auto"):
            attach(tiny.model, memory="reuse")


@pytest.fixture
def of_any_size(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products also where, as in the tiny UNet, weights are few and pixels many."""
    if modules.precision_flags.why_not():
        pytest.skip(modules.precision_flags.why_not())
    monkeypatch.setattr(modules.conv_as_matmul, "_FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(modules.conv_as_matmul, "most_pixels_here", lambda: 1 << 30)


def _as_products(tiny: TinyUNet) -> list[str]:
    """The convolutions that have a forward of their own at the moment."""
    parts = tiny.unet.named_modules()
    return [name for name, part in parts if isinstance(part, torch.nn.Conv2d) and "forward" in vars(part)]


@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize("side", [8, 13])
def test_convolutions_as_products(tiny: TinyUNet, attach: Callable[..., Any], side: int, caplog: Any) -> None:
    """The same latents to rounding, with products while sampling and only then. Up to which size is told."""
    caplog.set_level("INFO")
    seen: list[Any] = []
    stock = tiny.sample(tiny.model, steps=3, size=(side, 8))
    model = attach(tiny.model, convolution="matmul", linear="onednn")
    result = tiny.sample(watched(model, lambda: _as_products(tiny), seen), steps=3, size=(side, 8))
    assert seen and all(len(names) > 10 for names in seen)
    assert relative(result, stock) < 1e-5
    assert _as_products(tiny) == []
    assert f"convolutions of up to {1 << 30} pixels" in caplog.text
    assert torch.equal(tiny.sample(tiny.model, steps=3, size=(side, 8)), stock)


@pytest.mark.usefixtures("of_any_size")
def test_convolutions_of_another_node_are_not_told_of_as_products(
    tiny: TinyUNet, attach: Callable[..., Any], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    for part in tiny.unet.modules():
        if isinstance(part, torch.nn.Conv2d):
            monkeypatch.setitem(vars(part), "forward", partial(type(part).forward, part))
    tiny.sample(attach(tiny.model, convolution="matmul"), steps=1)
    assert "are matrix products" not in caplog.text


@pytest.mark.usefixtures("of_any_size")
def test_convolution_is_undone_after_an_error(tiny: TinyUNet, attach: Callable[..., Any]) -> None:
    def fail() -> None:
        assert _as_products(tiny)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        tiny.sample(watched(attach(tiny.model, convolution="matmul"), fail, []), steps=2)
    assert _as_products(tiny) == []


@pytest.mark.parametrize("options", [{}, {"memory_format": "channels_last"}, {"autocast": "bf16"}])
def test_convolution_says_where_it_had_no_effect(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, options: dict,
) -> None:  # fmt: skip
    """The tiny UNet's weights are few; in the other cases the layers would do, but not like this."""
    if options:
        monkeypatch.setattr(modules.conv_as_matmul, "_FEWEST_WEIGHTS", 1)
        monkeypatch.setattr(modules.conv_as_matmul, "most_pixels_here", lambda: 1 << 30)
    caplog.set_level(logging.INFO)
    plain = tiny.sample(attach(tiny.model, **options), steps=1)
    assert "no effect" not in caplog.text
    assert torch.equal(tiny.sample(attach(tiny.model, convolution="matmul", **options), steps=1), plain)
    assert "Precision: convolution had no effect: UNetModel has no convolution that computes in fp32" in caplog.text


def test_linear_says_where_it_had_no_effect(
    tiny: TinyUNet, attach: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tiny.sample(attach(tiny.model, linear="onednn", autocast="bf16"), steps=1)
    assert (
        "Precision: linear had no effect: UNetModel has no linear layer of its own that computes in fp32" in caplog.text
    )


@pytest.mark.parametrize("faster", [True, False])
def test_convolution_auto_takes_what_was_measured(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    monkeypatch.setattr(modules.conv_as_matmul, "most_pixels_here", lambda: 128 * faster)
    assert attach(tiny.model, convolution="auto") is tiny.model, "the tiny UNet has few weights"
    monkeypatch.setattr(modules.conv_as_matmul, "_FEWEST_WEIGHTS", 1)
    model = attach(tiny.model, convolution="auto")
    assert (model is tiny.model) is not faster
    assert ("convolution=matmul" in _told(modules, model)) is faster


def test_convolution_says_what_is_missing(
    tiny: TinyUNet, attach: Callable[..., Any], modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.precision_flags, "why_not", lambda: "this PyTorch was built without oneDNN")
    with pytest.raises(modules.errors.UnavailableError, match=r"without oneDNN\. Set convolution to keep or auto"):
        attach(tiny.model, convolution="matmul")

"""Precision: in force while its model samples, and gone without a trace afterwards, whatever happened."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from .tiny_unet import TinyUNet, build, relative, watched

ALL_ON = {"tf32": "on", "cudnn_tf32": "off", "cudnn_benchmark": "on", "fp16_accumulation": "on"}


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("sd15")


@pytest.fixture(scope="module")
def modules(pack: ModuleType) -> SimpleNamespace:
    names = {
        "attention": "techniques.attention.attach",
        "deepcache": "techniques.deepcache.attach",
        "dynamic_cfg": "techniques.guidance.dynamic_cfg",
        "patching": "patching.wrappers",
        "precision_flags": "techniques.precision.attach",
        "torch_flags": "techniques.precision.torch_flags",
        "weight_layout": "techniques.precision.weight_layout",
        "errors": "common.errors",
    }
    return SimpleNamespace(**{name: importlib.import_module(f"speedlab.{path}") for name, path in names.items()})


@pytest.fixture(scope="module")
def attach(modules: SimpleNamespace) -> Callable[..., Any]:
    precision = modules.precision_flags
    return lambda model, **options: precision.attach_precision(model, precision.PrecisionConfig(**options))


def _ask(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "refused"


def _flags() -> dict[str, Any]:
    """All that PyTorch says about its flags, by its older and its newer interface."""
    backends = torch.backends
    readers = {
        "tf32": lambda: backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": lambda: backends.cudnn.allow_tf32,
        "cudnn_benchmark": lambda: backends.cudnn.benchmark,
        "fp16_accumulation": lambda: backends.cuda.matmul.allow_fp16_accumulation,
        "level": torch.get_float32_matmul_precision,
    }
    for name, owner in (("cuda", backends.cuda.matmul), ("mkldnn", getattr(backends.mkldnn, "matmul", None)),
                        ("conv", getattr(backends.cudnn, "conv", None)), ("all", backends.cudnn)):  # fmt: skip
        if hasattr(owner, "fp32_precision"):
            readers[name] = lambda owner=owner: owner.fp32_precision
    return {name: _ask(read) for name, read in readers.items()}


@pytest.fixture(autouse=True)
def _flags_stay() -> Iterator[None]:
    before = _flags()
    yield
    assert _flags() == before


def _failing(model: Any, error: type[BaseException]) -> Any:
    def fail(args: dict) -> torch.Tensor:
        raise error("stop")

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(fail)
    return clone


# Flags ----------------------------------------------------------------------------------------------------------------


def test_nothing_set_is_the_same_object(tiny: TinyUNet, attach: Any) -> None:
    assert attach(tiny.model) is tiny.model


@pytest.mark.parametrize("name", list(ALL_ON))
@pytest.mark.parametrize("word", ["on", "off"])
def test_one_flag(tiny: TinyUNet, attach: Any, name: str, word: str) -> None:
    seen: list[dict[str, Any]] = []
    outside = _flags()
    tiny.sample(watched(attach(tiny.model, **{name: word}), _flags, seen), steps=2)
    assert [flags[name] for flags in seen] == [word == "on"] * 2
    others = {"tf32", "cudnn_tf32", "cudnn_benchmark", "fp16_accumulation"} - {name}
    assert all(flags[other] == outside[other] for flags in seen for other in others)
    assert _flags() == outside


def test_the_picture_is_the_same_on_a_cpu(tiny: TinyUNet, attach: Any) -> None:
    assert torch.equal(tiny.sample(attach(tiny.model, **ALL_ON)), tiny.sample())


@pytest.mark.parametrize("kind", ["failure", "interrupt", "keyboard", "out of memory while loading"])
def test_flags_after_an_error(tiny: TinyUNet, attach: Any, kind: str) -> None:
    import comfy.model_management

    errors = {"interrupt": comfy.model_management.InterruptProcessingException, "keyboard": KeyboardInterrupt}
    error = errors.get(kind, RuntimeError)
    before = _flags()
    model = attach(tiny.model, **ALL_ON, memory_format="channels_last", autocast="bf16")
    if kind.startswith("out"):

        def prepare(executor: Any, *args: Any, **kwargs: Any) -> Any:
            assert _flags()["cudnn_benchmark"] is True
            raise RuntimeError("out of memory")

        model.add_wrapper_with_key("prepare_sampling", "fail", prepare)
    else:
        model = _failing(model, error)
    strides = _strides(tiny)
    with pytest.raises(error):
        tiny.sample(model)
    assert _flags() == before
    assert _strides(tiny) == strides
    assert not torch.is_autocast_enabled("cpu")


def _by_level(level: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(level)


def _newer(owner: str, word: str) -> Callable[[], None]:
    def change() -> None:
        target = torch.backends
        for part in owner.split("."):
            target = getattr(target, part)
        target.fp32_precision = word

    return change


@contextmanager
def _changed(change: Callable[[], None]) -> Iterator[None]:
    """PyTorch's state after `change`, and after the block as it is when a process starts."""
    try:
        change()
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for owner in ("cuda.matmul", "mkldnn.matmul"):
            _newer(owner, "none")()


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this PyTorch has one interface")
@pytest.mark.parametrize("word", ["on", "off"])
@pytest.mark.parametrize(
    "change",
    [_by_level("high"), _by_level("medium"), _newer("cuda.matmul", "tf32"), _newer("cuda.matmul", "ieee"),
     _newer("cudnn.conv", "ieee"), _newer("mkldnn.matmul", "bf16")],
    ids=["high", "medium", "newer tf32", "newer ieee", "newer conv ieee", "newer mkldnn"],
)  # fmt: skip
def test_flags_that_somebody_has_set(tiny: TinyUNet, attach: Any, change: Callable[[], None], word: str) -> None:
    """Also by PyTorch's newer interface, after which the older one refuses to answer."""
    with _changed(change):
        before = _flags()
        seen: list[dict[str, Any]] = []
        tiny.sample(watched(attach(tiny.model, tf32=word, cudnn_tf32=word), _flags, seen), steps=1)
        assert _flags() == before
        assert seen[0]["cuda"] == ("tf32" if word == "on" else "ieee")
        assert (seen[0]["conv"] == "tf32") == (word == "on")


def test_two_models_one_after_the_other(tiny: TinyUNet, attach: Any) -> None:
    before, seen = _flags(), []
    for word in ("on", "off", "on"):
        tiny.sample(watched(attach(tiny.model, tf32=word, cudnn_benchmark=word), _flags, seen), steps=1)
        assert _flags() == before
    assert [flags["tf32"] for flags in seen] == [True, False, True]


def test_one_run_inside_another(tiny: TinyUNet, attach: Any) -> None:
    """As a detailer does that samples with a second model while the first one samples."""
    second = build("sd15", seed=3)
    inner_seen: list[Any] = []
    outer_seen: list[Any] = []
    inner = watched(attach(second.model, tf32="off", autocast="fp16"), lambda: _state(second), inner_seen)

    def sample_inside(args: dict) -> torch.Tensor:
        second.sample(inner, steps=1)
        return args["denoised"]

    outer = attach(tiny.model, tf32="on", cudnn_benchmark="on", memory_format="channels_last", autocast="bf16")
    outer = watched(outer, lambda: _state(tiny), outer_seen)
    outer.set_model_sampler_post_cfg_function(sample_inside)
    tiny.sample(outer, steps=2)
    assert outer_seen == [(True, True, True, True)] * 2
    assert inner_seen == [(False, True, False, True)] * 2, "what it does not set, it finds as the outer run has it"
    assert not any(_channels_last(tiny))


def _state(tiny: TinyUNet) -> tuple[bool, ...]:
    flags = _flags()
    return flags["tf32"], flags["cudnn_benchmark"], all(_channels_last(tiny)), torch.is_autocast_enabled("cpu")


def test_a_flag_that_cannot_act_is_told(tiny: TinyUNet, attach: Any, caplog: pytest.LogCaptureFixture) -> None:
    attach(tiny.model, tf32="on", fp16_accumulation="on")
    assert caplog.text.count("has no effect here") == 1
    assert "tf32, fp16_accumulation" in caplog.text
    caplog.clear()
    attach(tiny.model, memory_format="channels_last")
    assert "no effect" not in caplog.text


def test_a_flag_that_this_pytorch_lacks(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = modules.torch_flags._plain(torch.backends.cuda.matmul, "allow_what_is_not_there")
    monkeypatch.setitem(modules.torch_flags.FLAGS, "fp16_accumulation", absent)
    with pytest.raises(modules.errors.UnavailableError, match=r"Update PyTorch, or set fp16_accumulation to keep"):
        attach(tiny.model, fp16_accumulation="on")


# Memory format --------------------------------------------------------------------------------------------------------


def _convolutions(tiny: TinyUNet) -> list[torch.nn.Conv2d]:
    return [part for part in tiny.unet.modules() if isinstance(part, torch.nn.Conv2d)]


def _channels_last(tiny: TinyUNet) -> list[bool]:
    wide = (part.weight for part in _convolutions(tiny) if part.kernel_size != (1, 1))
    return [weight.is_contiguous(memory_format=torch.channels_last) for weight in wide]


def _strides(tiny: TinyUNet) -> list[tuple[int, ...]]:
    return [parameter.stride() for parameter in tiny.unet.parameters()]


def test_what_comes_out_is_laid_out_as_comfyui_expects(modules: SimpleNamespace) -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x

    out = modules.precision_flags._with_input_in(torch.channels_last)(network, torch.randn(1, 4, 8, 8))
    assert seen == [True] and out.is_contiguous()


def test_channels_last(tiny: TinyUNet, attach: Any) -> None:
    strides, values = _strides(tiny), [part.weight.clone() for part in _convolutions(tiny)]
    inputs: list[bool] = []
    seen: list[bool] = []
    hook = tiny.unet.input_blocks[0][0].register_forward_pre_hook(
        lambda _part, given: inputs.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    model = watched(attach(tiny.model, memory_format="channels_last"), lambda: all(_channels_last(tiny)), seen)
    try:
        ours = tiny.sample(model, size=(16, 16), steps=3)
    finally:
        hook.remove()
    assert seen == inputs == [True] * 3
    assert _strides(tiny) == strides
    assert not any(_channels_last(tiny))
    assert all(torch.equal(part.weight, value) for part, value in zip(_convolutions(tiny), values, strict=True))
    assert ours.is_contiguous()
    assert relative(ours, tiny.sample(size=(16, 16), steps=3)) < 1e-4


def test_contiguous_for_a_model_in_channels_last(attach: Any) -> None:
    """As Load Checkpoint lays out a model on request."""
    tiny = build("sd15", seed=1)
    reference = tiny.sample()
    tiny.unet.to(memory_format=torch.channels_last)
    strides, seen = _strides(tiny), []
    model = watched(attach(tiny.model, memory_format="contiguous"), lambda: any(_channels_last(tiny)), seen)
    assert torch.equal(tiny.sample(model), reference)
    assert not any(seen)
    assert _strides(tiny) == strides
    assert all(_channels_last(tiny))


def test_weights_loaded_outside_of_inference_mode_stay_so(attach: Any, modules: SimpleNamespace) -> None:
    with torch.inference_mode(False):
        tiny = build("sd15", seed=2)
    assert not tiny.unet.input_blocks[0][0].weight.is_inference()
    tiny.sample(attach(tiny.model, memory_format="channels_last"), steps=1)
    assert not any(part.weight.is_inference() or part.weight.data.is_inference() for part in _convolutions(tiny))


def test_weights_elsewhere_are_left_alone(tiny: TinyUNet, modules: SimpleNamespace) -> None:
    with modules.weight_layout.conv_weights_in(tiny.unet, torch.channels_last, torch.device("meta")) as changed:
        assert changed == 0
        assert not any(_channels_last(tiny))


def test_a_failure_half_way_is_undone(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    strides, lay_out, count = _strides(tiny), modules.weight_layout._lay_out, []

    def fails_at_the_fifth(*args: Any) -> None:
        count.append(1)
        if len(count) == 5:
            raise RuntimeError("out of memory")
        lay_out(*args)

    monkeypatch.setattr(modules.weight_layout, "_lay_out", fails_at_the_fifth)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.sample(attach(tiny.model, memory_format="channels_last"))
    assert _strides(tiny) == strides


def test_weight_hooks(tiny: TinyUNet, attach: Any) -> None:
    """Hooks change weights while a run is under way, and take that back after it."""
    import comfy.hooks

    def hooked(model: Any) -> torch.Tensor:
        key = "diffusion_model.input_blocks.0.0.weight"
        hook = comfy.hooks.WeightHook(1.0, 1.0)
        difference = torch.full_like(tiny.unet.input_blocks[0][0].weight, 0.05).contiguous()
        hook.weights = {key: ("diff", (difference,))}
        hook.need_weight_init = False
        group = comfy.hooks.HookGroup()
        group.add(hook)
        positive = [[tiny.cond(1)[0][0], {**tiny.cond(1)[0][1], "hooks": group}]]
        return tiny.sample(model, positive=positive, steps=4)

    before, strides = tiny.sample(steps=4), _strides(tiny)
    reference = hooked(tiny.model)
    assert relative(reference, before) > 1e-4
    assert relative(hooked(attach(tiny.model, memory_format="channels_last")), reference) < 1e-3
    assert _strides(tiny) == strides
    assert torch.equal(tiny.sample(steps=4), before)


# Autocast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast(tiny: TinyUNet, attach: Any, word: str, dtype: torch.dtype) -> None:
    outputs: list[torch.dtype] = []
    linear = next(part for part in tiny.unet.modules() if isinstance(part, torch.nn.Linear))
    hook = linear.register_forward_hook(lambda _part, _inputs, out: outputs.append(out.dtype))
    try:
        stock = tiny.sample(steps=3)
        assert set(outputs) == {torch.float32}
        outputs.clear()
        ours = tiny.sample(attach(tiny.model, autocast=word), steps=3)
        assert set(outputs) == {dtype}
        outputs.clear()
        assert torch.equal(tiny.sample(steps=3), stock)
        assert set(outputs) == {torch.float32}
    finally:
        hook.remove()
    assert ours.dtype == torch.float32
    assert 0 < relative(ours, stock) < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in tiny.unet.parameters())


@pytest.mark.parametrize("layout", ["sd2", "sdxl"])
def test_everything_at_once_on_other_models(attach: Any, layout: str) -> None:
    tiny = build(layout)
    model = attach(tiny.model, **ALL_ON, memory_format="channels_last", autocast="bf16")
    assert relative(tiny.sample(model, steps=3), tiny.sample(steps=3)) < 0.1
    assert not any(_channels_last(tiny))


def test_autocast_that_a_device_does_not_do(modules: SimpleNamespace) -> None:
    for device in ("meta", "vulkan"):
        with pytest.raises(modules.errors.UnavailableError, match="Set autocast to off"):
            modules.precision_flags._check_autocast("bf16", torch.device(device))


def test_a_processor_without_bf16_is_told(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    for can, told in ((True, 0), (False, 1)):
        monkeypatch.setattr(modules.precision_flags, "cpu_computes_bf16", lambda can=can: can)
        attach(tiny.model, autocast="bf16")
        assert caplog.text.count("no instructions for bf16") == told


# Together -------------------------------------------------------------------------------------------------------------


def test_nodes_in_a_row(tiny: TinyUNet, attach: Any, modules: SimpleNamespace) -> None:
    """Later nodes win where they set something; the record shows one technique with all of it."""
    model = attach(attach(tiny.model, tf32="on", autocast="bf16"), tf32="off", memory_format="channels_last")
    seen: list[Any] = []
    tiny.sample(watched(model, lambda: _state(tiny), seen), steps=1)
    assert seen == [(False, False, True, True)]
    notes = [note.describe() for note in modules.patching.accelerators(model)]
    assert notes == ["precision(tf32=off, memory_format=channels_last, autocast=bf16)"]
    assert attach(model) is model


def test_the_input_model_is_untouched(tiny: TinyUNet, attach: Any) -> None:
    model = attach(tiny.model, **ALL_ON, memory_format="channels_last", autocast="bf16")
    before, seen = tiny.sample(steps=2), []
    tiny.sample(model, steps=2)
    assert torch.equal(tiny.sample(watched(tiny.model, lambda: _state(tiny), seen), steps=2), before)
    assert seen == [(False, False, False, False)] * 2
    assert not any(tiny.model.wrappers.values())
    assert not tiny.model.attachments


@pytest.mark.parametrize("technique", ["deepcache", "dynamic_cfg", "attention"])
def test_order_does_not_matter(tiny: TinyUNet, attach: Any, modules: SimpleNamespace, technique: str) -> None:
    patches = {
        "deepcache": lambda model: modules.deepcache.attach_deepcache(
            model, modules.deepcache.DeepCacheConfig(interval=2, branch=1)
        ),
        "dynamic_cfg": lambda model: modules.dynamic_cfg.attach_dynamic_cfg(
            model, modules.dynamic_cfg.DynamicCFGConfig(stop_at=0.5)
        ),
        "attention": lambda model: modules.attention.attach_attention(
            model, modules.attention.AttentionConfig("split")
        ),
    }
    other = patches[technique]
    for options, near in (({"memory_format": "channels_last"}, 1e-3), ({"autocast": "bf16"}, 0.1)):
        one = tiny.sample(other(attach(tiny.model, **options)))
        assert torch.equal(tiny.sample(attach(other(tiny.model), **options)), one)
        assert relative(one, tiny.sample(other(tiny.model))) < near


def test_node(tiny: TinyUNet, pack: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    node = importlib.import_module(f"{pack.__name__}.nodes.optimise").Precision
    inputs = node.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", *ALL_ON, "memory_format", "autocast"]
    defaults = {name: spec[1]["default"] for name, spec in inputs.items() if name != "model"}
    assert node().apply(tiny.model, **defaults)[0] is tiny.model
    with caplog.at_level(logging.WARNING):
        (model,) = node().apply(tiny.model, **{**defaults, "autocast": "bf16"})
    assert model is not tiny.model
    with pytest.raises(ValueError, match="tf32 is 'maybe'; choose one of keep, on, off"):
        node().apply(tiny.model, **{**defaults, "tf32": "maybe"})

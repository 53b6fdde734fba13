"""Attention Backend: every choice the same image, errors with a remedy, and SDPA to the rescue of NaN."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from .tiny_unet import TinyUNet, build, relative

ON_CPU = ("sdpa", "sdpa_flash", "sub_quadratic", "split", "onednn", "auto")
NOT_ON_CPU = ("sdpa_mem_efficient", "sdpa_cudnn", "xformers", "flash_attn", "sage", "sage3", "kitchen_int8")
NAN_FROM_CALL = 20
LARGE = (32, 32)  # large enough for a choice to matter
OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("mini")


@pytest.fixture(scope="module")
def modules(pack: ModuleType) -> SimpleNamespace:
    names = {
        "attention": "techniques.attention.attach",
        "attention_backends": "techniques.attention.backends",
        "attention_choice": "techniques.attention.choice",
        "deepcache": "techniques.deepcache.attach",
        "dynamic_cfg": "techniques.guidance.dynamic_cfg",
        "patching": "patching.wrappers",
        "run_notes": "patching.notes",
        "errors": "common.errors",
    }
    return SimpleNamespace(**{name: importlib.import_module(f"speedlab.{path}") for name, path in names.items()})


@pytest.fixture(scope="module")
def attach(modules: SimpleNamespace) -> Callable[[Any, str], Any]:
    attention = modules.attention
    return lambda model, backend: attention.attach_attention(model, attention.AttentionConfig(backend))


@pytest.fixture(scope="module")
def exact(tiny: TinyUNet, attach: Any) -> torch.Tensor:
    return tiny.sample(attach(tiny.model, "sdpa_math"), size=(16, 16))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, modules: SimpleNamespace) -> Iterator[list[str]]:
    """The backend of each attention call."""
    made: list[str] = []
    backends = modules.attention_backends.BACKENDS

    def counted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return run(*args, **kwargs)

        return wrapped

    for name, backend in list(backends.items()):
        monkeypatch.setitem(backends, name, replace(backend, run=counted(name, backend.run)))
    yield made


def _broken(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, *, always: bool = False) -> list[int]:
    """A `sage` that runs on a CPU and gives NaN from one call on; with `always`, `sdpa` does the same."""
    count: list[int] = []
    backends = modules.attention_backends.BACKENDS
    sdpa = backends["sdpa"]

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        count.append(1)
        out = sdpa.run(*args, **kwargs)
        return out * float("nan") if len(count) >= NAN_FROM_CALL else out

    monkeypatch.setitem(backends, "sage", modules.attention_backends.Backend(run, always=True))
    if always:
        monkeypatch.setitem(backends, "sdpa", replace(sdpa, run=run))
    return count


@pytest.mark.parametrize("backend", ON_CPU)
def test_same_picture(tiny: TinyUNet, attach: Any, exact: torch.Tensor, backend: str) -> None:
    assert relative(tiny.sample(attach(tiny.model, backend), size=(16, 16)), exact) < 1e-5


@pytest.mark.parametrize("backend", [*ON_CPU[:-1], "sdpa_math"])
def test_the_chosen_backend_does_all_of_it(tiny: TinyUNet, attach: Any, calls: list[str], backend: str) -> None:
    tiny.sample(attach(tiny.model, backend), steps=2)
    assert set(calls) - {backend} <= set(), calls
    layers = sum(type(part).__name__ == "CrossAttention" for part in tiny.unet.modules())
    assert len(calls) - calls[: -2 * layers].count(backend) == 2 * layers, "probing aside"


@pytest.mark.parametrize("backend", NOT_ON_CPU)
def test_what_cannot_run_is_an_error_with_a_remedy(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, backend: str
) -> None:
    with pytest.raises(modules.errors.UnavailableError, match=f"cannot use '{backend}' here: ") as caught:
        attach(tiny.model, backend)
    assert "\n" not in str(caught.value)
    assert "Choose another backend, such as auto or sdpa." in str(caught.value)
    if backend in ("xformers", "flash_attn", "sage"):
        assert "GPU" in str(caught.value)


def test_a_missing_package_names_itself(modules: SimpleNamespace) -> None:
    backends = modules.attention_backends
    missing = backends.BACKENDS["sage"].missing(torch.device("cuda"))
    if missing is None:
        pytest.skip("sageattention is installed")
    error = str(backends.unavailable("sage", missing, torch.device("cuda"), torch.float16))
    assert "`pip install sageattention`" in error


def test_a_function_that_this_comfyui_lacks(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = modules.attention_backends
    monkeypatch.setitem(backends.BACKENDS, "split", backends._core_function("attention_of_tomorrow"))
    with pytest.raises(modules.errors.UnavailableError, match="this ComfyUI has no function attention_of_tomorrow"):
        backends.require("split", torch.device("cpu"), torch.float32, [64])


def test_a_dtype_that_a_kernel_refuses(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node may be right about the device, and the model then runs in a type that the kernel does not do."""

    def half_only(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if q.dtype == torch.float32:
            raise RuntimeError("only half")
        return q

    backends = modules.attention_backends
    monkeypatch.setitem(backends.BACKENDS, "sage", backends.Backend(half_only))
    run = modules.attention.Run("sage")
    q = torch.zeros(1, 8, 64)
    with pytest.raises(modules.errors.UnavailableError, match=r"float32.+only half.+Load the model in fp16 or bf16"):
        modules.attention._attend(run, q, q, q, 2)
    half = q.bfloat16()
    assert modules.attention._attend(run, half, half, half, 2) is half


@pytest.mark.usefixtures("unmeasured")
def test_auto_on_a_cpu(tiny: TinyUNet, attach: Any, modules: SimpleNamespace, calls: list[str], caplog: Any,
                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(modules.attention, "TABLE", modules.attention_choice.ChoiceTable())
    with caplog.at_level(logging.INFO):
        tiny.sample(attach(tiny.model, "auto"), steps=1, size=LARGE)
        assert "sub_quadratic" not in calls
        measured = caplog.text.count("auto picked")
        first = len(calls)
        tiny.sample(attach(tiny.model, "auto"), steps=1, size=LARGE)
    assert measured > 0
    assert caplog.text.count("auto picked") == measured, "the second run measures nothing"
    layers = sum(type(part).__name__ == "CrossAttention" for part in tiny.unet.modules())
    assert len(calls) - first == layers
    assert caplog.text.count("auto chose") == 2


def test_a_kept_choice_that_cannot_do_it_is_measured_anew(
    modules: SimpleNamespace, unmeasured: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user may write it into the file: oneDNN takes no mask."""
    q = torch.zeros(1, 1024, 80)
    for measured in (1, 2):
        monkeypatch.setattr(modules.attention, "TABLE", modules.attention_choice.ChoiceTable())
        with caplog.at_level(logging.INFO):
            modules.attention._attend(modules.attention.Run("auto"), q, q, q, 2, mask=torch.zeros(1024, 1024))
        assert caplog.text.count("auto picked") == measured
        (file,) = unmeasured.iterdir()
        file.write_text(re.sub('"(sdpa|split)"', '"onednn"', file.read_text()))
    assert "is measured anew" in caplog.text


@pytest.mark.usefixtures("unmeasured")
def test_auto_leaves_the_random_numbers_alone(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured with, must not come out of the generator that a sampler draws its noise from."""
    options = {"sampler": "euler_ancestral", "steps": 2, "size": LARGE}
    monkeypatch.setattr(modules.attention_choice, "pick", lambda seconds: modules.attention_choice.Choice("sdpa"))
    monkeypatch.setattr(modules.attention, "TABLE", modules.attention_choice.ChoiceTable())
    measuring = tiny.sample(attach(tiny.model, "auto"), **options)
    assert modules.attention.TABLE._choices
    assert torch.equal(measuring, tiny.sample(attach(tiny.model, "auto"), **options))
    assert torch.equal(measuring, tiny.sample(attach(tiny.model, "sdpa"), **options))


def test_inputs_and_clones_are_untouched(tiny: TinyUNet, attach: Any, calls: list[str]) -> None:
    before = tiny.sample()
    model = attach(tiny.model, "split")
    other = tiny.model.clone()
    stock_before = len(calls)
    assert torch.equal(tiny.sample(other), before)
    tiny.sample(model, steps=2)
    first = len(calls)
    assert first > stock_before
    assert torch.equal(tiny.sample(), before)
    assert len(calls) == first, "the input model does not use the backend"
    assert not any(tiny.model.wrappers.values())
    for patcher in (model, tiny.model):
        assert OVERRIDE not in patcher.model_options["transformer_options"]
        assert "speedlab_run_states" not in repr(patcher.model_options)


def test_two_nodes_on_one_model(tiny: TinyUNet, attach: Any, modules: SimpleNamespace, calls: list[str]) -> None:
    model = attach(attach(tiny.model, "sdpa_math"), "split")
    tiny.sample(model, steps=1)
    assert set(calls[-4:]) == {"split"}
    assert [note.describe() for note in modules.patching.accelerators(model)] == ["attention(backend=split)"]


@pytest.mark.parametrize("error", ["interrupt", "failure"])
def test_nothing_is_left_after_an_error(tiny: TinyUNet, attach: Any, error: str) -> None:
    import comfy.model_management
    import comfy.samplers

    raised = comfy.model_management.InterruptProcessingException if error == "interrupt" else RuntimeError

    def fail(args: dict) -> torch.Tensor:
        raise raised("stop")

    model = attach(tiny.model, "split")
    model.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(raised):
        tiny.sample(model)
    assert OVERRIDE not in repr(model.model_options)
    assert "speedlab_run_states" not in repr(model.model_options)


# NaN ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_nan_is_repeated_with_sdpa(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: Any, caplog: Any, sampler: str
) -> None:
    reference = tiny.sample(attach(tiny.model, "sdpa"), sampler=sampler)
    count = _broken(modules, monkeypatch)
    notes: list[str] = []
    model = attach(tiny.model, "sage")
    model.model_options["transformer_options"][modules.run_notes.REPORT_NOTE] = notes.append
    assert torch.equal(tiny.sample(model, sampler=sampler), reference)
    layers = sum(type(part).__name__ == "CrossAttention" for part in tiny.unet.modules())
    assert NAN_FROM_CALL <= len(count) <= NAN_FROM_CALL + layers, "sdpa for the rest of the run"
    assert caplog.text.count("NaN") == 1
    assert len(notes) == 1
    assert "repeated with sdpa" in notes[0]
    count.clear()
    assert torch.equal(tiny.sample(model, sampler=sampler), reference), "a new run tries again"
    assert len(count) >= NAN_FROM_CALL


def test_nan_that_is_not_the_backends_fault(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: Any, caplog: Any
) -> None:
    count = _broken(modules, monkeypatch, always=True)
    assert not torch.isfinite(tiny.sample(attach(tiny.model, "sage"), steps=6)).all()
    assert caplog.text.count("the cause lies elsewhere") == 1
    layers = sum(type(part).__name__ == "CrossAttention" for part in tiny.unet.modules())
    assert len(count) == (6 + 1) * layers, "one evaluation was repeated"


@pytest.mark.parametrize("first", ["attention", "deepcache"])
def test_nan_under_deepcache(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: Any, first: str
) -> None:
    """The features of the evaluation that went wrong must not come back on cached steps."""

    def cached(model: Any) -> Any:
        return modules.deepcache.attach_deepcache(model, modules.deepcache.DeepCacheConfig(interval=3))

    reference = tiny.sample(cached(attach(tiny.model, "sdpa")))
    for at in (1, NAN_FROM_CALL, 45):
        monkeypatch.setattr(sys.modules[__name__], "NAN_FROM_CALL", at)
        with monkeypatch.context() as patch:
            _broken(modules, patch)
            model = cached(attach(tiny.model, "sage")) if first == "attention" else attach(cached(tiny.model), "sage")
            assert torch.equal(tiny.sample(model), reference)


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_nan_under_core_caches(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: Any, name: str
) -> None:
    node = getattr(importlib.import_module("comfy_extras.nodes_easycache"), name)
    _broken(modules, monkeypatch)
    model = node.execute(attach(tiny.model, "sage"), 0.2, 0.15, 0.95, False).args[0]
    assert torch.isfinite(tiny.sample(model, steps=12)).all()


# Together with other nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("technique", ["deepcache", "dynamic_cfg"])
def test_order_does_not_matter(tiny: TinyUNet, attach: Any, modules: SimpleNamespace, technique: str) -> None:
    def other(model: Any) -> Any:
        if technique == "deepcache":
            return modules.deepcache.attach_deepcache(model, modules.deepcache.DeepCacheConfig(interval=2, branch=1))
        return modules.dynamic_cfg.attach_dynamic_cfg(model, modules.dynamic_cfg.DynamicCFGConfig(stop_at=0.5))

    one = tiny.sample(other(attach(tiny.model, "split")))
    assert torch.equal(tiny.sample(attach(other(tiny.model), "split")), one)
    assert relative(one, tiny.sample(other(tiny.model))) < 1e-5


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_another_nodes_override_stays_outside(tiny: TinyUNet, attach: Any, calls: list[str], first: str) -> None:
    seen: list[int] = []

    def halve(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(1)
        return function(*args, **kwargs) * 0.5

    def theirs(model: Any) -> Any:
        clone = model.clone()
        clone.model_options["transformer_options"][OVERRIDE] = halve
        return clone

    reference = tiny.sample(theirs(tiny.model))
    seen.clear()
    model = theirs(attach(tiny.model, "split")) if first == "ours" else attach(theirs(tiny.model), "split")
    assert relative(tiny.sample(model), reference) < 1e-5
    assert len(seen) == len(calls) == calls.count("split")
    assert model.model_options["transformer_options"][OVERRIDE] is halve


def test_an_override_that_leaves_no_room_is_named(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, caplog: Any
) -> None:
    def their_own_attention(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("transformer_options")
        return modules.attention_backends.core.attention_split(*args, **kwargs)

    model = attach(tiny.model, "sdpa")
    model.model_options["transformer_options"][OVERRIDE] = their_own_attention
    tiny.sample(model)
    assert caplog.text.count("had no effect") == 1
    assert "their_own_attention" in caplog.text


@pytest.mark.parametrize("backend", ["sdpa_flash", "auto"])
def test_compiled(tiny: TinyUNet, attach: Any, backend: str) -> None:
    """One graph without breaks, and none anew for the next run."""
    import comfy_api.torch_helpers
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    reference = tiny.sample(attach(tiny.model, backend), steps=2)
    compiled = tiny.model.clone()
    comfy_api.torch_helpers.set_torch_compile_wrapper(compiled, backend="eager", fullgraph=True)
    graphs = []
    try:
        for _ in range(2):
            assert relative(tiny.sample(attach(compiled, backend), steps=2), reference) < 1e-5
            graphs.append(counters["stats"]["unique_graphs"])
    finally:
        torch._dynamo.reset()
    assert graphs == [1, 1]


@pytest.mark.full
def test_nan_in_a_compiled_model(tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: Any) -> None:
    import comfy_api.torch_helpers

    backends = modules.attention_backends
    sdpa = backends.BACKENDS["sdpa"].run
    always_nan = backends.Backend(lambda *args, **options: sdpa(*args, **options) * float("nan"), always=True)
    monkeypatch.setitem(backends.BACKENDS, "sage", always_nan)
    reference = tiny.sample(attach(tiny.model, "sdpa"), steps=2)
    torch._dynamo.reset()
    compiled = tiny.model.clone()
    comfy_api.torch_helpers.set_torch_compile_wrapper(compiled, backend="eager", fullgraph=True)
    try:
        assert relative(tiny.sample(attach(compiled, "sage"), steps=2), reference) < 1e-5
    finally:
        torch._dynamo.reset()


# Calling convention ---------------------------------------------------------------------------------------------------


def _inputs(layout: str, heads: int = 2, size: int = 16) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v in a layout, and the result of SDPA [batch, heads, tokens, size]."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, n, size, generator=generator) for n in (24, 40, 40))
    flat = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    return ([q, k, v] if layout == "heads" else flat), torch.stack([q, q])  # second is replaced by the caller


def _reference(mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = _inputs("heads")[0]
    full = mask if mask is None or mask.ndim != 3 else mask.unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=full)


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("layout", ["flat", "heads"])
@pytest.mark.parametrize("masked", [None, "queries", "batch"])
@pytest.mark.parametrize("backend", [*ON_CPU[:-1], "sdpa_math"])
def test_layouts_and_masks(
    modules: SimpleNamespace, backend: str, masked: str | None, layout: str, skip_output_reshape: bool
) -> None:
    shape = {"queries": (24, 40), "batch": (2, 24, 40)}.get(masked or "")
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(4)) if shape else None
    out = modules.attention._attend(
        modules.attention.Run(backend), *_inputs(layout)[0], 2, mask,
        skip_reshape=layout == "heads", skip_output_reshape=skip_output_reshape, transformer_options={},
    )  # fmt: skip
    expected = _reference(mask)
    torch.testing.assert_close(out, expected if skip_output_reshape else expected.transpose(1, 2).flatten(2))


def test_the_plain_kernel_honours_the_upcast(modules: SimpleNamespace) -> None:
    (q, k, v), _ = _inputs("heads")
    half = [(t * 8).bfloat16() for t in (q, k, v)]
    run = modules.attention_backends.BACKENDS["sdpa_math"].run
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.float() for t in half))
    upcast = run(*half, 2, attn_precision=torch.float32, skip_reshape=True, skip_output_reshape=True)
    assert upcast.dtype == torch.bfloat16
    assert torch.equal(upcast, exact.bfloat16())


def _stand_in(module: str, layout: str) -> ModuleType:
    """The package's function with SDPA inside, in the layout that its documentation gives."""

    def tokens_heads(q: Any, k: Any, v: Any, softmax_scale: float | None = None) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)

    def heads_tokens(q: Any, k: Any, v: Any, tensor_layout: str, is_causal: bool, sm_scale: Any) -> torch.Tensor:
        assert tensor_layout == "HND"
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    found = ModuleType(module)
    found.flash_attn_func = tokens_heads
    found.sageattn = heads_tokens
    return found


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("layout", ["flat", "heads"])
@pytest.mark.parametrize(("backend", "module"), [("flash_attn", "flash_attn"), ("sage", "sageattention")])
def test_package_adapters(
    modules: SimpleNamespace, monkeypatch: Any, backend: str, module: str, layout: str, skip_output_reshape: bool
) -> None:
    monkeypatch.setitem(sys.modules, module, _stand_in(module, layout))
    found = modules.attention_backends.BACKENDS[backend]
    monkeypatch.setitem(
        modules.attention_backends.BACKENDS, backend, replace(found, missing=lambda device: None, run=found.run)
    )
    run = modules.attention.Run(backend)
    call = {"skip_reshape": layout == "heads", "skip_output_reshape": skip_output_reshape}
    out = modules.attention._attend(run, *_inputs(layout)[0], 2, **call)
    expected = _reference(None)
    torch.testing.assert_close(out, expected if skip_output_reshape else expected.transpose(1, 2).flatten(2))
    assert not run.set_aside
    mask = torch.zeros(24, 40)
    modules.attention._attend(run, *_inputs(layout)[0], 2, mask, **call)
    assert list(run.set_aside) == ["it takes no attention mask"], "and sdpa takes its place, which is told"


def test_sage_3_is_called_as_its_package_asks(modules: SimpleNamespace, monkeypatch: Any) -> None:
    found = ModuleType("sageattn3")

    def blackwell(q: Any, k: Any, v: Any, is_causal: bool) -> torch.Tensor:
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and not is_causal
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    found.sageattn3_blackwell = blackwell
    monkeypatch.setitem(sys.modules, "sageattn3", found)
    (q, k, v), _ = _inputs("flat")
    run = modules.attention_backends.BACKENDS["sage3"].run
    out = run(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2)
    torch.testing.assert_close(out.float(), _reference(None).transpose(1, 2).flatten(2), atol=2e-2, rtol=2e-2)
    for wrong in ({"mask": torch.zeros(24, 40)}, {"scale": 0.1}):
        with pytest.raises(RuntimeError, match="sage 3 takes"):
            run(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2, **wrong)


@pytest.mark.parametrize("backend", ["sage", "sage3", "kitchen_int8"])
def test_layers_that_need_the_models_precision_get_it(modules: SimpleNamespace, monkeypatch: Any, backend: str) -> None:
    def wrong(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(q)

    backends = modules.attention_backends.BACKENDS
    monkeypatch.setitem(backends, backend, replace(backends[backend], run=wrong, missing=lambda device: None))
    run, inputs = modules.attention.Run(backend), _inputs("flat")[0]
    assert not modules.attention._attend(run, *inputs, 2, low_precision_attention=True).any()
    out = modules.attention._attend(run, *inputs, 2, low_precision_attention=False)
    torch.testing.assert_close(out, _reference(None).transpose(1, 2).flatten(2))
    assert list(run.set_aside) == ["ComfyUI asks for the model's own precision there"]


def test_what_other_packs_register_can_be_chosen(
    tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: Any, node: Any
) -> None:
    core = importlib.import_module("comfy.ldm.modules.attention")
    made: list[int] = []

    def theirs(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(1)
        return core.attention_pytorch(*args, **kwargs)

    monkeypatch.setattr(core, "REGISTERED_ATTENTION_FUNCTIONS", {"pytorch": core.attention_pytorch, "theirs": theirs})
    monkeypatch.setattr(modules.attention_backends, "BACKENDS", dict(modules.attention_backends.BACKENDS))
    monkeypatch.setattr(modules.attention, "BACKENDS", modules.attention_backends.BACKENDS)
    listed = node("SpeedLabAttention").INPUT_TYPES()["required"]["backend"][0]
    assert listed[0] == "auto" and listed[-1] == "theirs" and "pytorch" not in listed
    expected = tiny.sample(attach(tiny.model, "sdpa"), steps=2)
    assert torch.equal(tiny.sample(attach(tiny.model, "theirs"), steps=2), expected)
    assert made


class Preference(torch.nn.Module):
    """What ComfyUI 0.38 keeps beside layers whose checkpoint names an attention (its ComfyAttention)."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.config, self.function = {"attention": "comfy_kitchen_int8"}, function


def test_a_checkpoints_own_attention_stays_under_auto_and_both_ways_are_told(
    attach: Any, calls: list[str], caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    tiny = build("sd15")
    tiny.unet.preferred = Preference(lambda *args, **kwargs: None)
    plain = tiny.sample(steps=1, size=LARGE)
    assert torch.equal(tiny.sample(attach(tiny.model, "auto"), steps=1, size=LARGE), plain)
    assert not calls
    assert "auto leaves attention to ComfyUI, for this checkpoint asks for comfy_kitchen_int8" in caplog.text
    tiny.sample(attach(tiny.model, "split"), steps=1, size=LARGE)
    assert "split takes the place of comfy_kitchen_int8" in caplog.text
    calls.clear()
    tiny.unet.preferred = Preference(None)  # which this ComfyUI does not have
    tiny.sample(attach(tiny.model, "auto"), steps=1, size=LARGE)
    assert calls


def test_a_head_size_that_one_layer_has(tiny: TinyUNet, attach: Any, modules: SimpleNamespace, monkeypatch: Any,
                                        caplog: Any) -> None:  # fmt: skip
    """SD 1.5's innermost heads are too large for sage: SDPA does those, and the log says so once."""
    backends = modules.attention_backends
    sdpa = backends.BACKENDS["sdpa"].run

    def small_heads(q: torch.Tensor, k: Any, v: Any, heads: int, **options: Any) -> torch.Tensor:
        if (q.shape[-1] if options["skip_reshape"] else q.shape[-1] // heads) == 8:
            raise ValueError("unsupported head size")
        return sdpa(q, k, v, heads, **options)

    sizes = {part.dim_head for part in tiny.unet.modules() if hasattr(part, "dim_head")}
    assert 8 in sizes and len(sizes) > 1, sizes
    reference = tiny.sample(attach(tiny.model, "sdpa"))
    monkeypatch.setitem(backends.BACKENDS, "sage", backends.Backend(small_heads))
    assert torch.equal(tiny.sample(attach(tiny.model, "sage")), reference)
    assert caplog.text.count("in place of sage") == 1
    assert "head size 8" in caplog.text


# Node -----------------------------------------------------------------------------------------------------------------


def test_auto_under_a_tracer_is_sdpa(modules: SimpleNamespace, calls: list[str]) -> None:
    """A trace is used at other sizes than it was made with, so nothing that depends on one may go into it."""
    run = modules.attention.Run("auto", None)
    q = torch.randn(1, 1100, 16)
    traced = torch.jit.trace(lambda q: modules.attention._attend(run, q, q, q, 2), (q,), check_trace=False)
    assert set(calls) == {"sdpa"}
    other = torch.randn(1, 40, 16)
    assert relative(traced(other), modules.attention_backends.BACKENDS["sdpa"].run(other, other, other, 2)) < 1e-6


def test_node(tiny: TinyUNet, pack: ModuleType, attach: Any, modules: SimpleNamespace) -> None:
    node = importlib.import_module(f"{pack.__name__}.nodes.optimise").AttentionBackend
    inputs = node.INPUT_TYPES()["required"]
    assert inputs["backend"][0] == [
        "auto", "sdpa", "sdpa_flash", "sdpa_mem_efficient", "sdpa_cudnn", "sdpa_math", "sub_quadratic", "split",
        "xformers", "flash_attn", "sage", "onednn", "sage3", "kitchen_int8",
    ]  # fmt: skip
    assert inputs["backend"][1]["default"] == "auto"
    (model,) = node().apply(tiny.model, "split")
    assert torch.equal(tiny.sample(model), tiny.sample(attach(tiny.model, "split")))
    with pytest.raises(ValueError, match="choose one of auto, sdpa"):
        node().apply(tiny.model, "other")

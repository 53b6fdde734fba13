"""Techniques beside programs of the whole network: DeepCache's two programs, and row counts of Dynamic CFG."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import tiny_unet
from .test_composition import _control, _core_node
from .tiny_unet import TinyUNet, relative

SIZE, STEPS = (16, 16), 7
# Dynamo exports for long, so that ONNX Runtime is left to `--all`.
ON_CPU = ("jit_trace", "openvino", pytest.param("onnxruntime", marks=pytest.mark.full))


@pytest.fixture(scope="module")
def unet(comfy: Any) -> TinyUNet:
    with torch.inference_mode():
        return tiny_unet.build("slim")


@pytest.fixture(scope="module")
def deep(comfy: Any) -> TinyUNet:
    """Three levels: features of a deeper branch are smaller than the latent."""
    with torch.inference_mode():
        return tiny_unet.build("deep")


@pytest.fixture(scope="module")
def compiled(engine: Any) -> Callable[..., Any]:
    attach = engine("techniques.compile.attach")
    return lambda model, backend, **more: attach.attach_compile(model, attach.CompileConfig(backend, **more))


@pytest.fixture(scope="module")
def cached(engine: Any) -> Callable[..., Any]:
    attach = engine("techniques.deepcache.attach")
    return lambda model, **options: attach.attach_deepcache(model, attach.DeepCacheConfig(**options))


@pytest.fixture(scope="module")
def guided(engine: Any) -> Callable[..., Any]:
    attach = engine("techniques.guidance.dynamic_cfg")
    return lambda model, **options: attach.attach_dynamic_cfg(model, attach.DynamicCFGConfig(**options))


def told(model: Any) -> tuple[Any, list[Any]]:
    """A clone, and what a profiler would hear of it: rows and evaluations that were spared."""
    clone, heard = model.clone(), []
    options = clone.model_options.setdefault("transformer_options", {})
    options["speedlab_report_saved"] = lambda *what: heard.append(what)
    options["speedlab_report_cached"] = lambda: heard.append("cached")
    return clone, heard


@pytest.mark.parametrize("backend", ON_CPU)
def test_deepcache_runs_as_two_programs(
    unet: TinyUNet, compiled: Any, cached: Any, guided: Any, engine: Any, backend: str, caplog: Any
) -> None:
    """Image and counts of eager DeepCache, with two rows and with one, in both orders of the nodes."""
    caplog.set_level("INFO")
    engine("techniques.compile.program")._programs.clear()
    options = {"interval": 3, "branch": 1, "start": 0.2}
    eager, wanted = told(guided(cached(unet.model, **options), stop_at=0.5))
    expected = unet.sample(eager, steps=STEPS, size=SIZE)
    assert relative(expected, unet.sample(guided(unet.model, stop_at=0.5), steps=STEPS, size=SIZE)) > 1e-3
    for model in (
        compiled(guided(cached(unet.model, **options), stop_at=0.5), backend),
        guided(cached(compiled(unet.model, backend), **options), stop_at=0.5),
    ):
        model, heard = told(model)
        assert relative(unet.sample(model, steps=STEPS, size=SIZE), expected) < 1e-4
        assert heard == wanted and "cached" in heard
    fixed = engine("techniques.compile.backends").load(backend).FIXED_SHAPES
    rows = 2 if fixed else 1
    for words in ("compiles the network", "compiles the outer blocks of cached steps"):
        assert caplog.text.count(words) == rows, words
    with unet.counted() as calls:
        again = unet.sample(model, steps=STEPS, size=SIZE)
    assert calls == [], "no block ran outside of the programs"
    assert relative(again, expected) < 1e-4
    assert not any({"forward", "_forward"} & vars(part).keys() for part in unet.unet.modules())


@pytest.mark.parametrize(
    "backend, branch",
    [
        ("jit_trace", 2), ("openvino", 2),
        *(pytest.param(name, 5, marks=pytest.mark.full) for name in ("jit_trace", "openvino", "onnxruntime")),
    ],
)  # fmt: skip
def test_features_of_deeper_blocks_at_any_size(
    deep: TinyUNet, compiled: Any, cached: Any, backend: str, branch: int
) -> None:
    for size in ((16, 16), (12, 20)):
        eager = deep.sample(cached(deep.model, branch=branch), steps=4, size=size)
        model = cached(compiled(deep.model, backend), branch=branch)
        assert relative(deep.sample(model, steps=4, size=size), eager) < 1e-4


def test_a_run_without_deepcache_takes_the_program_of_full_steps(
    unet: TinyUNet, compiled: Any, cached: Any, engine: Any, caplog: Any
) -> None:
    """What is measured in turn, with and without DeepCache, is not compiled each time, and equal to the bit."""
    caplog.set_level("INFO")
    engine("techniques.compile.program")._programs.clear()
    plain = compiled(unet.model, "openvino")
    before = unet.sample(plain, steps=2, size=SIZE)
    unet.sample(cached(plain), steps=2, size=SIZE)
    caplog.clear()
    assert torch.equal(unet.sample(plain, steps=2, size=SIZE), before)
    assert "compile" not in caplog.text


def test_adaptive_steps_and_lines_are_those_of_eager(unet: TinyUNet, compiled: Any, cached: Any) -> None:
    options = {"interval": 3, "branch": 1, "schedule": "adaptive", "features": "extrapolate", "tolerance": 0.3}
    eager, wanted = told(cached(unet.model, **options))
    expected = unet.sample(eager, steps=10, size=SIZE)
    model, heard = told(cached(compiled(unet.model, "jit_trace"), **options))
    assert relative(unet.sample(model, steps=10, size=SIZE), expected) < 1e-4
    assert heard == wanted and "cached" in heard


def test_sdxls_pooled_text_and_features_beside_it(comfy: Any, compiled: Any, cached: Any) -> None:
    with torch.inference_mode():
        unet = tiny_unet.build("sdxl")
    eager = unet.sample(cached(unet.model, branch=3), steps=3, size=SIZE)
    model = cached(compiled(unet.model, "openvino"), branch=3)
    assert relative(unet.sample(model, steps=3, size=SIZE), eager) < 1e-4


def test_a_backend_of_one_program_names_deepcache(
    unet: TinyUNet, compiled: Any, cached: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of stable_fast, which does not run here; what it lacks is asked of the code that a run asks."""
    monkeypatch.setattr(engine("techniques.compile.backends.stable_fast"), "available", lambda: (True, ""))
    model = cached(compiled(unet.model, "stable_fast"))
    with pytest.raises(engine("common.errors").UnavailableError, match=r"DeepCache.*stable_fast.*openvino"):
        unet.sample(model, steps=2, size=SIZE)


@pytest.mark.parametrize("interval", [None, 3])
def test_a_fallback_to_eager_goes_on_with_deepcache(
    unet: TinyUNet, compiled: Any, cached: Any, interval: int | None, caplog: Any
) -> None:
    def halve(q: Any, k: Any, v: Any, extra: dict) -> Any:
        return q, k * 0.5, v

    def stack(model: Any) -> Any:
        clone = model if interval is None else cached(model, interval=interval)
        clone = clone.clone()
        clone.set_model_attn2_patch(halve)
        return clone

    expected = unet.sample(stack(unet.model), steps=4, size=SIZE)
    model = stack(compiled(unet.model, "jit_trace", on_failure="eager"))
    assert torch.equal(unet.sample(model, steps=4, size=SIZE), expected)
    assert "went on uncompiled" in caplog.text


@pytest.fixture(scope="module")
def controlled(unet: TinyUNet) -> Callable[..., list]:
    with torch.inference_mode():
        return _control(unet, (0.0, 0.5))


@pytest.mark.parametrize(
    "backend, with_cache",
    [
        ("jit_trace", False), ("jit_trace", True), ("openvino", False), ("openvino", True),
        pytest.param("onnxruntime", True, marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_controlnets_residuals_are_inputs(
    unet: TinyUNet,
    compiled: Any,
    cached: Any,
    controlled: Any,
    engine: Any,
    backend: str,
    with_cache: bool,
    caplog: Any,
) -> None:
    """For the first half of the run; then, and for a negative prompt without it, the same program takes zeros."""
    caplog.set_level("INFO")
    engine("techniques.compile.program")._programs.clear()

    def stack(model: Any) -> Any:
        return cached(model, interval=2, branch=1) if with_cache else model

    for negative in (controlled(unet.cond(2)), unet.cond(2)):
        conds = {"positive": controlled(unet.cond(1)), "negative": negative}
        expected = unet.sample(stack(unet.model), steps=4, size=SIZE, **conds)
        assert relative(expected, unet.sample(stack(unet.model), steps=4, size=SIZE)) > 1e-3
        model = compiled(stack(unet.model), backend)
        assert relative(unet.sample(model, steps=4, size=SIZE, **conds), expected) < 1e-4
    rows = 2 if backend == "jit_trace" else 1
    assert caplog.text.count("compiles the network") == rows


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("name", ["FreeU", "FreeU_V2"])
def test_freeu_is_traced(unet: TinyUNet, compiled: Any, cached: Any, name: str, with_cache: bool) -> None:
    """With each of its settings: another one is another program."""
    pictures = []
    for scales in ((1.3, 1.4, 0.9, 0.2), (1.1, 1.2, 0.9, 0.4)):
        model = _core_node("nodes_freelunch", name, *scales)(unet.model)
        model = cached(model, interval=2, branch=1) if with_cache else model
        pictures.append(unet.sample(model, steps=3, size=SIZE))
        assert relative(unet.sample(compiled(model, "jit_trace"), steps=3, size=SIZE), pictures[-1]) < 1e-4
    assert relative(*pictures) > 1e-3


@pytest.mark.parametrize(("with_freeu", "with_cache"), [(False, False), (True, True)])
def test_perturbed_attention_is_traced(
    unet: TinyUNet, compiled: Any, cached: Any, engine: Any, with_freeu: bool, with_cache: bool, caplog: Any
) -> None:
    """Its evaluation is a program of its own beside that of CFG's, and found again."""
    caplog.set_level("INFO")
    engine("techniques.compile.program")._programs.clear()
    model = _core_node("nodes_pag", "PerturbedAttentionGuidance", 3.0)(unet.model)
    model = _core_node("nodes_freelunch", "FreeU", 1.3, 1.4, 0.9, 0.2)(model) if with_freeu else model
    model = cached(model, interval=2, branch=1) if with_cache else model
    expected = unet.sample(model, steps=4, size=SIZE)
    assert relative(expected, unet.sample(steps=4, size=SIZE)) > 1e-3
    traced = compiled(model, "jit_trace")
    assert relative(unet.sample(traced, steps=4, size=SIZE), expected) < 1e-4
    assert caplog.text.count("compiles the network") == 2
    with unet.counted() as calls:
        unet.sample(traced, steps=2, size=SIZE)
    assert calls == [], "no block ran outside of the programs"
    # A run without it takes none of its programs.
    plain = cached(unet.model, interval=2, branch=1) if with_cache else unet.model
    expected = unet.sample(plain, steps=4, size=SIZE)
    assert relative(unet.sample(compiled(plain, "jit_trace"), steps=4, size=SIZE), expected) < 1e-4


@pytest.mark.parametrize(
    "module, name, settings",
    [
        ("nodes_freelunch", "FreeU", (1.3, 1.4, 0.9, 0.2)), ("nodes_pag", "PerturbedAttentionGuidance", (3.0,)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_patches_are_refused_where_they_are_not_traced(
    unet: TinyUNet, compiled: Any, engine: Any, backend: str, module: str, name: str, settings: Any
) -> None:
    model = _core_node(module, name, *settings)(unet.model)
    with pytest.raises(engine("common.errors").SpeedLabError, match=rf"{backend}.*{name}"):
        unet.sample(compiled(model, backend), steps=1, size=SIZE)


@pytest.mark.parametrize("backend", ON_CPU)
def test_forecast_and_reused_uncond_act_around_programs(
    unet: TinyUNet, compiled: Any, guided: Any, engine: Any, backend: str
) -> None:
    forecast = engine("techniques.forecast.attach")

    def stack(model: Any) -> Any:
        model = forecast.attach_forecast(model, forecast.ForecastConfig(mode="fixed"))
        return guided(model, stop_at=0.75, uncond_interval=2)

    eager, wanted = told(stack(unet.model))
    expected = unet.sample(eager, steps=12, size=SIZE)
    model, heard = told(stack(compiled(unet.model, backend)))
    assert relative(unet.sample(model, steps=12, size=SIZE), expected) < 1e-4
    assert heard == wanted and "cached" in heard

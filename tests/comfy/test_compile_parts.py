"""Techniques beside programs of the whole network: DeepCache's two programs, and row counts of Dynamic CFG."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import tiny_unet
from .tiny_unet import TinyUNet, relative

SIZE, STEPS = (16, 16), 7
# Dynamo exports for long, so that ONNX Runtime is left to `--all`.
ON_CPU = ("jit_trace", "openvino", pytest.param("onnxruntime", marks=pytest.mark.full))


@pytest.fixture(scope="module")
def unet(comfy: Any) -> TinyUNet:
    with torch.inference_mode():
        return tiny_unet.build("mini")


@pytest.fixture(scope="module")
def deep(comfy: Any) -> TinyUNet:
    """SD 1.5's block structure: features of a deeper branch are smaller than the latent."""
    with torch.inference_mode():
        return tiny_unet.build("sd15")


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


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("branch", [4, pytest.param(11, marks=pytest.mark.full)])
def test_features_of_deeper_blocks_at_any_size(
    deep: TinyUNet, compiled: Any, cached: Any, backend: str, branch: int
) -> None:
    for size in ((16, 16), (12, 20)):
        eager = deep.sample(cached(deep.model, branch=branch), steps=4, size=size)
        model = cached(compiled(deep.model, backend), branch=branch)
        assert relative(deep.sample(model, steps=4, size=size), eager) < 1e-4

"""Forecast: exact counts, the latent of an independent implementation, and a step aside wherever it has no ground."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from .forecast_oracle import Plain, published_plan, with_forecasts
from .tiny_unet import TinyUNet, build, relative

SAME = 2e-5
STEPS = 12


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("mini")


@pytest.fixture(scope="module")
def attach(pack: ModuleType) -> Callable[..., Any]:
    module = importlib.import_module("speedlab.techniques.forecast.attach")
    return lambda model, mode="fixed", **options: module.attach_forecast(
        model, module.ForecastConfig(mode=mode, **options)
    )


@pytest.fixture(scope="module")
def dynamic_cfg(pack: ModuleType) -> Callable[..., Any]:
    module = importlib.import_module("speedlab.techniques.guidance.dynamic_cfg")
    return lambda model, **options: module.attach_dynamic_cfg(model, module.DynamicCFGConfig(**options))


@pytest.fixture(scope="module")
def run(tiny: TinyUNet, pack: ModuleType) -> Callable[..., Any]:
    """A run as the profiler sees it: the kinds of its steps, its rows, what it said, and the latent."""
    import comfy.samplers

    trace, nvtx, clock, summary = (
        importlib.import_module(f"speedlab.measure.{name}") for name in ("trace", "nvtx", "clock", "summary")
    )

    def sample(
        model: Any, sigmas: Any = None, sampler: Any = "euler", cfg: float = 5.0, steps: int = STEPS,
        scheduler: str = "karras", guider: Any = None, conds: tuple | None = None,
    ) -> Any:  # fmt: skip
        seen = trace.SamplingTrace(clock.clock_for(model.load_device), nvtx.emitter(False))
        watched = trace.traced(model, seen)
        if guider is None:
            guider = comfy.samplers.CFGGuider(watched)
            guider.set_conds(*(conds or (tiny.cond(1), tiny.cond(2))))
            guider.set_cfg(cfg)
        else:
            guider = guider(watched)
        if sigmas is None:
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            made = guider.sample(latent, torch.zeros_like(latent), sampler, sigmas, disable_pbar=True, seed=0)
        rows = trace.part_rows(seen)
        kinds = summary.step_kinds(rows)
        return Ran([n for n, kind in enumerate(kinds) if kind == "forecast"], kinds, rows, seen, made)

    return sample


class Ran:
    def __init__(self, forecast: list[int], kinds: list, rows: Any, seen: Any, latent: torch.Tensor) -> None:
        self.forecast, self.kinds, self.rows, self.latent = forecast, kinds, rows, latent
        self.notes, self.ran = seen.notes, seen.ran
        self.evaluations = sum(row.evals for row in rows if row.cond_rows)
        self.model_rows = sum(row.cond_rows + row.uncond_rows for row in rows)


@pytest.mark.parametrize("steps", [10, 12, 15, 20, 25, 30, 50])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_full_steps(tiny: TinyUNet, attach: Any, run: Any, steps: int, sampler: str) -> None:
    made = run(attach(tiny.model), steps=steps, sampler=sampler)
    full = {10: 8, 12: 8, 15: 9, 20: 11, 25: 13, 30: 14, 50: 21}[steps]
    assert made.kinds.count("full") == full and made.kinds.count("forecast") == steps - full
    assert set(made.forecast) == published_plan(steps)
    assert [row.cached for row in made.rows] == [step in made.forecast for step in range(steps)]
    assert made.model_rows == 2 * full
    assert not made.notes and not made.ran


@pytest.mark.parametrize(("steps", "evaluations"), [(20, 21), (30, 27)])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "dpm_2"])
def test_samplers_that_evaluate_twice(
    tiny: TinyUNet, attach: Any, run: Any, sampler: str, steps: int, evaluations: int
) -> None:
    made = run(attach(tiny.model), steps=steps, sampler=sampler)
    assert made.evaluations == evaluations and sum(row.evals for row in made.rows) == 2 * steps - 1
    assert set(made.forecast) == published_plan(steps) and not made.notes


@pytest.mark.parametrize(("steps", "rows"), [(20, 19), (30, 24)])
@pytest.mark.parametrize("order", ["first", "last"])
def test_rows_with_dynamic_cfg(
    tiny: TinyUNet, attach: Any, dynamic_cfg: Any, run: Any, order: str, steps: int, rows: int
) -> None:
    model = dynamic_cfg(attach(tiny.model)) if order == "first" else attach(dynamic_cfg(tiny.model))
    made = run(model, steps=steps)
    assert made.model_rows == rows and set(made.forecast) == published_plan(steps)
    assert run(dynamic_cfg(tiny.model), steps=steps).model_rows == steps + int(0.75 * steps)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_nine_steps_and_fewer_are_stock_and_the_record_says_so(
    tiny: TinyUNet, attach: Any, run: Any, mode: str, steps: int
) -> None:
    made = run(attach(tiny.model, mode), steps=steps)
    assert torch.equal(made.latent, run(tiny.model, steps=steps).latent)
    assert made.notes == [
        "Forecast: no step of this run was forecast, because it does nothing in runs of fewer than 10 steps, and this "
        f"one has {steps}."
    ]
    assert made.ran == {"forecast": None}


def test_off_is_the_same_object(tiny: TinyUNet, attach: Any) -> None:
    assert attach(tiny.model, max_skip=0) is tiny.model
    assert attach(tiny.model, "adaptive", tolerance=0.0) is tiny.model
    assert attach(tiny.model, start=0.7, end=0.7) is tiny.model


@pytest.mark.parametrize(
    "options", [{"start": 0.9}, {"end": 0.1}, {"mode": "adaptive", "tolerance": 1e-9}], ids=["late", "early", "exact"]
)
def test_a_run_without_a_forecast_is_bit_identical(tiny: TinyUNet, attach: Any, run: Any, options: dict) -> None:
    made = run(attach(tiny.model, **options))
    assert torch.equal(made.latent, run(tiny.model).latent)
    assert len(made.notes) == 1 and "no step of this run was forecast, because" in made.notes[0]
    assert made.ran == {"forecast": None}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "heunpp2", "euler_ancestral", "lcm"])
def test_latent(tiny: TinyUNet, attach: Any, sampler: str) -> None:
    """Against plain loops over the same formulas, in which every evaluation is made."""
    how = {"steps": 20, "sampler": sampler, "batch": 2, "scheduler": "karras"}
    plain = Plain(published_plan(20))
    reference = tiny.sample(with_forecasts(tiny.model, plain), **how)
    ours = tiny.sample(attach(tiny.model), **how)
    assert relative(ours, reference) < SAME
    assert relative(ours, tiny.sample(**how)) > 1e-4


def test_input_model_is_untouched(tiny: TinyUNet, attach: Any) -> None:
    before = tiny.sample(steps=STEPS)
    tiny.sample(attach(tiny.model), steps=STEPS)
    assert not any(tiny.model.wrappers.values())
    assert "speedlab" not in repr(tiny.model.model_options)
    assert torch.equal(tiny.sample(steps=STEPS), before)

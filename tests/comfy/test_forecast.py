"""Forecast: exact counts, the latent of an independent implementation, and a step aside wherever it has no ground."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from . import mixture
from .forecast_oracle import Plain, published_plan, with_forecasts
from .test_composition import _control
from .test_deepcache_models import _flux as another_network
from .test_schedule_places import restarting
from .tiny_unet import TinyUNet, build, fill, relative

SAME = 2e-5
STEPS = 12


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("slim")


@pytest.fixture(scope="module")
def mixed(comfy: ModuleType) -> mixture.Oracle:
    return mixture.build()


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


@pytest.mark.parametrize(
    "sampler",
    ["euler", "heun", "dpmpp_2m", "euler_ancestral", "lcm", "euler_cfg_pp",
     *(pytest.param(name, marks=pytest.mark.full) for name in ("dpmpp_sde", "heunpp2"))],
)  # fmt: skip
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


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "dpmpp_sde", "euler_ancestral"])
@pytest.mark.parametrize("batch", [1, 2])
def test_adaptive_latent(mixed: mixture.Oracle, attach: Any, sampler: str, batch: int) -> None:
    """The same steps and the same latent as plain loops with the same formulas, on a model whose answers are smooth."""
    how = {"steps": 20, "sampler": sampler, "batch": batch, "scheduler": "normal"}
    plain = Plain(None, 0.05, cfg=7.0)
    reference = mixed.sample(with_forecasts(mixed.model, plain), **how)
    mixed.denoiser.calls = 0
    ours = mixed.sample(attach(mixed.model, "adaptive", tolerance=0.05), **how)
    evaluations = [2 if sampler in ("heun", "dpmpp_sde") and step > 0 else 1 for step in range(20)]
    if sampler == "dpmpp_sde":
        evaluations = [*evaluations[1:], 1]
    full = sum(number for step, number in enumerate(evaluations) if step not in plain.left_out)
    assert mixed.denoiser.calls == 2 * batch * full
    assert plain.left_out or sampler in ("dpmpp_sde", "euler_ancestral")
    assert mixture.error(ours, reference) < SAME


def test_tolerance_and_max_skip(mixed: mixture.Oracle, attach: Any) -> None:
    """The more is allowed, the more is left out, and never more in a row than max_skip."""

    def left_out(**options: Any) -> list[bool]:
        calls = [0]
        model = attach(mixed.model, "adaptive", **options)
        model.set_model_sampler_post_cfg_function(lambda args: calls.append(mixed.denoiser.calls) or args["denoised"])
        mixed.denoiser.calls = 0
        mixed.sample(model, steps=30, scheduler="normal")
        return [now == before for before, now in itertools.pairwise(calls)]

    counts = [sum(left_out(tolerance=tolerance)) for tolerance in (0.001, 0.01, 0.02, 0.1, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    for most in (1, 2, 3, 6):
        steps = left_out(tolerance=1.0, max_skip=most)
        runs = [len(list(group)) for is_left_out, group in itertools.groupby(steps) if is_left_out]
        assert max(runs) == most and not any(steps[:4] + steps[-2:])


REGIONS: dict[str, Callable[[TinyUNet], dict]] = {
    "two conds": lambda tiny: {"positive": [*tiny.cond(1), *tiny.cond(3)]},
    "areas": lambda tiny: {
        "positive": [
            *[[tensor, {**extra, "area": (8, 4, 0, 0), "strength": 1.0}] for tensor, extra in tiny.cond(1)],
            *[[tensor, {**extra, "area": (8, 4, 0, 4), "strength": 0.7}] for tensor, extra in tiny.cond(3)],
        ]
    },
    "mask": lambda tiny: {
        "positive": [
            *[[tensor, {**extra, "mask": torch.rand(1, 8, 8)}] for tensor, extra in tiny.cond(1)],
            *tiny.cond(3),
        ]
    },
    "inpainting": lambda tiny: {"latent": torch.ones(1, 4, 8, 8), "noise_mask": torch.eye(8)[None, None]},
    "no guidance": lambda tiny: {"cfg": 1.0},
    "image to image": lambda tiny: {"latent": torch.ones(1, 4, 8, 8), "denoise": 0.5},
}


@pytest.mark.parametrize("name", REGIONS)
def test_prompts_regions_and_masks(tiny: TinyUNet, attach: Any, name: str) -> None:
    how = {"steps": STEPS, **REGIONS[name](tiny)}
    plain = Plain(published_plan(STEPS))
    reference = tiny.sample(with_forecasts(tiny.model, plain), **how)
    with tiny.counted() as calls:
        ours = tiny.sample(attach(tiny.model), **how)
    with tiny.counted() as stock_calls:
        stock = tiny.sample(**how)
    assert relative(ours, reference) < SAME and relative(ours, stock) > 1e-5
    assert len(calls) * STEPS == len(stock_calls) * (STEPS - len(published_plan(STEPS)))


@pytest.mark.parametrize(
    ("options", "forecast"),
    [
        ({"denoise": 0.5}, published_plan(20)),
        ({"start_step": 8}, published_plan(12)),
        ({"last_step": 12}, published_plan(12)),
        ({"start_step": 11}, set()),
    ],
)
def test_partial_runs(tiny: TinyUNet, attach: Any, options: dict, forecast: set[int]) -> None:
    """The first four and last two steps are those of the run."""
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model), steps=20, latent=torch.ones(1, 4, 8, 8), **options)
    with tiny.counted() as stock:
        tiny.sample(steps=20, latent=torch.ones(1, 4, 8, 8), **options)
    assert len(calls) == len(stock) - len(forecast)


def test_a_window_counts_the_whole_schedule(tiny: TinyUNet, attach: Any) -> None:
    """Of image to image at denoise 0.5 the first half of the schedule never runs."""
    latent = torch.ones(1, 4, 8, 8)
    for options, count in (({"end": 0.5}, 20), ({"start": 0.5}, 11), ({"start": 0.75}, 15)):
        with tiny.counted() as calls:
            tiny.sample(attach(tiny.model, **options), steps=20, latent=latent, denoise=0.5)
        assert len(calls) == count


def _first_active(tiny: TinyUNet, steps: int, percent: float) -> int:
    import comfy.samplers

    sampling = tiny.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "karras", steps)
    return next(n for n, sigma in enumerate(sigmas) if sigma <= sampling.percent_to_sigma(percent))


def test_a_prompt_that_begins_late(tiny: TinyUNet, attach: Any, run: Any) -> None:
    """The step where it begins is evaluated, and the next one: there are not two predictions with it before."""
    late = [[tensor, {**extra, "start_percent": 0.4, "end_percent": 1.0}] for tensor, extra in tiny.cond(3)]
    made = run(attach(tiny.model), steps=20, conds=([*tiny.cond(1), *late], tiny.cond(2)))
    begins = _first_active(tiny, 20, 0.4)
    assert 5 < begins < 16
    assert published_plan(20) - set(made.forecast) == {begins, begins + 1} & published_plan(20)
    assert made.forecast and len(made.notes) == 1 and "that act change during this run" in made.notes[0]


def test_control_net_is_left_out_too_and_its_window_ends_forecasts(tiny: TinyUNet, attach: Any, run: Any) -> None:
    controlled = _control(tiny, (0.0, 0.4))(tiny.cond(1))
    network = controlled[0][1]["control"].control_model
    evaluated: list[int] = []
    handle = network.register_forward_pre_hook(lambda *_: evaluated.append(1))
    try:
        made = run(attach(tiny.model), steps=20, conds=(controlled, tiny.cond(2)))
    finally:
        handle.remove()
    ends = _first_active(tiny, 20, 0.4)
    assert published_plan(20) - set(made.forecast) == {ends, ends + 1} & published_plan(20)
    assert len(evaluated) == ends - len([step for step in made.forecast if step < ends])
    assert len(made.notes) == 1 and "that act change during this run" in made.notes[0]


def _hooked(tiny: TinyUNet, *strengths: float) -> list:
    import comfy.hooks

    state = {}
    for name, weight in tiny.unet.state_dict().items():
        if name.endswith("attn2.to_v.weight"):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            state[f"{key}.lora_up.weight"] = torch.ones(weight.shape[0], 2)
            state[f"{key}.lora_down.weight"] = torch.ones(2, weight.shape[1]) * 0.02
    hooks = comfy.hooks.create_hook_lora(state, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for number, strength in enumerate(strengths):
        frames.add(comfy.hooks.HookKeyframe(strength, start_percent=number / len(strengths)))
    hooks.set_keyframes_on_hooks(frames)
    return comfy.hooks.set_hooks_for_conditioning(tiny.cond(1), hooks)


def test_hooks(tiny: TinyUNet, attach: Any, run: Any) -> None:
    """A LoRA on one prompt is as good as any other; one that changes its strength on the way is not."""
    made = run(attach(tiny.model), conds=(_hooked(tiny, 1.0), tiny.cond(2)))
    assert set(made.forecast) == published_plan(STEPS) and not made.notes
    conds = (_hooked(tiny, 1.0, 0.2), tiny.cond(2))
    made = run(attach(tiny.model), conds=conds)
    assert not made.forecast and torch.equal(made.latent, run(tiny.model, conds=conds).latent)
    assert len(made.notes) == 1 and "a LoRA hook with keyframes" in made.notes[0]
    assert made.ran == {"forecast": None}


GUIDERS: dict[str, tuple[str, Callable[[Any, TinyUNet], None]]] = {
    "Guider_Basic": ("nodes_custom_sampler", lambda guider, tiny: guider.set_conds(tiny.cond(1))),
    "Guider_DualCFG": (
        "nodes_custom_sampler",
        lambda guider, tiny: (
            guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3)),
            guider.set_cfg(5.0, 2.0),
        ),
    ),
    "Guider_PerpNeg": (
        "nodes_perpneg",
        lambda guider, tiny: (
            guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3)),
            guider.set_cfg(5.0, 1.0),
        ),
    ),
}


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("kind", GUIDERS)
def test_guiders(tiny: TinyUNet, attach: Any, run: Any, kind: str, mode: str) -> None:
    module, prepare = GUIDERS[kind]

    def guider(model: Any) -> Any:
        made = getattr(importlib.import_module(f"comfy_extras.{module}"), kind)(model)
        prepare(made, tiny)
        return made

    made = run(attach(tiny.model, mode, tolerance=1.0), guider=guider)
    assert made.forecast and not made.notes
    if mode == "fixed":
        reference = run(with_forecasts(tiny.model, Plain(published_plan(STEPS))), guider=guider)
        assert relative(made.latent, reference.latent) < SAME


def test_a_guider_that_asks_the_model_itself(tiny: TinyUNet, attach: Any, run: Any) -> None:
    import comfy.samplers

    class Direct(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            context = self.conds["positive"][0]["model_conds"]["c_crossattn"].cond
            return self.inner_model.apply_model(x, timestep, c_crossattn=context)

    def guider(model: Any) -> Any:
        made = Direct(model)
        made.inner_set_conds({"positive": tiny.cond(1)})
        return made

    made = run(attach(tiny.model), guider=guider)
    assert torch.equal(made.latent, run(tiny.model, guider=guider).latent)
    assert len(made.notes) == 1 and "calc_cond_batch" in made.notes[0] and made.ran == {"forecast": None}


def test_a_model_that_is_no_unet(comfy: ModuleType, attach: Any) -> None:
    """Flux: another network, and sigmas from 1 to 0."""
    import comfy.sample

    flux = another_network()
    fill(flux.model.diffusion_model, 0)
    calls: list[int] = []
    flux.model.diffusion_model.img_in.register_forward_pre_hook(lambda *_: calls.append(1))
    prompts = [
        [[torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(n)), {"pooled_output": torch.ones(1, 8)}]]
        for n in (1, 2)
    ]

    def sample(model: Any, sampler: str) -> torch.Tensor:
        calls.clear()
        latent = torch.zeros(2, 16, 8, 8)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, comfy.sample.prepare_noise(latent, 0), 20, 3.0, sampler, "simple", *prompts, latent,
                disable_pbar=True, seed=0,
            )  # fmt: skip

    for sampler, evaluations in (("euler", 11), ("heun", 21)):
        reference = sample(with_forecasts(flux, Plain(published_plan(20))), sampler)
        assert relative(sample(attach(flux), sampler), reference) < SAME
        assert len(calls) == evaluations
    sample(attach(flux, "adaptive", tolerance=1.0), "euler")
    assert len(calls) < 20


def _sigmas(tiny: TinyUNet, steps: int = STEPS) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "karras", steps)


SCHEDULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rises": lambda sigmas: sigmas[:-1].flip(0).contiguous(),
    "repeats": lambda sigmas: torch.cat([sigmas[:5], sigmas[4:]]),
    "restarts": lambda sigmas: torch.cat([sigmas[:8], sigmas[3:]]),
}


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_do_not_fall(tiny: TinyUNet, attach: Any, run: Any, name: str, mode: str) -> None:
    sigmas = SCHEDULES[name](_sigmas(tiny))
    made = run(attach(tiny.model, mode), sigmas=sigmas)
    assert torch.equal(made.latent, run(tiny.model, sigmas=sigmas).latent)
    assert len(made.notes) == 1 and "do not fall" in made.notes[0] and made.ran == {"forecast": None}


@pytest.mark.full
@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
def test_samplers_with_steps_of_their_own(tiny: TinyUNet, attach: Any, run: Any, sampler: str) -> None:
    made = run(attach(tiny.model), sampler=sampler)
    assert torch.equal(made.latent, run(tiny.model, sampler=sampler).latent)
    assert sum("takes steps of its own" in note for note in made.notes) == 1 and made.ran == {"forecast": None}


def test_a_sampler_that_restarts_is_evaluated_in_full_from_there_on(tiny: TinyUNet, attach: Any, run: Any) -> None:
    made = run(attach(tiny.model), steps=20, sampler=restarting(range(9, 12)))
    assert set(made.forecast) <= {4, 6, 8} and made.model_rows == 2 * (20 + 3 - len({4, 6, 8, 9, 11}))
    assert [note for note in made.notes if note.startswith("Forecast")] == [
        "Forecast: this sampler goes back to steps that it had left; nothing is forecast in the rest of this run."
    ]


def test_a_sampler_without_a_schedule(tiny: TinyUNet, attach: Any, run: Any) -> None:
    import comfy.samplers

    def bare(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any, **_: Any) -> Any:
        options = extra_args["model_options"]
        hidden = {key: value for key, value in options["transformer_options"].items() if key != "sample_sigmas"}
        options = {**options, "transformer_options": hidden}
        return model(x, sigmas[0].expand(1), denoise_mask=extra_args["denoise_mask"], model_options=options, seed=0)

    made = run(attach(tiny.model), sampler=comfy.samplers.KSAMPLER(bare))
    assert len([note for note in made.notes if "gives no schedule" in note]) == 1 and made.ran == {"forecast": None}


@pytest.mark.full
def test_every_sampler_keeps_the_plan_or_says_why_not(tiny: TinyUNet, attach: Any, run: Any) -> None:
    import comfy.samplers

    for name in comfy.samplers.SAMPLER_NAMES:
        made = run(attach(tiny.model), sampler=name)
        said = [note for note in made.notes if note.startswith("Forecast")]
        assert torch.isfinite(made.latent).all(), name
        if name in ("dpm_fast", "dpm_adaptive"):
            assert len(said) == 1, name
        else:
            assert set(made.forecast) == published_plan(STEPS) and not said, (name, made.forecast, said)


def test_a_prediction_that_is_no_number(tiny: TinyUNet, attach: Any, run: Any, caplog: Any) -> None:
    """Of uncond, at one step, and nothing else: no forecast is made from it, and two predictions later all goes on."""
    step = {"n": -1}

    def broken(executor: Any, *args: Any) -> Any:
        out = executor(*args)
        step["n"] += 1
        return [out[0], out[1] * float("nan")] if step["n"] == 4 else out  # the plan's 4th step is forecast: step 5

    def repaired(args: dict) -> torch.Tensor:
        return torch.where(torch.isfinite(args["denoised"]), args["denoised"], args["cond_denoised"])

    model = attach(tiny.model)
    model.add_wrapper_with_key("calc_cond_batch", "broken", broken)
    model.set_model_sampler_post_cfg_function(repaired)
    with caplog.at_level(logging.WARNING):
        made = run(model, steps=20)
    assert torch.isfinite(made.latent).all()
    assert set(made.forecast) == published_plan(20) - {6}
    assert caplog.text.count("held NaN") == 1 and len(made.notes) == 1


def test_uncond_that_returns_starts_anew(tiny: TinyUNet, attach: Any, run: Any) -> None:
    """Off at steps 6 to 8. Step 9 is a forecast one, but there are no predictions of uncond to make it from."""
    number = {"n": -1}

    def leave_out(executor: Any, *args: Any, **kwargs: Any) -> Any:
        number["n"] += 1
        guider = executor.class_obj
        cfg, guider.cfg = guider.cfg, 1.0 if 6 <= number["n"] <= 8 else guider.cfg
        try:
            return executor(*args, **kwargs)
        finally:
            guider.cfg = cfg

    model = attach(tiny.model)
    model.add_wrapper_with_key("predict_noise", "leave out", leave_out)
    made = run(model, steps=20)
    assert set(made.forecast) == published_plan(20) - {9}
    assert [made.rows[step].uncond_rows for step in (5, 7, 9, 10)] == [1, 0, 1, 1]


@pytest.mark.parametrize("order", ["first", "last"])
def test_dynamic_cfg_compares_evaluated_predictions_only(
    tiny: TinyUNet, attach: Any, dynamic_cfg: Any, run: Any, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    looks: list[int] = []
    real = torch.nn.functional.cosine_similarity
    monkeypatch.setattr(
        torch.nn.functional, "cosine_similarity", lambda *args, **kwargs: looks.append(1) or real(*args, **kwargs)
    )
    adaptive = {"mode": "adaptive", "similarity": 0.999999}
    if order == "first":
        model = attach(dynamic_cfg(tiny.model, **adaptive))
    else:
        model = dynamic_cfg(attach(tiny.model), **adaptive)
    made = run(model, steps=20)
    assert len(looks) == 11 and set(made.forecast) == published_plan(20)


@pytest.mark.parametrize("rival", ["DeepCache", "EasyCache", "LazyCache"])
@pytest.mark.parametrize("order", ["first", "last"])
def test_refused_with_what_leaves_out_evaluations_too(
    tiny: TinyUNet, attach: Any, pack: ModuleType, rival: str, order: str
) -> None:
    deepcache = importlib.import_module("speedlab.techniques.deepcache.attach")

    def other(model: Any) -> Any:
        if rival == "DeepCache":
            return deepcache.attach_deepcache(model, deepcache.DeepCacheConfig())
        node = getattr(importlib.import_module("comfy_extras.nodes_easycache"), f"{rival}Node")
        return node.execute(model, 0.2, 0.15, 0.95, False).args[0]

    model = other(attach(tiny.model)) if order == "first" else attach(other(tiny.model))
    with pytest.raises(Exception, match=f"Forecast and {rival} cannot work on one model"):
        tiny.sample(model, steps=STEPS)


def test_last_attached_wins_and_clones_share_nothing(tiny: TinyUNet, attach: Any) -> None:
    twice = attach(attach(tiny.model, max_skip=1), max_skip=3)
    expected = tiny.sample(attach(tiny.model), steps=20)
    assert torch.equal(tiny.sample(twice, steps=20), expected)
    tiny.sample(twice.clone(), steps=20, seed=7)
    assert torch.equal(tiny.sample(twice, steps=20), expected)


def test_options_that_are_copied_in_a_run(tiny: TinyUNet, attach: Any) -> None:
    """Some nodes deep-copy the options of a running model: the run is still one."""

    def copied(executor: Any, x: Any, timestep: Any, model_options: Any, *args: Any) -> Any:
        hidden = {key: value for key, value in model_options.items() if key != "transformer_options"}
        options = copy.deepcopy({"transformer_options": {
            key: value for key, value in model_options["transformer_options"].items() if "speedlab" in key
        }})["transformer_options"]  # fmt: skip
        together = {**model_options["transformer_options"], **options}
        return executor(x, timestep, {**hidden, "transformer_options": together}, *args)

    model = attach(tiny.model)
    expected = tiny.sample(model, steps=20)
    clone = tiny.model.clone()
    clone.add_wrapper_with_key("predict_noise", "copied", copied)
    assert torch.equal(tiny.sample(attach(clone), steps=20), expected)


@pytest.mark.parametrize("error", ["interrupt", "failure"])
def test_nothing_is_left(tiny: TinyUNet, attach: Any, living: Any, error: str) -> None:
    import comfy.model_management

    runs = living(importlib.import_module("speedlab.techniques.forecast.run").Run)
    raised = comfy.model_management.InterruptProcessingException if error == "interrupt" else RuntimeError
    model = attach(tiny.model)
    expected = tiny.sample(model, steps=20)

    def stop(step: int, *_: Any) -> None:
        if step == 8:
            raise raised("stop")

    with pytest.raises(raised):
        tiny.sample(model, steps=20, callback=stop)
    gc.collect()
    assert all(not run.histories._anchors and run.current is None for run in runs())
    assert "speedlab_run_states" not in repr(model.model_options)
    assert torch.equal(tiny.sample(model, steps=20), expected)


def test_two_predictions_a_group_are_kept(tiny: TinyUNet, attach: Any, living: Any) -> None:
    runs = living(importlib.import_module("speedlab.techniques.forecast.run").Run)
    seen: list[int] = []

    def look(step: int, *_: Any) -> None:
        seen.extend(len(anchors) for run in runs() for anchors in run.histories._anchors.values())

    tiny.sample(attach(tiny.model), steps=20, callback=look)
    assert len(seen) == 2 * 20 and set(seen) <= {1, 2, 3}
    gc.collect()
    assert not [run for run in runs() if run.histories._anchors]


def test_the_record_knows_the_options(tiny: TinyUNet, attach: Any, pack: ModuleType) -> None:
    accelerators = importlib.import_module("speedlab.patching.wrappers").accelerators
    (note,) = accelerators(attach(tiny.model, "adaptive", tolerance=0.05))
    assert note.describe() == "forecast(mode=adaptive, tolerance=0.05, max_skip=3, start_percent=0, end_percent=1)"
    (note,) = accelerators(attach(tiny.model, max_skip=1))
    assert note.describe() == "forecast(mode=fixed, max_skip=1, start_percent=0, end_percent=1)"


def test_node(tiny: TinyUNet, attach: Any, node: Any) -> None:
    inputs = node("SpeedLabForecast").INPUT_TYPES()["required"]
    defaults = {name: spec[1]["default"] for name, spec in inputs.items() if name != "model"}
    assert defaults == {
        "mode": "adaptive", "tolerance": 0.02, "max_skip": 3, "start_percent": 0.0, "end_percent": 1.0,
    }  # fmt: skip
    (model,) = node("SpeedLabForecast").apply(tiny.model, **{**defaults, "mode": "fixed"})
    assert torch.equal(tiny.sample(model, steps=20), tiny.sample(attach(tiny.model), steps=20))
    assert node("SpeedLabForecast").apply(tiny.model, **{**defaults, "max_skip": 0})[0] is tiny.model


def test_as_a_plan(tiny: TinyUNet, pack: ModuleType) -> None:
    techniques, axes = (importlib.import_module(f"speedlab.plans.{name}") for name in ("techniques", "axes"))
    patching = importlib.import_module("speedlab.patching.wrappers")
    (value,) = axes.parse_axis("plan", "fast=forecast(0.05)").values
    settings = value.apply(axes.CellSettings())
    techniques.check_techniques(settings, pack.NODE_CLASS_MAPPINGS)
    parts = techniques.attach(
        techniques.Parts(tiny.model, None, None), settings.techniques[0], pack.NODE_CLASS_MAPPINGS
    )
    assert patching.accelerators(parts.model)[0].options["tolerance"] == 0.05

"""DeepCache with a line through features, and with steps chosen by their errors: against plain loops."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from .deepcache_oracle import PlainCache, with_plain_cache
from .test_composition import _control, _core_node
from .test_forecast import _hooked
from .test_schedule_places import restarting
from .tiny_unet import TinyUNet, build, relative

EXACT = 1e-5
STEPS = 14


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("slim")


@pytest.fixture(scope="module")
def attach(pack: ModuleType) -> Callable[..., Any]:
    module = importlib.import_module("speedlab.techniques.deepcache.attach")
    return lambda model, **options: module.attach_deepcache(model, module.DeepCacheConfig(branch=1, **options))


@pytest.fixture(scope="module")
def ran(tiny: TinyUNet, pack: ModuleType) -> Callable[..., Any]:
    """A run as the profiler sees it, with the forwards (rows, deep)."""
    import comfy.samplers

    trace, nvtx, clock = (importlib.import_module(f"speedlab.measure.{name}") for name in ("trace", "nvtx", "clock"))

    def sample(
        model: Any, sampler: Any = "euler", sigmas: Any = None, steps: int = STEPS, cfg: float = 5.0,
        conds: tuple | None = None,
    ) -> Any:  # fmt: skip
        seen = trace.SamplingTrace(clock.clock_for(model.load_device), nvtx.emitter(False))
        guider = comfy.samplers.CFGGuider(trace.traced(model, seen))
        guider.set_conds(*(conds or (tiny.cond(1), tiny.cond(2))))
        guider.set_cfg(cfg)
        if sigmas is None:
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", steps)
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.inference_mode(), tiny.counted() as calls:
            latent = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
        rows = trace.part_rows(seen)
        cached = {row.index for row in rows if row.cached}
        return SimpleNamespace(cached=cached, rows=rows, notes=seen.notes, ran=seen.ran, latent=latent, calls=calls)

    return sample


CASES: dict[str, dict[str, Any]] = {
    "euler": {"scheduler": "karras"},
    "normal": {"scheduler": "normal"},
    "dpmpp_2m": {"sampler": "dpmpp_2m", "scheduler": "karras"},
    "heun": {"sampler": "heun", "scheduler": "karras"},
    "dpmpp_sde": {"sampler": "dpmpp_sde", "scheduler": "karras"},
    "ancestral": {"sampler": "euler_ancestral"},
    "no guidance": {"cfg": 1.0},
    "batch": {"batch": 2},
    "img2img": {"latent": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)), "denoise": 0.6},
}


def _both(tiny: TinyUNet, attach: Any, plain: PlainCache, options: dict, **config: Any) -> tuple[Any, Any]:
    model = attach(tiny.model, interval=plain.interval, **config)
    return tiny.sample(model, **options), tiny.sample(with_plain_cache(tiny.model, plain), **options)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in ("euler", "dpmpp_sde") else pytest.mark.full) for case in CASES],
)
def test_a_line_like_the_plain_one(tiny: TinyUNet, attach: Any, case: str) -> None:
    options = {"steps": STEPS, **CASES[case]}
    plain = PlainCache(tiny, by_line=True, cfg=options.get("cfg", 5.0))
    ours, reference = _both(tiny, attach, plain, options, features="extrapolate")
    assert relative(ours, reference) < EXACT
    assert relative(ours, tiny.sample(attach(tiny.model, interval=3), **options)) > 1e-4, "it copies"


@pytest.mark.parametrize("by_line", [False, True])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ("euler", "heun", "batch") else pytest.mark.full) for case in CASES]
)
def test_adaptive_like_the_plain_one(tiny: TinyUNet, attach: Any, case: str, by_line: bool) -> None:
    options = {"steps": STEPS, **CASES[case]}
    outcomes = set()
    for tolerance in (0.1, 0.5):
        plain = PlainCache(tiny, interval=4, tolerance=tolerance, by_line=by_line, cfg=options.get("cfg", 5.0))
        how = {"schedule": "adaptive", "tolerance": tolerance, "features": "extrapolate" if by_line else "copy"}
        ours, reference = _both(tiny, attach, plain, options, **how)
        assert relative(ours, reference) < EXACT
        outcomes.add(len(plain.cached))
    assert max(outcomes) > 0, "nothing is cached"


def test_what_measures_is_counted(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    """A full step that another one follows has the outer blocks run twice, and its rows count both."""
    made = ran(attach(tiny.model, schedule="adaptive", tolerance=0.3))
    assert made.cached and not made.notes
    full = [row.index for row in made.rows if not row.cached]
    assert full[0] == 0 and made.rows[0].cond_rows == 1
    for row in made.rows[1:-1]:
        assert row.cond_rows == row.uncond_rows == (1 if row.cached else 2)
    deep = [is_deep for _, is_deep in made.calls]
    assert deep.count(True) == len(full) and len(deep) == STEPS + len([step for step in full if 0 < step < STEPS - 1])


def test_never_more_in_a_row_than_the_interval_allows(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    for interval in (2, 3, 5):
        cached = ran(attach(tiny.model, interval=interval, schedule="adaptive", tolerance=1.0)).cached
        longest = max(
            length for length in range(STEPS) if any(set(range(n, n + length)) <= cached for n in range(STEPS))
        )
        assert longest == interval - 1


def test_a_window(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    cached = ran(attach(tiny.model, schedule="adaptive", tolerance=1.0, start=0.3, end=0.7)).cached
    assert cached and cached <= set(range(6, 9))


def test_off(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    assert attach(tiny.model, schedule="adaptive", tolerance=0.0) is tiny.model
    assert attach(tiny.model, schedule="adaptive", interval=1) is tiny.model
    stock, made = ran(tiny.model), ran(attach(tiny.model, schedule="adaptive", tolerance=1e-9))
    assert torch.equal(made.latent, stock.latent) and made.ran == {"deepcache": None}
    assert made.notes == ["DeepCache: no step of this run was cached, for none would have stayed within tolerance."]


def test_new_options_are_told_where_they_act(tiny: TinyUNet, attach: Any, pack: ModuleType) -> None:
    wrappers = importlib.import_module("speedlab.patching.wrappers")
    texts = [
        wrappers.accelerators(attach(tiny.model, **options))[0].describe()
        for options in ({}, {"schedule": "adaptive"}, {"features": "extrapolate"})
    ]
    assert "tolerance" not in texts[0] and "features" not in texts[0]
    assert "schedule=adaptive, tolerance=0.02" in texts[1] and texts[2].endswith("features=extrapolate)")


@pytest.mark.parametrize(
    "wrong", [{"schedule": "none"}, {"features": "line"}, {"tolerance": -0.1}, {"tolerance": float("nan")}]
)
def test_bad_values(attach: Any, tiny: TinyUNet, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        attach(tiny.model, **wrong)


def test_a_batch_is_as_each_image_alone(tiny: TinyUNet, attach: Any) -> None:
    """How long a slope lasts, and whether the line is taken, is measured for each latent."""
    model = attach(tiny.model, features="extrapolate")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(8))

    together = _without_noise(tiny, model, latents)
    for index, latent in enumerate(latents.split(1)):
        assert relative(together[index : index + 1], _without_noise(tiny, model, latent)) < 2e-5


def _without_noise(tiny: TinyUNet, model: Any, latent: torch.Tensor) -> torch.Tensor:
    import comfy.sample

    with torch.inference_mode():
        return comfy.sample.sample(
            model, latent, STEPS, 5.0, "euler", "karras", tiny.cond(1), tiny.cond(2), torch.zeros_like(latent),
            disable_pbar=True, seed=0,
        )  # fmt: skip


def test_restarting_samplers_are_left_alone(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    made = ran(attach(tiny.model, schedule="adaptive", tolerance=1.0), restarting(range(6, 9)))
    assert sum("goes back to steps" in note and note.startswith("DeepCache") for note in made.notes) == 1


@pytest.mark.parametrize("sampler", ["dpm_adaptive", "dpm_fast"])
def test_samplers_of_their_own_steps_are_left_alone(tiny: TinyUNet, attach: Any, ran: Any, sampler: str) -> None:
    made = ran(attach(tiny.model, schedule="adaptive", tolerance=1.0), sampler)
    stepped_aside = [note for note in made.notes if "nothing is cached in" in note]
    assert len(stepped_aside) == 1 and "steps of its own" in stepped_aside[0]


def test_rising_sigmas_are_left_alone(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    sigmas = torch.tensor([0.03, 0.1, 0.4, 1.0, 3.0, 8.0, 14.6])
    made = ran(attach(tiny.model, schedule="adaptive", tolerance=1.0), sigmas=sigmas)
    assert torch.equal(made.latent, ran(tiny.model, sigmas=sigmas).latent) and not made.cached
    assert sum("do not fall from step to step" in note for note in made.notes) == 1


def test_not_a_number(tiny: TinyUNet, attach: Any, ran: Any, caplog: pytest.LogCaptureFixture) -> None:
    """From sigma 1.6 on the model gives NaN: nothing is cached from there on, and the record says so once."""

    def broken(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        out = executor(x, *args, **kwargs)
        return torch.full_like(out, float("nan")) if float(args[0].reshape(-1)[0]) < 500 else out

    model = attach(tiny.model, schedule="adaptive", tolerance=1.0)
    model.add_wrapper_with_key("diffusion_model", "broken", broken)
    with caplog.at_level(logging.WARNING):
        made = ran(model)
    assert sum("NaN or infinity" in note for note in made.notes) == 1
    assert sum("NaN or infinity" in record.message for record in caplog.records) == 1
    assert made.cached and not made.cached & set(range(STEPS - 4, STEPS))


def test_a_prompt_that_changes(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    (early, extra), (late, more) = tiny.cond(1)[0], tiny.cond(3)[0]
    positive = [[early, {**extra, "end_percent": 0.4}], [late, {**more, "start_percent": 0.4}]]
    import comfy.samplers

    model = attach(tiny.model, schedule="adaptive", tolerance=1.0)
    made = ran(model, conds=(positive, tiny.cond(2)))
    changes = model.get_model_object("model_sampling").percent_to_sigma(0.4)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)
    first = next(step for step, sigma in enumerate(sigmas.tolist()) if sigma < changes)
    assert first not in made.cached and made.cached
    assert sum("change during this run" in note for note in made.notes) == 1
    made = ran(attach(tiny.model, interval=100), conds=(positive, tiny.cond(2)))
    assert set(range(STEPS)) - made.cached == {0, first}
    assert sum("change during this run" in note for note in made.notes) == 1


def test_a_hook_with_keyframes(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    conds = (_hooked(tiny, 1.0, 0.2), tiny.cond(2))
    made = ran(attach(tiny.model, schedule="adaptive", tolerance=1.0), conds=conds)
    assert torch.equal(made.latent, ran(tiny.model, conds=conds).latent) and not made.cached
    assert sum("a LoRA hook with keyframes" in note for note in made.notes) == 1


def test_a_controlnet_that_ends(tiny: TinyUNet, attach: Any, ran: Any) -> None:
    model = attach(tiny.model, schedule="adaptive", tolerance=1.0)
    made = ran(model, conds=(_control(tiny, (0.0, 0.5))(tiny.cond(1)), tiny.cond(2)))
    ends = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    first = next(row.index for row in made.rows if row.sigma < ends)
    assert first not in made.cached and made.cached
    assert sum("change during this run" in note for note in made.notes) == 1


@pytest.mark.parametrize("what", ["controlnet", "areas", "pag"])
def test_what_else_is_measured(tiny: TinyUNet, attach: Any, ran: Any, what: str) -> None:
    """Cached steps are there at a wide tolerance, none at a narrow one, and then the image is stock's."""
    model, conds = tiny.model, (tiny.cond(1), tiny.cond(2))
    if what == "controlnet":
        conds = (_control(tiny)(tiny.cond(1)), tiny.cond(2))
    elif what == "areas":
        tensor, extra = tiny.cond(4)[0]
        conds = ([*tiny.cond(1), [tensor, {**extra, "area": (4, 8, 0, 0), "strength": 0.8}]], tiny.cond(2))
    else:
        model = _core_node("nodes_pag", "PerturbedAttentionGuidance", 3.0)(model)
    wide = ran(attach(model, schedule="adaptive", tolerance=1.0), conds=conds)
    assert wide.cached and not wide.notes
    narrow = ran(attach(model, schedule="adaptive", tolerance=1e-9), conds=conds)
    assert relative(narrow.latent, ran(model, conds=conds).latent) < 1e-6


def test_easycache_is_refused_by_name(tiny: TinyUNet, attach: Any) -> None:
    easy = _core_node("nodes_easycache", "EasyCacheNode", 1.0, 0.1, 0.95, False)
    for model in (easy(attach(tiny.model, schedule="adaptive")), attach(easy(tiny.model), schedule="adaptive")):
        with pytest.raises(Exception, match=r"(?s)DeepCache.*EasyCache"):
            tiny.sample(model, steps=STEPS)

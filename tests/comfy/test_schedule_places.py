"""Steps are counted right in schedules that rise, turn or repeat, and with samplers that look ahead or go back."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .tiny_unet import TinyUNet, build

# Real runs of a model: a few examples each, from the values that samplers meet.
few = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
NO_PLACE = ("DeepCache: this sampler evaluates", "Dynamic CFG: uncond stays on", "The sampler evaluates at sigmas")
SIGMAS = (0.03, 0.2, 0.7, 1.5, 3.0, 5.0, 9.0, 14.6)


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("slim")


@pytest.fixture(scope="module")
def techniques(pack: ModuleType) -> Callable[..., Any]:
    """DeepCache of an interval and window, and Dynamic CFG, on a model."""
    deepcache, dynamic_cfg = (
        importlib.import_module(f"speedlab.techniques.{name}") for name in ("deepcache.attach", "guidance.dynamic_cfg")
    )

    def attach(model: Any, interval: int = 1, stop_at: float = 1.0, **window: float) -> Any:
        model = deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(interval=interval, **window))
        return dynamic_cfg.attach_dynamic_cfg(model, dynamic_cfg.DynamicCFGConfig(stop_at=stop_at))

    return attach


@pytest.fixture(scope="module")
def run(tiny: TinyUNet, pack: ModuleType) -> Callable[..., Any]:
    """A run on sigmas of one's own: its forwards (rows, deep), rows of the record, and notes."""
    import comfy.samplers

    trace, nvtx, clock = (importlib.import_module(f"speedlab.measure.{name}") for name in ("trace", "nvtx", "clock"))

    def sample(model: Any, sigmas: Any, sampler: Any = "euler", cfg: float = 5.0) -> tuple[list, Any, list[str]]:
        seen = trace.SamplingTrace(clock.clock_for(model.load_device), nvtx.emitter(False))
        guider = comfy.samplers.CFGGuider(trace.traced(model, seen))
        guider.set_conds(tiny.cond(1), tiny.cond(2))
        guider.set_cfg(cfg)
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with tiny.counted() as calls, torch.inference_mode():
            guider.sample(latent, latent, sampler, torch.as_tensor(sigmas), disable_pbar=True, seed=0)
        rows = trace.part_rows(seen)
        # Of few steps DeepCache warns whatever their schedule is.
        return calls, rows, [note for note in seen.notes if "steps each changes" not in note]

    return sample


@pytest.fixture(scope="module")
def whole(tiny: TinyUNet) -> Callable[..., torch.Tensor]:
    import comfy.samplers

    sampling = tiny.model.get_model_object("model_sampling")
    return lambda steps=6, scheduler="normal": comfy.samplers.calculate_sigmas(sampling, scheduler, steps)


def flipped(sigmas: torch.Tensor) -> torch.Tensor:
    from comfy_extras.nodes_custom_sampler import FlipSigmas

    return FlipSigmas.execute(sigmas).args[0]


def deep(calls: list) -> list[int]:
    return [n for n, (_, is_deep) in enumerate(calls) if is_deep]


@st.composite
def schedules(draw: Any) -> tuple[float, ...]:
    """Falling, rising, joined from stretches of both, repeated, or without any order."""
    value = st.sampled_from(SIGMAS)
    stretch = st.lists(value, min_size=1, max_size=5, unique=True).map(sorted)
    turned = st.tuples(stretch, st.booleans()).map(lambda pair: pair[0][::-1] if pair[1] else pair[0])
    joined = st.lists(turned, min_size=1, max_size=3).map(lambda parts: list(itertools.chain(*parts)))
    return tuple(draw(st.one_of(joined, st.lists(value, min_size=2, max_size=9)).filter(lambda some: len(some) > 1)))


@few
@given(sigmas=schedules(), interval=st.integers(2, 4), stop_at=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_every_step_of_any_schedule(tiny, techniques, run, sigmas, interval, stop_at) -> None:
    """Of a sampler that evaluates once a step: the plan is that of the step's number, whatever its sigma is."""
    steps = len(sigmas) - 1
    calls, rows, _ = run(techniques(tiny.model, interval, stop_at), sigmas)
    assert deep(calls) == list(range(0, steps, interval))
    kept = int(stop_at * steps)
    assert [count for count, _ in calls] == [2] * kept + [1] * (steps - kept)
    assert [(row.evals, row.cond_rows) for row in rows] == [(1, 1)] * steps
    assert [row.uncond_rows for row in rows] == [1] * kept + [0] * (steps - kept)
    assert [row.cached for row in rows] == [step % interval > 0 for step in range(steps)]


@few
@given(
    sigmas=schedules(), interval=st.integers(2, 4), sampler=st.sampled_from(["heun", "dpm_2", "dpmpp_2m", "heunpp2"])
)
def test_every_step_has_its_evaluations_or_the_record_says_so(tiny, techniques, run, sigmas, interval, sampler) -> None:
    calls, rows, notes = run(techniques(tiny.model, interval), sigmas, sampler)
    assert sum(row.evals for row in rows) == len(calls)
    if sampler == "heunpp2" and len(set(sigmas)) < len(sigmas):
        return  # Heun++ tells its last steps by their sigma, and leaves out what looks ahead where that stands twice
    if any("do not tell their step" in note for note in notes):
        return
    if sampler != "dpm_2":  # whose middle may be the very sigma of another step
        expected = Counter(step for step, row in enumerate(rows) for _ in range(row.evals) if step % interval == 0)
        assert len(deep(calls)) == sum(expected.values())
        assert [row.cached for row in rows] == [step % interval > 0 and row.evals > 0 for step, row in enumerate(rows)]


def test_noise_inversion(tiny, techniques, run, whole) -> None:
    """The case of VAEEncode, FlipSigmas, SamplerCustom: 6 steps that rise."""
    sigmas = flipped(whole(6))
    for interval, full in ((2, [0, 2, 4]), (3, [0, 3]), (100, [0])):
        calls, rows, notes = run(techniques(tiny.model, interval), sigmas)
        assert deep(calls) == full and not notes
        assert [row.index for row in rows if not row.cached] == full
    calls, rows, notes = run(techniques(tiny.model, stop_at=0.75), sigmas, cfg=3.0)
    assert [count for count, _ in calls] == [2, 2, 2, 2, 1, 1] and not notes


def test_a_part_of_a_rising_schedule_counts_in_the_whole(tiny, techniques, run, whole) -> None:
    from comfy_extras.nodes_custom_sampler import SplitSigmas

    low, high = SplitSigmas.execute(flipped(whole(8)), 4).args
    model = techniques(tiny.model, interval=2, stop_at=0.75, start=0.25)
    calls, _, notes = run(model, low)
    assert [count for count, _ in calls] == [2] * 4 and deep(calls) == [0, 1, 2]
    assert notes == ["Dynamic CFG: it left out nothing in this run, because all of its steps lie before stop_at."]
    calls, _, notes = run(model, high)
    assert [count for count, _ in calls] == [2, 2, 1, 1] and deep(calls) == [0, 2] and not notes
    # Flipped behind the cut, nothing of the whole is left.
    _, _, notes = run(model, flipped(whole(8)[4:]))
    assert sum("a part of a schedule" in note for note in notes) == 2


@pytest.mark.parametrize("direction", ["falls", "rises"])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_heunpp2(tiny, techniques, run, whole, direction, interval) -> None:
    sigmas = whole(10) if direction == "falls" else flipped(whole(10))
    calls, rows, notes = run(techniques(tiny.model, interval, stop_at=0.5), sigmas, "heunpp2")
    evals = [1, 2, *[3] * 8]
    assert [row.evals for row in rows] == evals and not notes
    assert len(deep(calls)) == sum(evals[0::interval])
    assert [row.cached for row in rows] == [step % interval > 0 for step in range(10)]
    assert [row.uncond_rows for row in rows] == [*evals[:5], *[0] * 5]


@pytest.mark.parametrize("direction", ["falls", pytest.param("rises", marks=pytest.mark.full)])
def test_every_sampler_of_comfyui_keeps_the_plan_in_both_directions(tiny, techniques, run, whole, direction) -> None:
    """But for those that choose their own steps, all steps between the ends have the same number of evaluations."""
    import comfy.samplers

    for name in comfy.samplers.SAMPLER_NAMES:
        if name in ("dpm_fast", "dpm_adaptive"):
            continue
        sigmas = whole(7) if direction == "falls" else flipped(whole(7))
        calls, rows, notes = run(techniques(tiny.model, 2, stop_at=0.5), sigmas, name)
        evals = [row.evals for row in rows]
        assert sum(evals) == len(calls) and len(set(evals[2:-1])) == 1 and 0 < evals[0] <= evals[2], (name, evals)
        assert [row.cached for row in rows] == [False, True, False, True, False, True, False], name
        assert len(deep(calls)) == sum(evals[0::2]), name
        # A sampler that reads uncond itself keeps it.
        kept = evals if "_cfg_pp" in name else [*evals[:3], 0, 0, 0, 0]
        assert [row.uncond_rows for row in rows] == kept, name
        assert [note for note in notes if not note.startswith("Dynamic CFG: uncond stays on")] == [], name


def restarting(again: Any) -> Any:
    """Euler's method over the schedule, in which the stretch `again` comes once more, with new noise before it."""
    import comfy.samplers
    from comfy.k_diffusion.sampling import to_d

    def sample(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any, **_: Any) -> Any:
        order = [*range(again.stop), *again, *range(again.stop, len(sigmas) - 1)]
        for number, step in enumerate(order):
            denoised = model(x, sigmas[step].expand(x.shape[0]), **extra_args)
            callback({"x": x, "i": number, "sigma": sigmas[step], "denoised": denoised})
            following = sigmas[order[number + 1]] if number + 1 < len(order) else sigmas[-1]
            if following > sigmas[step]:
                x = x + torch.randn_like(x) * (following**2 - sigmas[step] ** 2) ** 0.5
            else:
                x = x + to_d(x, sigmas[step], denoised) * (following - sigmas[step])
        return x

    return comfy.samplers.KSAMPLER(sample)


def test_a_restart_takes_no_features_from_before_it(tiny, techniques, run, whole) -> None:
    """Steps 3 to 6 come twice: the first one again finds nothing kept, and the others count as they did."""
    sigmas, sampler = whole(10, "karras"), restarting(range(3, 7))
    calls, rows, notes = run(techniques(tiny.model, 4, stop_at=0.6), sigmas, sampler)
    order = [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8, 9]
    assert deep(calls) == [n for n, step in enumerate(order) if step % 4 == 0 or n == 7]
    assert [count for count, _ in calls] == [2 if step < 6 else 1 for step in order]
    assert [row.evals for row in rows] == [order.count(step) for step in range(10)]
    assert [note for note in notes if "goes back" in note] == [
        "DeepCache: this sampler goes back to steps that it had left, and evaluates there in full."
    ]


def test_a_schedule_of_one_sigma_has_no_step(tiny, techniques, run) -> None:
    for sampler in ("euler", "heun", "heunpp2", "dpmpp_2m", "dpm_fast"):
        calls, rows, notes = run(techniques(tiny.model, 2, stop_at=0.5), [14.6], sampler)
        assert (calls, rows) == ([], ())
        assert any("no step of this run was cached" in note for note in notes)


def test_a_sampler_that_leaves_a_mixed_schedule_is_told_of(tiny, techniques, run) -> None:
    """dpm_fast takes first and last sigma alone, and goes its own way between them."""
    calls, rows, notes = run(techniques(tiny.model, 2, stop_at=0.5), [14.6, 1.0, 9.0, 0.5, 5.0, 0.03], "dpm_fast")
    assert sum(row.evals for row in rows) == len(calls)
    for name in NO_PLACE:
        assert sum(note.startswith(name) for note in notes) == 1, (name, notes)


# Evaluations a step; the last, to 0, has one. Where the second one is at the next sigma it is the next step's.
REPEATED = {
    "euler": [1, 1, 1, 1, 1, 1],
    "heun": [1, 2, 2, 2, 2, 2],
    "dpm_2": [2, 2, 2, 2, 2, 1],
    "dpm_2_ancestral": [1, 2, 2, 2, 2, 2],
    "dpmpp_2s_ancestral": [1, 2, 2, 2, 2, 2],
    "dpmpp_sde": [2, 2, 2, 2, 2, 1],
    "seeds_2": [2, 2, 2, 2, 2, 1],
    "seeds_3": [3, 3, 3, 3, 3, 1],
    "dpmpp_2m": [1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("sampler", REPEATED)
def test_a_sigma_twice_in_a_row(tiny, techniques, run, sampler) -> None:
    """As where two schedules are joined of which one ends at the sigma that the other begins with."""
    evals = REPEATED[sampler]
    model = techniques(tiny.model, 2, stop_at=0.5)
    calls, rows, notes = run(model, [14.6, 9.0, 5.0, 5.0, 2.0, 0.5, 0.0], sampler)
    assert [row.evals for row in rows] == evals and not notes
    assert [row.cached for row in rows] == [step % 2 > 0 for step in range(6)]
    assert len(deep(calls)) == sum(evals[0::2])
    assert [row.uncond_rows for row in rows] == [*evals[:3], 0, 0, 0]
    # In its first step a sampler has not shown yet whether it evaluates between two sigmas.
    calls, rows, notes = run(model, [9.0, 9.0, 5.0, 2.0, 0.5, 0.0], sampler)
    within = evals[0] > 1
    assert sum(row.evals for row in rows) == len(calls)
    for name in NO_PLACE:
        assert sum(note.startswith(name) for note in notes) == within, (name, notes)


@pytest.mark.full
def test_sigmas_that_repeat_for_many_steps(tiny, techniques, run, whole) -> None:
    """The simple scheduler has 1000 sigmas to give."""
    sigmas = whole(1200, "simple")
    assert len(set(sigmas.tolist())) < 1201
    calls, rows, notes = run(techniques(tiny.model, 7, stop_at=0.5), sigmas)
    assert deep(calls) == list(range(0, 1200, 7)) and not notes
    assert {row.evals for row in rows} == {1}
    assert sum(row.uncond_rows for row in rows) == 600


def test_features_of_a_sampler_that_looks_ahead_are_let_go(tiny, techniques, run, whole, pack) -> None:
    import comfy.samplers

    module = importlib.import_module("speedlab.techniques.deepcache.features")
    for name, most in (("euler", 1), ("heun", 1), ("dpmpp_sde", 1), ("heunpp2", 2)):
        kept: list[int] = []
        store = module.Run.store

        def counting(self: Any, *args: Any, kept: list[int] = kept, store: Any = store) -> None:
            store(self, *args)
            kept.append(max(len(entries) for entries in self._entries.values()))

        module.Run.store = counting
        try:
            run(techniques(tiny.model, 2), whole(8), comfy.samplers.sampler_object(name))
        finally:
            module.Run.store = store
        assert max(kept) == most, name

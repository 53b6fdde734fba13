"""The space of plans, exact counts and predictions, and the search, on made-up machines and models."""

from __future__ import annotations

import math
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedlab.common.errors import SpeedLabError
from speedlab.measure.summary import CACHED, FORECAST, FULL
from speedlab.plans.axes import CellSettings
from speedlab.plans.plan_text import PRESETS, SweepTextError, TechniqueText
from speedlab.plans.tune_search import Floor, Look, Refused, Search, Tried, holds
from speedlab.plans.tune_space import (
    Candidate,
    Parts,
    VariantParts,
    counts_of,
    of_line,
    predicted_s,
    space,
    why_not,
)
from speedlab_tools.cli.arguments import UsageError
from speedlab_tools.tune import prompts_of, run, steps_of

BASE = CellSettings(steps=20)
# Not the limits that are shipped, which benchmarks/floors.py sets: what is claimed here holds on the made-up world.
FLOORS = {"close": Floor(0.1, 0.9, 25, 0.1), "similar": Floor(0.25, 0.75, 18, 0.25), "any": Floor()}
VARIANTS = ["", "attention(auto)", "attention(auto)+compile(inductor)", "attention(auto)+precision(linear=auto)"]


def parts(speeds: dict[str, float] | None = None, **changes: Any) -> Parts:
    given = speeds or {"": 1.0}
    variants = {
        name: VariantParts({(FULL, True): 1000 * s, (FULL, False): 550 * s, (CACHED, True): 300 * s,
                            (CACHED, False): 160 * s}, 50.0)
        for name, s in given.items()
    }  # fmt: skip
    defaults: dict[str, Any] = {
        "text": 100.0, "save": 20.0, "decoders": {"": 1500.0, "tiny": 100.0}, "variants": variants, "forecast": 5.0,
        "seen": {"forecast(0.02)": 6, "forecast(0.05)": 8},
    }  # fmt: skip
    return Parts(**(defaults | changes))


@pytest.mark.parametrize(
    ("skip", "guidance", "counts"),
    [
        ("", "", {(FULL, True): 20}),
        ("", "dynamic_cfg(0.75)", {(FULL, True): 15, (FULL, False): 5}),
        ("deepcache(3)", "", {(FULL, True): 7, (CACHED, True): 13}),
        ("deepcache(3,features=extrapolate)", "", {(FULL, True): 7, (CACHED, True): 13}),
        ("deepcache(2,start_percent=0.5)", "dynamic_cfg(0.5)",
         {(FULL, True): 10, (FULL, False): 5, (CACHED, False): 5}),
        ("forecast(mode=fixed,max_skip=2)", "", {(FULL, True): 11, (FORECAST, True): 9}),
        ("forecast(0.02)", "", {(FULL, True): 14, (FORECAST, True): 6}),
    ],
)  # fmt: skip
def test_steps_are_counted_exactly(skip: str, guidance: str, counts: dict) -> None:
    one = Candidate("", skip, guidance, steps=20)
    assert counts_of(one, seen={"forecast(0.02)": 6}) == Counter(counts)
    alone = counts_of(one, guided=False, seen={"forecast(0.02)": 6})
    assert alone is not None and not any(guided for _, guided in alone) and sum(alone.values()) == 20


def test_what_decides_while_it_runs_is_not_counted_before_it_was_seen() -> None:
    assert counts_of(Candidate("", "forecast(0.02)")) is None
    assert counts_of(Candidate("", "", "dynamic_cfg(mode=adaptive)")) is None
    for adaptive in ("deepcache(schedule=adaptive,tolerance=0.1)", "deepcache(schedule=adaptive)"):
        assert counts_of(Candidate("", adaptive)) is None
    assert predicted_s(Candidate("", "forecast(0.1)"), parts()) is None


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_is_in_the_space(preset: str) -> None:
    """Else it could be faster than what Tune finds."""
    assert of_line(PRESETS[preset], BASE).lossy in {one.lossy for one in space([""], BASE)}


def test_a_prediction_adds_up_the_parts() -> None:
    one = Candidate("", "deepcache(3)", "dynamic_cfg(0.5)", "tiny", 20)
    full, cached = (4 * 1000 + 3 * 550), (6 * 300 + 7 * 160)
    assert predicted_s(one, parts()) == pytest.approx((100 + 20 + 100 + 50 + full + cached) / 1000)
    assert predicted_s(Candidate("other"), parts()) is None


def test_a_line_becomes_a_candidate_and_a_cells_settings() -> None:
    one = of_line("fast=attention(auto)+deepcache(3)+dynamic_cfg(0.75)+tiny+settings(steps=16)", BASE)
    assert (one.variant, one.skip, one.guidance, one.decoder, one.steps) == (
        "attention(auto)", "deepcache(3)", "dynamic_cfg(0.75)", "tiny", 16,
    )  # fmt: skip
    settings = one.over(BASE)
    assert settings.steps == 16 and settings.decoder.name == "tiny"
    assert [t.name for t in settings.techniques] == ["attention", "deepcache", "dynamic_cfg"]
    with pytest.raises(SweepTextError):
        of_line("deepcache(3", BASE)
    searched = of_line("settings(sampler=dpmpp_2m,sigmas=ays)", BASE)
    assert (searched.sampler, searched.scheduler) == ("dpmpp_2m", "ays")
    assert searched.over(BASE).sigmas == TechniqueText("ays") and searched.over(BASE).sampler == "dpmpp_2m"


@pytest.mark.parametrize("settings", ["cfg=1", "width=768", "height=64", "batch=2"])
def test_a_line_that_would_make_another_image_is_refused(settings: str) -> None:
    with pytest.raises(SweepTextError, match=rf"Tune keeps your own {settings.partition('=')[0]}"):
        of_line(f"settings({settings})+tiny", BASE)


def test_the_space_has_every_stack_once_and_fewer_plain_steps() -> None:
    found = space(VARIANTS, BASE)
    assert len(found) == len(set(found)) >= 200
    plain = {one.steps for one in found if not (one.skip or one.guidance or one.decoder) and one.variant == ""}
    assert plain == {20, 18, 16, 14, 12, 10, 8}
    opened = space([""], BASE, [""], (20, 30), (("euler", "normal"), ("dpmpp_2m", "karras")))
    assert {(one.steps, one.sampler) for one in opened} >= {(30, "dpmpp_2m"), (20, "euler")}


def test_rounding_is_told_from_what_changes_the_image() -> None:
    exact = Candidate("attention(auto)+precision(linear=auto)")
    assert exact.lossy == Candidate("").lossy
    for variant in ("weights(bf16)", "precision(autocast=bf16)", "attention(sage)", "freeu(b1=1.2)"):
        assert Candidate(variant).lossy != Candidate("").lossy


def test_what_is_refused_or_does_not_fit_is_dropped_with_the_reason() -> None:
    variants = {"": VariantParts({}, peak_gb=9.0, refused={"deepcache": "they do not work together"})}
    measured = parts(variants=variants)
    assert why_not(Candidate("", "deepcache(2)"), measured, 0.0) == "they do not work together"
    assert "more than the budget of 8 GB" in str(why_not(Candidate(""), measured, 8.0))
    assert why_not(Candidate(""), measured, 10.0) is None
    assert "cannot run here" in str(why_not(Candidate("gone"), measured, 0.0))


class World:
    """A machine whose times are near the predicted ones, and a model whose errors nobody knows before."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        draw = self.random.uniform
        speeds = {name: draw(0.4, 1.0) if name else 1.0 for name in VARIANTS}
        self.parts = parts(speeds)
        unit = {kind: draw(0.5, 2.0) for kind in ("deepcache", "extrapolate", "fixed", "adaptive", "guidance", "steps")}
        self.alone = {"": 0.0}
        for interval in (2, 3, 4, 5):
            self.alone[f"deepcache({interval})"] = 0.03 * (interval - 1) ** 1.2 * unit["deepcache"]
        for interval in (2, 3, 4):
            error = 0.015 * (interval - 1) ** 1.6 * unit["deepcache"] * unit["extrapolate"]
            self.alone[f"deepcache({interval},features=extrapolate)"] = error
        for most in (1, 2):
            self.alone[f"forecast(mode=fixed,max_skip={most})"] = 0.02 * most * unit["fixed"]
        for tolerance in (0.02, 0.05):
            self.alone[f"forecast({tolerance})"] = 0.5 * tolerance * unit["adaptive"]
        for stop in (0.9, 0.75, 0.5):
            self.alone[f"dynamic_cfg({stop:g})"] = 0.15 * (1 - stop) ** 1.3 * unit["guidance"]
        self.step_unit, self.mixed = 0.4 * unit["steps"], {}
        self.tiny_ssim = draw(0.0, 0.06)
        self.candidates = space(VARIANTS, BASE)
        self.spent = 0.0
        self.true_s = {c: (predicted_s(c, self.parts) or 0.0) * draw(0.96, 1.04) for c in self.candidates}

    def error(self, one: Candidate) -> float:
        if one.lossy not in self.mixed:
            self.mixed[one.lossy] = self.random.uniform(0.85, 1.2) if one.skip and one.guidance else 1.0
        steps = self.step_unit * (1 - one.steps / BASE.steps)
        return math.hypot(self.alone[one.skip], self.alone[one.guidance], steps) * self.mixed[one.lossy]

    def look(self, one: Candidate, prompt: int = 0) -> Look:
        error = self.error(one) * random.Random(f"{one.lossy}{prompt}").uniform(0.92, 1.08)
        ssim = 1 - 0.6 * error - (self.tiny_ssim if one.decoder else 0.0)
        mse = 0.02 * error**2 + (1e-3 if one.decoder else 0.0) + 1e-12
        seconds = self.true_s[one] * self.random.uniform(0.99, 1.01)
        self.spent += seconds
        return Look(seconds, error, ssim, -10 * math.log10(mse))

    def search(self, floor: Floor, seconds: float, run: Callable[[Candidate, int], Look] | None = None) -> Search:
        predicted = {one: s for one in self.candidates if (s := predicted_s(one, self.parts)) is not None}
        return Search(predicted, Candidate("", steps=20), floor, 2, 2, run or self.look, lambda: seconds - self.spent)

    def best_s(self, floor: Floor) -> float:
        """The true best: every plan with its mean error over all prompts."""
        good = []
        for one in self.candidates:
            tried = Tried(one, 0.0, {prompt: self.look(one, prompt) for prompt in range(4)})
            if holds(tried.mean, floor):
                good.append(self.true_s[one])
        return min(good)


@pytest.mark.parametrize("quality", ["close", "similar"])
def test_a_tenth_of_the_time_finds_a_plan_that_is_hardly_slower_than_the_best(quality: str) -> None:
    floor, regrets = FLOORS[quality], []
    for seed in range(10):
        world = World(seed)
        everything = sum(world.true_s.values()) * 4
        found = world.search(floor, everything / 10).find()
        assert found.best is not None and world.spent <= everything / 10
        assert len(world.candidates) >= 200
        regrets.append(world.true_s[found.best.candidate] / world.best_s(floor) - 1)
    assert sum(regret <= 0.05 for regret in regrets) >= 9, sorted(regrets)


@pytest.mark.parametrize(
    ("text", "found"),
    [("20", (20, "")), (" 20 ", (20, "")), ("20:30", (20, "20:30")), ("20,25, 30", (20, "20,25, 30")),
     ("8:8", (8, "8:8"))],
)  # fmt: skip
def test_the_command_reads_steps(text: str, found: tuple[int, str]) -> None:
    assert steps_of(text) == found


@pytest.mark.parametrize("text", ["", "0", "-3", "many", "30:20", "20:", ":30", "20:x", "20,,30", "20:25:30", "2.5"])
def test_the_command_refuses_steps_before_anything_starts(text: str) -> None:
    with pytest.raises(UsageError, match="write a number, or a range such as 20:30"):
        steps_of(text)


def test_the_command_reads_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    args = Namespace(prompts=str(file))
    with pytest.raises(UsageError, match=r"prompts\.txt"):
        prompts_of(args)
    file.write_text(" a tree \n\na <b>house</b>\n")
    assert prompts_of(args) == ["a tree", "a <b>house</b>"] and prompts_of(Namespace(prompts=None)) == []
    file.write_text("\n")
    with pytest.raises(UsageError, match="has no prompt"):
        prompts_of(args)
    with pytest.raises(UsageError, match="is a folder"):
        run(Namespace(prompts=None, steps="20", html=tmp_path))


def test_a_technique_that_loses_to_fewer_steps_is_not_recommended() -> None:
    world = World(1)
    world.step_unit = 0.01  # this sampler hardly needs its steps
    found = world.search(FLOORS["close"], 1e6).find()
    assert found.best is not None and found.best.candidate.steps < BASE.steps and not found.best.candidate.skip


def test_no_time_for_even_one_plan_is_said() -> None:
    found = World(0).search(FLOORS["close"], 0.1).find()
    assert not found.complete and World(0).search(FLOORS["close"], 1e6).find().complete
    assert found.best is None and found.notes[0].startswith("There was no time for even one plan")


def test_a_winner_that_fails_on_the_held_out_seeds_makes_room_for_the_next() -> None:
    world = World(2)
    first = world.search(FLOORS["close"], 1e6).find().best
    assert first is not None

    def worse_there(one: Candidate, prompt: int) -> Look:
        look = world.look(one, prompt)
        if one.lossy == first.candidate.lossy and prompt >= 2:
            return Look(look.seconds, 5.0, 0.1, 3.0)
        return look

    found = world.search(FLOORS["close"], 1e6, worse_there).find()
    assert found.best is not None and found.best.candidate.lossy != first.candidate.lossy
    gone = next(one for one in found.tried if one.candidate == first.candidate)
    assert gone.why == "it does not hold the floor on the held-out seeds"
    assert {2, 3} <= found.best.looks.keys()


def test_many_prompts_leave_time_for_the_held_out_seeds() -> None:
    world = World(2)
    everything = sum(world.true_s.values())
    predicted = {one: predicted_s(one, world.parts) or 0.0 for one in world.candidates}
    user, left = Candidate("", steps=20), lambda: everything / 6 - world.spent
    found = Search(predicted, user, FLOORS["similar"], 500, 2, world.look, left).find()
    assert found.best is not None and {500, 501} <= found.best.looks.keys() and not found.complete
    assert "did not allow every prompt" in found.notes[-1] and left() >= 0.0


def test_a_plan_whose_first_image_just_misses_the_floor_gets_another() -> None:
    world = World(8)
    fast = Candidate("", "deepcache(5)", steps=20)
    world.candidates = [Candidate("", steps=20), Candidate("", "deepcache(2)", steps=20), fast]

    def swinging(one: Candidate, prompt: int) -> Look:
        look = world.look(one, prompt)
        errors = {"": 0.0, "deepcache(2)": 0.05, "deepcache(5)": 0.08 if prompt else 0.11}
        return Look(look.seconds, errors[one.skip], 1.0, 60.0)

    found = world.search(Floor(0.1), 1e6, swinging).find()
    assert found.best is not None and found.best.candidate == fast
    far = world.search(Floor(0.09), 1e6, swinging).find()
    assert far.best is not None and far.best.candidate.skip == "deepcache(2)"


def test_predictions_follow_a_machine_that_drifts() -> None:
    """Four times as slow after a while, and back again: what is expected of an image is what the last ones took."""
    world, slow = World(9), []

    def drifting(one: Candidate, prompt: int) -> Look:
        look = world.look(one, prompt)
        slow.append(4.0 if 6 <= len(slow) < 18 else 1.0)
        return Look(look.seconds * slow[-1], look.latent, look.ssim, look.psnr)

    search = world.search(FLOORS["similar"], 1e6, drifting)
    search.see(search.user, 1.3 * (predicted_s(search.user, world.parts) or 0.0))
    assert search.pace == pytest.approx(1.3)
    found = search.find()
    looks = [look for one in found.tried for look in one.looks.values()]
    off = [abs(look.seconds / (look.predicted or math.inf) - 1) for look in looks]
    assert len(looks) > 20 and slow.count(4.0) == 12
    # Only where the machine has just changed, and before anything was known.
    assert sum(share > 0.1 for share in off) <= 9
    calm = World(9)
    best = calm.search(FLOORS["similar"], 1e6).find().best
    assert found.best is not None and best is not None
    assert world.true_s[found.best.candidate] <= calm.true_s[best.candidate] * 1.05


def test_a_prediction_knows_a_decode_of_its_own_and_what_a_sampler_evaluates() -> None:
    plain = Candidate("", steps=20)
    usual = predicted_s(plain, parts()) or 0.0
    own = VariantParts({(FULL, True): 1000.0}, 50.0, decode=2500.0)
    assert predicted_s(plain, parts(variants={"": own})) == pytest.approx(usual + 1.0)
    assert predicted_s(Candidate("", "", "", "tiny", 20), parts(variants={"": own})) == pytest.approx(usual - 1.4)
    twice = Candidate("", steps=20, sampler="heun")
    assert predicted_s(twice, parts(samplers={"heun": 2.0})) == pytest.approx(usual + 20.0)


def test_what_cannot_run_is_out_and_the_search_goes_on() -> None:
    world = World(3)

    def out_of_memory(one: Candidate, prompt: int) -> Look:
        if one.skip.startswith("deepcache"):
            raise Refused("OutOfMemoryError: does not fit")
        return world.look(one, prompt)

    found = world.search(FLOORS["similar"], 1e6, out_of_memory).find()
    assert found.best is not None and not found.best.candidate.skip.startswith("deepcache")
    assert any(one.why == "OutOfMemoryError: does not fit" for one in found.tried)


def test_a_stack_whose_parts_are_no_candidates_is_tried_itself() -> None:
    world = World(8)
    stack = Candidate("attention(auto)", "deepcache(2)", "dynamic_cfg(0.9)", steps=20)
    world.candidates = [Candidate("", steps=20), stack]
    found = world.search(FLOORS["any"], 1e6).find()
    assert found.best is not None and found.best.candidate == stack


def test_a_cancel_keeps_the_best_so_far() -> None:
    world, made = World(4), []

    def cancelled(one: Candidate, prompt: int) -> Look:
        if len(made) == 8:
            raise KeyboardInterrupt
        made.append(world.look(one, prompt))
        return made[-1]

    search = world.search(FLOORS["close"], 1e6, cancelled)
    with pytest.raises(KeyboardInterrupt):
        search.find()
    best = search.best_so_far()
    assert best is not None and holds(best.mean, FLOORS["close"])
    assert best.seconds == min(one.seconds for one in search.tried if one.looks and holds(one.mean, FLOORS["close"]))


def test_a_choice_within_the_noise_is_called_a_tie() -> None:
    world = World(5)
    noisy = random.Random(1)

    def slow_and_fast(one: Candidate, prompt: int) -> Look:
        look = world.look(one, prompt)
        return Look(look.seconds * noisy.uniform(0.9, 1.1), look.latent, look.ssim, look.psnr)

    found = world.search(FLOORS["similar"], 1e6, slow_and_fast).find()
    assert found.best is not None
    for tie in found.ties:
        assert abs(tie.seconds - found.best.seconds) <= 0.03 * found.best.seconds + 1e-9
        assert tie.mean.latent >= found.best.mean.latent


def test_no_plan_within_the_floor_is_said() -> None:
    world = World(6)
    found = world.search(Floor(-1.0), 1e6).find()
    assert found.best is None and "No plan holds the floor" in found.notes[0]


def test_errors_of_the_machine_end_the_search() -> None:
    def broken(_one: Candidate, _prompt: int) -> Look:
        raise SpeedLabError("the disk is full")

    with pytest.raises(SpeedLabError, match="the disk is full"):
        World(7).search(FLOORS["close"], 1e6, broken).find()

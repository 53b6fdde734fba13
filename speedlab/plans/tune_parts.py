"""The parts that Tune measures once: each way of computing by kind of step, decoders, samplers and Forecast's steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from ..common.dtypes import cpu_computes_bf16
from ..common.errors import SpeedLabError, UnavailableError
from ..measure.summary import CACHED, FULL, rows_of
from ..measure.trace import StepRow
from ..memory.predict import ImageSize, parts_of, predict
from ..models.loading import SOURCE
from ..techniques.compile.attach import fastest_here
from .cell import OneRun
from .in_turn import Series, turns
from .plan_text import PRESETS, TechniqueText
from .techniques import Parts as Models
from .tune_images import Images
from .tune_request import TuneRequest
from .tune_search import Refused
from .tune_space import SKIPS, Candidate, Kind, Parts, VariantParts, is_exact, of_line

# Four of them are enough for a step of every kind.
_FIRST_STEPS = 4
_PROBE_STEPS = 10
_PROBE_ROUNDS = 3
# Of the minutes: what measuring parts may take where more than one round is made, and what has to be left for another
# way of computing to be begun, or measured.
_PARTS_SHARE = 0.15
_VARIANTS_UNTIL = 2.0 / 3.0
_IMAGES_FROM = 0.4
_FORECAST_STEPS = 10
_COMPILE_FROM_MINUTES = 10.0


@dataclass(kw_only=True, eq=False)
class Probes(Series[OneRun]):
    """Short runs of one way of computing; `techniques`: what they run with, the first that is not refused."""

    variant: str
    techniques: list[str] = field(default_factory=lambda: ["deepcache(2)+dynamic_cfg(0.6)", "dynamic_cfg(0.6)", ""])
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class PartsMeasurement:
    """Measures them with short runs. `left` are the seconds that Tune has left, `say` shows what is being done, and
    `count_forecasts(variant, skip)` makes an image and counts the steps that Forecast left out of it.
    """

    models: Models
    request: TuneRequest
    lines: Sequence[Candidate]
    images: Images
    notes: list[str]
    left: Callable[[], float]
    say: Callable[[str], None]
    count_forecasts: Callable[[str, str], int]

    def variants(self) -> list[str]:
        """The ways of computing that may run here, as text of a plan; compiled ones last."""
        if self.lines:
            return list(dict.fromkeys(["", *(one.variant for one in self.lines)]))
        model, exact = self.models.model, PRESETS["exact"]
        variants = ["", exact]
        if self.request.budget_gb and model.load_device.type != "cpu":
            variants += [f"{exact}+memory_plan({offload})" for offload in ("model", "sequential")]
        fast_bf16 = cpu_computes_bf16() if model.load_device.type == "cpu" else True
        if model.get_attachment(SOURCE) is not None and model.model.get_dtype() == torch.float32 and fast_bf16:
            variants.append(f"weights(bf16)+{exact}")
        # Last, because compiling may take as long as many images.
        if self.request.minutes < _COMPILE_FROM_MINUTES:
            self.notes.append(f"Compiling was left out: give {_COMPILE_FROM_MINUTES:g} minutes or more for it.")
            return list(dict.fromkeys(variants))
        _, _, rest = exact.partition("+")
        # A program of the whole network brings its own attention.
        for by_blocks, beside in ((False, rest), (True, exact)):
            try:
                compiled = TechniqueText("compile", fastest_here(model, by_blocks)).words()
            except UnavailableError as error:
                self.notes.append(str(error))
                continue
            variants.append(f"{beside}+{compiled}")
        return list(dict.fromkeys(variants))

    def least_s(self, own: OneRun) -> float:
        """Seconds that two runs of the user's own settings take, by an image of theirs: less is no time for a plan."""
        step = own.sample_ms / self.images.steps
        return ((_FIRST_STEPS + _PROBE_STEPS) * step + 2 * (own.total_ms - own.sample_ms)) / 1000.0

    def measure(self) -> Parts:
        """All of them. Raises SpeedLabError where not even the user's own settings could be measured."""
        guided = self.request.base.cfg != 1.0
        probes = self._measure_variants()
        runs = [run for one in probes for run in one.repeats]
        text = statistics.median(run.encode_ms for run in runs)
        save = statistics.median(run.save_ms for run in runs)
        variants = {one.variant: _variant_parts(one, text, self.predicted_gb()) for one in probes}
        decoders = {"": statistics.median(run.decode_ms for run in runs)}
        wanted = {one.decoder for one in self.lines} if self.lines else {"tiny"}
        for decoder in sorted(wanted - {""}) if self.left() > 0 else ():
            try:
                # The first one loads the decoder.
                times = [self._probe("", decoder, 1, "").decode_ms for _ in range(1 + _PROBE_ROUNDS)][1:]
                decoders[decoder] = statistics.median(times)
            except Refused as error:
                self.notes.append(f"{decoder} is left out: {error}")
        samplers = self._measure_samplers(probes[0].repeats[0])
        forecast, seen = self._measure_forecast(variants, guided)
        return Parts(text, save, decoders, variants, forecast, seen, guided, samplers)

    def _probe(self, variant: str, decoder: str, steps: int, techniques: str, sampler: str = "") -> OneRun:
        """A short run of a variant."""
        base = self.request.base
        line = "+".join(text for text in (variant, techniques, decoder) if text) or "stock"
        probe = replace(of_line(line, base), steps=steps, sampler=sampler or base.sampler)
        return self.images.once(probe.over(base), 0)

    def _measure_variants(self) -> list[Probes]:
        """Short runs of every way of computing, in turn, so that a drift of the machine hits all alike; the first round
        compiles and loads, and does not count. As many rounds as a part of the minutes allows.
        """
        seconds = self.request.minutes * 60.0
        probes = [Probes(variant=variant) for variant in self.variants()]
        for turn in turns(
            probes, _PROBE_ROUNDS, 1, lambda done: done < 2 or self.left() > seconds * (1.0 - _PARTS_SHARE)
        ):
            one = turn.series
            if not turn.counts and any(other.first for other in probes) and self.left() < seconds * _VARIANTS_UNTIL:
                one.status = "no time"
                continue
            self.say(f"measuring the parts of {one.variant or 'stock'}, {turn.text}")
            # A second way of computing is worth nothing without time for an image of it.
            if turn.counts and any(other.repeats for other in probes) and self.left() < seconds * _IMAGES_FROM:
                if not one.repeats:
                    one.status = "no time"
                continue
            run = self._probe_turn(one, _PROBE_STEPS if turn.counts else _FIRST_STEPS)
            if run is not None:
                turn.keep(run)
        if any(one.status == "no time" for one in probes):
            self.notes.append("The minutes did not allow every way of computing to be measured.")
        measured = [one for one in probes if one.status == "ok" and one.repeats]
        if not measured:
            reasons = "; ".join(reason for one in probes for reason in one.refused.values())
            raise SpeedLabError(f"Tune could not measure even your own settings: {reasons}")
        return measured

    def _probe_turn(self, one: Probes, steps: int) -> OneRun | None:
        """One run with steps of every kind; without the techniques that are refused."""
        while one.techniques:
            try:
                return self._probe(one.variant, "", steps, one.techniques[0])
            except Refused as error:
                one.refused[one.techniques.pop(0).partition("(")[0] or "all"] = str(error)
        one.status = "refused"
        self.notes.append(f"{one.variant or 'stock'} is left out: {one.refused['all']}")
        return None

    def _measure_samplers(self, usual: OneRun) -> dict[str, float]:
        """How often other samplers evaluate in a step, by the user's own."""
        samplers = sorted({name for name, _ in self.request.samplers} | {one.sampler for one in self.lines})
        found: dict[str, float] = {}
        for sampler in samplers:
            if sampler != self.request.base.sampler:
                with suppress(Refused):
                    run = self._probe("", "", _FIRST_STEPS, "", sampler)
                    found[sampler] = _evaluations(run) / _evaluations(usual)
        return found

    def predicted_gb(self) -> float:
        """What a run takes by prediction, where the device does not tell: on a CPU what another device would need."""
        models, base = self.models, self.request.base
        parts = parts_of(models.model, models.clip, models.vae, ImageSize(base.width, base.height, base.batch))
        return predict(parts, "none").peak / 1e9

    def _measure_forecast(self, variants: Mapping[str, VariantParts], guided: bool) -> tuple[float, dict[str, int]]:
        """A forecast step, and how many of them there are where the image decides."""
        skips = {one.skip for one in self.lines} if self.lines else set(SKIPS)
        if self.left() <= 0 or not any("forecast" in text for text in skips):
            return math.nan, {}
        try:
            run = self._probe("", "", _FORECAST_STEPS, "forecast(mode=fixed,max_skip=1)")
        except Refused as error:
            self.notes.append(f"Forecast is left out: {error}")
            return math.nan, {}
        times = [row.ms for row in rows_of(run.record.steps) if not row.cond_rows and not row.uncond_rows]
        seen: dict[str, int] = {}
        exact = min(
            (name for name in variants if all(map(is_exact, filter(None, name.split("+"))))),
            key=lambda name: variants[name].steps.get((FULL, guided), math.inf),
        )
        for text in sorted(text for text in skips if text.startswith("forecast") and "fixed" not in text):
            if self.left() > self.request.minutes * 30.0:
                with suppress(Refused):
                    seen[text] = self.count_forecasts(exact, text)
        return (statistics.median(times) if times else 0.0), seen


def _variant_parts(probes: Probes, text_ms: float, predicted_gb: float) -> VariantParts:
    """Medians over all runs; `beside` is what they took beside their steps, decoding and saving, without `text_ms`."""
    runs = [(run, rows_of(run.record.steps)) for run in probes.repeats]
    # The first step also prepares, and stands for its kind only where nothing else does.
    later = [(_kind(row), row.ms) for _, rows in runs for row in rows[1:]]
    first = [(_kind(rows[0]), rows[0].ms) for _, rows in runs]
    kinds = {kind for kind, _ in (*first, *later)}
    steps = {
        kind: statistics.median([ms for its, ms in later if its == kind] or [ms for its, ms in first if its == kind])
        for kind in kinds
    }
    rest = (run.total_ms - run.decode_ms - run.save_ms - sum(steps[_kind(row)] for row in rows) for run, rows in runs)
    peaks = [run.record.memory.get("overall", {}).get("peak_allocated_gb") for run, _ in runs]
    known = [peak for peak in peaks if peak is not None]
    return VariantParts(
        steps, statistics.median(rest) - text_ms, max(known) if known else predicted_gb, probes.refused,
        statistics.median(run.decode_ms for run, _ in runs),
    )  # fmt: skip


def _kind(row: StepRow) -> Kind:
    return (CACHED if row.cached else FULL, bool(row.uncond_rows))


def _evaluations(run: OneRun) -> float:
    """Of a step; the last one may have fewer."""
    rows = rows_of(run.record.steps)
    return statistics.median(max(row.evals, 1) for row in rows[:-1] or rows)


def forecasts_of(run: OneRun) -> int:
    """How many of its steps Forecast left out."""
    return sum(not row.cond_rows and not row.uncond_rows for row in rows_of(run.record.steps))

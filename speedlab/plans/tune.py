"""Tune: measures the parts of every plan once, then spends its minutes on images of the plans that look best.

What was measured is kept after each image, so that a tune that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.core import output_directory, show_on_node, tell_browser
from ..common.dtypes import cpu_computes_bf16
from ..common.errors import ResultsError, SpeedLabError, UnavailableError
from ..measure import timeline
from ..measure.context import NodeContext
from ..measure.drawn.accuracy import checkpoint_path
from ..measure.environment import environment, environment_hash
from ..measure.store import RunStore, cannot_write, write_atomically
from ..measure.summary import CACHED, FULL, rows_of
from ..measure.trace import StepRow
from ..memory.predict import ImageSize, parts_of, predict
from ..models.loading import SOURCE, family_of, sampled_hash
from ..patching.wrappers import accelerators
from ..techniques.compile.attach import fastest_here
from . import tuned
from .axes import CellSettings
from .cell import OneRun, Prompt, check_sampler
from .in_turn import Series, turns
from .plan_text import PRESETS, TechniqueText
from .sheet import data_url, thumbnail
from .techniques import NodeTable, check_techniques, sigmas_node
from .techniques import Parts as Models
from .tune_images import Images
from .tune_search import FLOORS, Found, Look, Refused, Search, holds
from .tune_space import (
    DECODERS,
    SKIPS,
    Candidate,
    Kind,
    Parts,
    VariantParts,
    fewer_steps,
    is_exact,
    of_line,
    predicted_s,
    space,
    why_not,
)

log = logging.getLogger(__name__)

HELD_OUT = 2
_SEED_STEP = 1000003
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
_LONG_REFERENCE = 3
_COMPILE_FROM_MINUTES = 10.0
SCHEMA = 1
EVENT = "speedlab.tune"


@dataclass(frozen=True)
class TuneRequest:
    """What Tune was asked. `candidates`: plan lines in place of the whole space; `steps` and `samplers` open axes."""

    base: CellSettings
    prompts: tuple[Prompt, ...]
    quality: str = "close"
    minutes: float = 10.0
    budget_gb: float = 0.0
    candidates: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    samplers: tuple[tuple[str, str], ...] = ()

    def all_prompts(self) -> tuple[Prompt, ...]:
        """Those of the choice, at least two, then the held-out ones: the same texts with other seeds."""
        texts = self.prompts if len(self.prompts) > 1 else (*self.prompts, _other(self.prompts[0], 1))
        return (*texts, *(_other(texts[n % len(texts)], n + 2) for n in range(HELD_OUT)))


def _other(prompt: Prompt, number: int) -> Prompt:
    return replace(prompt, seed=(prompt.seed + number * _SEED_STEP) % 2**64)


@dataclass
class TuneResult:
    """What a tune found, and all that its report shows. `pictures`: thumbnails by plan line and settings."""

    request: TuneRequest
    tuned_for: tuned.TunedFor
    env: dict[str, Any]
    parts: Parts | None = None
    found: Found | None = None
    stock_s: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    size: int = 0
    pictures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    synthetic: bool = False
    sigmas: tuple[str, dict[str, Any]] | None = None  # the best plan's node of sigmas, as `_workflow` has its model
    state_path: Path | None = None


class Tune:
    """One tune. `run` does it all; a cancel leaves what was measured, and the best so far as the tuned plan."""

    def __init__(self, models: Models, request: TuneRequest, nodes: NodeTable, context: NodeContext) -> None:
        if request.minutes <= 0:
            raise SpeedLabError("Tune needs time: set budget_minutes above 0.")
        self.models, self.request, self.nodes, self.context = models, request, nodes, context
        self.store = RunStore(output_directory())
        env = environment(models.model.load_device)
        base = request.base
        self.tuned_for = tuned.TunedFor(
            str(env["device"]), family_of(models.model), base.width, base.height, base.batch, base.sampler,
            base.scheduler,
        )  # fmt: skip
        self.result = TuneResult(request, self.tuned_for, env)
        self.lines = [of_line(line, base) for line in request.candidates]
        self.user = Candidate("", steps=base.steps, sampler=base.sampler, scheduler=base.scheduler)
        opened = [replace(self.user, sampler=sampler, scheduler=scheduler) for sampler, scheduler in request.samplers]
        for one in (self.user, *opened, *self.lines):
            settings = one.over(base)
            check_techniques(settings, nodes)
            check_sampler(settings)
        self.prompts = request.all_prompts()
        steps = base.steps * _LONG_REFERENCE if self._opened else base.steps
        self.images = Images(models, base, self.prompts, nodes, context, self.store, steps)
        self.known: dict[str, Any] = {"schema": SCHEMA, "looks": {}, "seen": {}}
        self._node = timeline.executing().node_id
        self._search: Search | None = None
        self._new = self._own = name_of(replace(self.user, steps=steps))

    def run(self) -> TuneResult:
        """Tune. Raises SpeedLabError where not even one plan could be measured, and what a cancel raises."""
        import comfy.utils

        self.store.check_writable()
        with _alone(tuned.folder_of(self.store)):
            self.started = time.monotonic()
            self._bar = comfy.utils.ProgressBar(max(round(self.request.minutes * 60), 1))
            self._open()
            self.images.file = f"tune-{self.known_key}"
            search: Search | None = None
            try:
                self._say("your own image")
                parts = self.result.parts = self._measure_parts()
                predicted = self._predicted(parts)
                choice = len(self.prompts) - HELD_OUT
                search = self._search = Search(
                    predicted, self.user, FLOORS[self.request.quality], choice, HELD_OUT, self._look, self._left
                )
                if not self._opened:
                    search.see(self.user, self.images.references[0].total_ms / 1000.0)
                self.result.found = search.find()
            except BaseException:
                # What was found so far is not lost by a cancel, nor by what goes wrong later.
                if search is not None:
                    best = search.best_so_far()
                    self.result.found = Found(best, [], search.tried, ["The tune was cut off: nothing is confirmed."])
                    # The cancel, or the error, is what ComfyUI has to see.
                    with suppress(ResultsError):
                        self._keep(confirmed=False)
                    self._show("cut")
                raise
            found = self.result.found
            self._show("done")
            held_out = range(len(self.prompts) - HELD_OUT, len(self.prompts))
            self._keep(confirmed=found.best is not None and set(held_out) <= found.best.looks.keys())
            if self.known_path is not None and found.complete:
                self.known_path.unlink(missing_ok=True)
        return self.result

    # What is kept between calls

    def _open(self) -> None:
        source = self.models.model.get_attachment(SOURCE)
        path = checkpoint_path(self.models.model, self.context)
        self.result.synthetic = path is not None and _is_made_up(path)
        told = {
            "request": asdict(self.request) | {"minutes": 0, "prompts": [asdict(p) for p in self.prompts]},
            "env": environment_hash(self.result.env),
            "checkpoint": sampled_hash(source.path) if source is not None else None,
            "weights": str(self.models.model.patches_uuid) if self.models.model.patches else "",
            "attached": [one.describe() for one in accelerators(self.models.model)],
        }
        key = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = tuned.folder_of(self.store) / "unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        # Without a file that tells the weights apart nothing could be resumed safely.
        self.known_path = folder / f"{key}.json" if source is not None else None
        if self.known_path is None or not self.known_path.is_file():
            return
        try:
            known = json.loads(self.known_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(known, dict) and known.get("schema") == SCHEMA:
            self.known = known
            self.result.notes.append(f"{len(known['looks'])} images were measured by an earlier call that was cut off.")

    def _write(self) -> None:
        if self.known_path is not None:
            try:
                write_atomically(self.known_path, json.dumps(self.known).encode())
            except OSError as error:
                raise cannot_write(self.known_path, error) from error

    def _keep(self, confirmed: bool) -> None:
        """Save the choice as the tuned plan."""
        self.result.stock_s = self._stock_s()
        best = self.result.found.best if self.result.found is not None else None
        if best is None:
            return
        one, base = best.candidate, self.request.base
        made_by = sigmas_node(one.over(base), self.models.model, self.nodes)
        if made_by is not None:
            inputs = {n: ["plan", 0] if value is self.models.model else value for n, value in made_by[1].items()}
            self.result.sigmas = made_by[0], inputs
        figures = {
            "time_s": best.seconds, "predicted_s": best.expected, "stock_s": self.result.stock_s,
            "latent_error": best.mean.latent, "quality": self.request.quality, "confirmed": confirmed,
            "steps": base.steps, "cfg": base.cfg, "synthetic": self.result.synthetic,
        }  # fmt: skip
        tuned.keep(
            self.store,
            tuned.TunedPlan(
                self.tuned_for, one.line, self._differs(one), tuned.versions_of(self.result.env), figures, time.time()
            ),
        )

    def _stock_s(self) -> float | None:
        """What the user's own image takes, the median of all; None where the reference has more steps than that."""
        own = [run.total_ms for run in self.images.references.values()]
        return statistics.median(own) / 1000.0 if own and not self._opened else None

    def _differs(self, one: Candidate) -> dict[str, Any]:
        """What the user has to set on the sampler beside the plan."""
        base = self.request.base
        names = ("steps", "sampler", "scheduler")
        return {name: getattr(one, name) for name in names if getattr(one, name) != getattr(base, name)}

    # Running one plan

    @property
    def _opened(self) -> bool:
        return bool(self.request.steps or self.request.samplers)

    def _left(self) -> float:
        return self.request.minutes * 60.0 - (time.monotonic() - self.started)

    def _say(self, doing: str) -> None:
        self._bar.update_absolute(min(round(time.monotonic() - self.started), self._bar.total), self._bar.total)
        best = self._search.best_so_far() if self._search is not None else None
        so_far = "" if best is None else f"; best so far {best.candidate.line}, {best.seconds:.2f} s"
        text = f"Tune: {doing}{so_far}, {max(self._left(), 0) / 60:.1f} min left"
        log.info("SpeedLab: %s", text)
        show_on_node(text, self._node)
        self._show("running")

    @property
    def known_key(self) -> str:
        """The name of this tune's files."""
        return self.known_path.stem if self.known_path is not None else "now"

    def _reference(self, prompt: int) -> OneRun:
        """The user's own image. It is one more measurement of how fast the machine is now."""
        new = prompt not in self.images.references
        run = self.images.reference(prompt)
        if new:
            self.result.pictures.setdefault(self._own, thumbnail(run.pictures))
            if self._search is not None and not self._opened:
                self._search.see(self.user, run.total_ms / 1000.0)
        return run

    def _look(self, candidate: Candidate, prompt: int) -> Look:
        key = f"{name_of(candidate)} #{prompt}"
        known = self.known["looks"].get(key)
        if known is not None:
            return Look(**known)
        self._reference(prompt)
        self._say(f"{candidate.line}, image {prompt + 1}")
        look, run = self.images.look(candidate, prompt)
        self.result.pictures.setdefault(name_of(candidate), thumbnail(run.pictures))
        self.known["seen"][candidate.skip] = _forecasts(run)
        self.known["looks"][key] = asdict(look)
        self._write()
        self._new = name_of(candidate)
        return look

    def _show(self, state: str) -> None:
        """The front so far for the browser, with the image that came last; see js/lib/front.js."""
        search, floor = self._search, FLOORS[self.request.quality]
        if search is None:
            return
        found = self.result.found
        best = search.best_so_far() if found is None else found.best
        picture = self.result.pictures.get(self._new)
        points = [
            {
                "name": name_of(one.candidate), "plan": one.candidate.line, "set": self._differs(one.candidate),
                "s": round(one.seconds, 4), "error": one.mean.latent, "best": one is best,
                "good": one.why is None and holds(one.mean, floor),
            }
            for one in search.tried
            if one.looks
        ]  # fmt: skip
        tell_browser(
            EVENT,
            {
                "node": self.context.node_id, "workflow": self.context.workflow_id(), "state": state, "points": points,
                "stock_s": self._stock_s(),
                "floor": floor.latent if math.isfinite(floor.latent) else None,
                "pictures": {} if picture is None else {self._new: data_url(picture)},
            },
        )  # fmt: skip

    # The parts

    def _variants(self) -> list[str]:
        if self.lines:
            return list(dict.fromkeys(["", *(one.variant for one in self.lines)]))
        model, exact = self.models.model, PRESETS["exact"]
        variants = ["", exact]
        if self.request.budget_gb and model.load_device.type != "cpu":
            variants += [f"{exact}+memory_plan({offload})" for offload in ("model", "sequential")]
        import torch

        fast_bf16 = cpu_computes_bf16() if model.load_device.type == "cpu" else True
        if model.get_attachment(SOURCE) is not None and model.model.get_dtype() == torch.float32 and fast_bf16:
            variants.append(f"weights(bf16)+{exact}")
        # Last, because compiling may take as long as many images.
        if self.request.minutes < _COMPILE_FROM_MINUTES:
            self.result.notes.append(f"Compiling was left out: give {_COMPILE_FROM_MINUTES:g} minutes or more for it.")
            return list(dict.fromkeys(variants))
        _, _, rest = exact.partition("+")
        # A program of the whole network brings its own attention.
        for by_blocks, beside in ((False, rest), (True, exact)):
            try:
                compiled = TechniqueText("compile", fastest_here(model, by_blocks)).words()
            except UnavailableError as error:
                self.result.notes.append(str(error))
                continue
            variants.append(f"{beside}+{compiled}")
        return list(dict.fromkeys(variants))

    def _measure_parts(self) -> Parts:
        self._reference(0)
        guided = self.request.base.cfg != 1.0
        probes = self._measure_variants()
        runs = [run for one in probes for run in one.repeats]
        text = statistics.median(run.encode_ms for run in runs)
        save = statistics.median(run.save_ms for run in runs)
        variants = {one.variant: _variant_parts(one, text, self._predicted_gb()) for one in probes}
        decoders = {"": statistics.median(run.decode_ms for run in runs)}
        wanted = {one.decoder for one in self.lines} if self.lines else {"tiny"}
        for decoder in sorted(wanted - {""}):
            try:
                # The first one loads the decoder.
                times = [self._probe("", decoder, 1, "").decode_ms for _ in range(1 + _PROBE_ROUNDS)][1:]
                decoders[decoder] = statistics.median(times)
            except Refused as error:
                self.result.notes.append(f"{decoder} is left out: {error}")
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
        probes = [Probes(variant=variant) for variant in self._variants()]
        for turn in turns(
            probes, _PROBE_ROUNDS, 1, lambda done: done < 2 or self._left() > seconds * (1.0 - _PARTS_SHARE)
        ):
            one = turn.series
            if not turn.counts and any(other.first for other in probes) and self._left() < seconds * _VARIANTS_UNTIL:
                one.status = "no time"
                continue
            self._say(f"measuring the parts of {one.variant or 'stock'}, {turn.text}")
            # A second way of computing is worth nothing without time for an image of it.
            if turn.counts and any(other.repeats for other in probes) and self._left() < seconds * _IMAGES_FROM:
                if not one.repeats:
                    one.status = "no time"
                continue
            run = self._probe_turn(one, _PROBE_STEPS if turn.counts else _FIRST_STEPS)
            if run is not None:
                turn.keep(run)
        if any(one.status == "no time" for one in probes):
            self.result.notes.append("The minutes did not allow every way of computing to be measured.")
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
        self.result.notes.append(f"{one.variant or 'stock'} is left out: {one.refused['all']}")
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

    def _predicted_gb(self) -> float:
        """What a run takes by prediction, where the device does not tell: on a CPU what another device would need."""
        models, base = self.models, self.request.base
        parts = parts_of(models.model, models.clip, models.vae, ImageSize(base.width, base.height, base.batch))
        return predict(parts, "none").peak / 1e9

    def _measure_forecast(self, variants: Mapping[str, VariantParts], guided: bool) -> tuple[float, dict[str, int]]:
        """A forecast step, and how many of them there are where the image decides."""
        skips = {one.skip for one in self.lines} if self.lines else set(SKIPS)
        if not any("forecast" in text for text in skips):
            return math.nan, {}
        try:
            run = self._probe("", "", _FORECAST_STEPS, "forecast(mode=fixed,max_skip=1)")
        except Refused as error:
            self.result.notes.append(f"Forecast is left out: {error}")
            return math.nan, {}
        times = [row.ms for row in rows_of(run.record.steps) if not row.cond_rows and not row.uncond_rows]
        seen: dict[str, int] = {}
        exact = min(
            (name for name in variants if all(map(is_exact, filter(None, name.split("+"))))),
            key=lambda name: variants[name].steps.get((FULL, guided), math.inf),
        )
        for text in sorted(text for text in skips if text.startswith("forecast") and "fixed" not in text):
            if self._left() > self.request.minutes * 30.0:
                with suppress(Refused):
                    self._look(replace(self.user, variant=exact, skip=text), 0)
                    seen[text] = self.known["seen"][text]
        return (statistics.median(times) if times else 0.0), seen

    def candidates(self, variants: Sequence[str] = (), decoders: Sequence[str] = DECODERS) -> list[Candidate]:
        """Every plan that this tune chooses from; without `variants` of all ways of computing that may run here."""
        request, variants = self.request, list(variants) or self._variants()
        if self.lines:
            return list(dict.fromkeys([*self.lines, *fewer_steps(variants, request.base, decoders)]))
        return space(variants, request.base, decoders, request.steps, request.samplers)

    def _predicted(self, parts: Parts) -> dict[Candidate, float]:
        found = self.candidates(list(parts.variants), list(parts.decoders))
        request = self.request
        self.result.size = len(found)
        predicted: dict[Candidate, float] = {}
        for one in found:
            reason = why_not(one, parts, request.budget_gb)
            seconds = None if reason is not None else predicted_s(one, parts)
            if seconds is not None and math.isfinite(seconds):
                predicted[one] = seconds
            else:
                reason = (reason or "its time cannot be predicted").rstrip(".")
                self.result.dropped[reason] = self.result.dropped.get(reason, 0) + 1
        if not predicted:
            reasons = "; ".join(self.result.dropped) or "nothing was measured"
            raise SpeedLabError(f"Tune has no plan to try: {reasons}. Raise budget_gb, or give other candidates.")
        return predicted


@dataclass(kw_only=True, eq=False)
class Probes(Series[OneRun]):
    """Short runs of one way of computing; `techniques`: what they run with, the first that is not refused."""

    variant: str
    techniques: list[str] = field(default_factory=lambda: ["deepcache(2)+dynamic_cfg(0.6)", "dynamic_cfg(0.6)", ""])
    refused: dict[str, str] = field(default_factory=dict)


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


def _is_made_up(path: Path) -> bool:
    """Whether a checkpoint says of itself that its weights are random, as this pack's demo files do."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "random weights" in (file.metadata() or {}).get("modelspec.title", "")
    except (OSError, SafetensorError):
        return False


def _forecasts(run: OneRun) -> int:
    return sum(not row.cond_rows and not row.uncond_rows for row in rows_of(run.record.steps))


def name_of(candidate: Candidate) -> str:
    """A candidate with the sampler's settings, in one line."""
    return f"{candidate.line} @ {candidate.steps} {candidate.sampler}/{candidate.scheduler}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two tunes at once would measure each other."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "tune.lock", timeout=0)
    try:
        with lock:
            yield
    except filelock.Timeout as error:
        raise SpeedLabError(
            "Another Tune is running with this output folder, and two would measure each other. Wait until it ends."
        ) from error

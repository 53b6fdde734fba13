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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..common.core import output_directory, show_on_node
from ..common.dtypes import cpu_computes_bf16
from ..common.errors import ResultsError, SpeedLabError, UnavailableError
from ..measure import timeline
from ..measure.compare import compare_latents
from ..measure.context import NodeContext
from ..measure.drawn.accuracy import accuracy, draws
from ..measure.environment import environment, environment_hash
from ..measure.store import RunStore, cannot_write, write_atomically
from ..measure.summary import CACHED, FULL, rows_of
from ..memory.predict import ImageSize, parts_of, predict
from ..models.loading import SOURCE, family_of, sampled_hash
from ..patching.wrappers import accelerators
from ..sampling.complete import save_pngs
from ..sampling.profiled import failure_message, failure_status
from ..techniques.compile.attach import fastest_here
from . import tuned
from .axes import CellSettings
from .cell import OneRun, Prompt, Reloader, check_sampler, prepare, run_once
from .cell_record import quality_of
from .in_turn import own_failure
from .plan_text import PRESETS, TechniqueText
from .sheet import thumbnail
from .techniques import NodeTable, check_techniques
from .techniques import Parts as Models
from .tune_search import FLOORS, Found, Look, Refused, Search
from .tune_space import (
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
_PROBE_STEPS = 8
_FORECAST_STEPS = 10
_LONG_REFERENCE = 3
_COMPILE_FROM_MINUTES = 10.0
SCHEMA = 1


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
        for one in self.lines:
            check_techniques(one.over(base), nodes)
        for sampler, scheduler in (*request.samplers, (base.sampler, base.scheduler)):
            check_sampler(replace(base, sampler=sampler, scheduler=scheduler))
        self.user = Candidate("", steps=base.steps, sampler=base.sampler, scheduler=base.scheduler)
        self.prompts = request.all_prompts()
        self.reloader = Reloader(models)
        self._draws = draws(models.model, context)
        self.references: dict[int, OneRun] = {}
        self.known: dict[str, Any] = {"schema": SCHEMA, "looks": {}, "seen": {}}
        self._weights: Any = models.model.model
        self._node = timeline.executing().node_id
        self._search: Search | None = None

    def run(self) -> TuneResult:
        """Tune. Raises SpeedLabError where not even one plan could be measured, and what a cancel raises."""
        import comfy.utils

        self.store.check_writable()
        with _alone(tuned.folder_of(self.store)):
            self.started = time.monotonic()
            self._bar = comfy.utils.ProgressBar(max(round(self.request.minutes * 60), 1))
            self._open()
            search: Search | None = None
            try:
                self._say("your own image")
                parts = self.result.parts = self._measure_parts()
                predicted = self._predicted(parts)
                choice = len(self.prompts) - HELD_OUT
                search = self._search = Search(
                    predicted, self.user, FLOORS[self.request.quality], choice, HELD_OUT, self._look, self._left
                )
                self.result.found = search.find()
            except BaseException:
                # What was found so far is not lost by a cancel, nor by what goes wrong later.
                if search is not None:
                    best = search.best_so_far()
                    self.result.found = Found(best, [], search.tried, ["The tune was cut off: nothing is confirmed."])
                    # The cancel, or the error, is what ComfyUI has to see.
                    with suppress(ResultsError):
                        self._keep(confirmed=False)
                raise
            found = self.result.found
            held_out = range(len(self.prompts) - HELD_OUT, len(self.prompts))
            self._keep(confirmed=found.best is not None and set(held_out) <= found.best.looks.keys())
            if self.known_path is not None and found.complete:
                self.known_path.unlink(missing_ok=True)
        return self.result

    # What is kept between calls

    def _open(self) -> None:
        source = self.models.model.get_attachment(SOURCE)
        self.result.synthetic = source is not None and _is_made_up(source.path)
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
        if self.result.parts is not None and not self._opened:
            made = statistics.median(run.total_ms for run in self.references.values()) / 1000.0
            self.result.stock_s = made
        best = self.result.found.best if self.result.found is not None else None
        if best is None:
            return
        one, base = best.candidate, self.request.base
        differs = {
            name: getattr(one, name)
            for name in ("steps", "sampler", "scheduler")
            if getattr(one, name) != getattr(base, name)
        }
        figures = {
            "time_s": best.seconds, "predicted_s": best.predicted, "stock_s": self.result.stock_s,
            "latent_error": best.mean.latent, "quality": self.request.quality, "confirmed": confirmed,
            "steps": base.steps, "cfg": base.cfg, "synthetic": self.result.synthetic,
        }  # fmt: skip
        tuned.keep(
            self.store,
            tuned.TunedPlan(
                self.tuned_for, one.line, differs, tuned.versions_of(self.result.env), figures, time.time()
            ),
        )

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

    def _step(self, _step: int) -> None:
        import comfy.model_management as mm

        mm.throw_exception_if_processing_interrupted()

    def _once(self, settings: CellSettings, prompt: int) -> OneRun:
        """One image. Raises Refused with the reason where the plan cannot run."""
        import comfy.model_management as mm

        failed: list[str] = []

        def note(error: Exception) -> str:
            failed.append(failure_message(error))
            return failure_status(error)

        with own_failure(note):
            prepared = prepare(self.models, settings, self.nodes, self.reloader)
            weights = prepared.parts.model.model
            if weights is not self._weights:
                mm.unload_all_models()
                self._weights = weights
            save = partial(self._save, self.prompts[prompt])
            return run_once(prepared, self.prompts[prompt], self.context, self._step, save)
        raise Refused(failed[0] if failed else "it ended without an image")

    def _save(self, _prompt: Prompt, images: Any) -> list[str]:
        """The image of one plan replaces that of the one before: what counts is the time that saving takes."""
        paths = save_pngs(images, f"tune-{self.known_key}", self.context, self.store)
        return [path.relative_to(self.store.root.parent).as_posix() for path in paths]

    @property
    def known_key(self) -> str:
        """The name of this tune's files."""
        return self.known_path.stem if self.known_path is not None else "now"

    def _reference(self, prompt: int) -> OneRun:
        """The user's own image, uncompressed; a longer one where steps or samplers are open."""
        if prompt not in self.references:
            base = self.request.base
            steps = base.steps * _LONG_REFERENCE if self._opened else base.steps
            try:
                if not self.references:
                    # What is not loaded yet would count as the user's own time.
                    self._once(replace(base, steps=1), prompt)
                self.references[prompt] = self._once(replace(base, steps=steps), prompt)
            except Refused as error:
                raise SpeedLabError(f"Tune cannot make the image that it compares with: {error}") from error
            self.result.pictures.setdefault(name_of(self.user), thumbnail(self.references[prompt].pictures))
        return self.references[prompt]

    def _look(self, candidate: Candidate, prompt: int) -> Look:
        key = f"{name_of(candidate)} #{prompt}"
        known = self.known["looks"].get(key)
        if known is not None:
            return Look(**known)
        reference = self._reference(prompt)
        self._say(f"{candidate.line}, image {prompt + 1}")
        run = self._once(candidate.over(self.request.base), prompt)
        quality = quality_of(run.pictures, reference.pictures)
        if quality is None:
            raise Refused("its image has another size than the user's own")
        error = compare_latents(run.latent, reference.latent).relative_error
        right = accuracy(run.pictures, [self.prompts[prompt].text]) if self._draws else None
        look = Look(run.total_ms / 1000.0, error, quality.ssim, min(quality.psnr, 200.0), quality.lpips, right)
        if not math.isfinite(error):
            raise Refused("its latent has NaN or Inf")
        self.result.pictures.setdefault(name_of(candidate), thumbnail(run.pictures))
        self.known["seen"][candidate.skip] = _forecasts(run)
        self.known["looks"][key] = asdict(look)
        self._write()
        return look

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
        reference = self._reference(0)
        decoders = {"": reference.decode_ms}
        guided = self.request.base.cfg != 1.0
        wanted = {one.decoder for one in self.lines} if self.lines else {"tiny"}
        variants: dict[str, VariantParts] = {}
        wanted_variants = self._variants()
        for number, variant in enumerate(wanted_variants, start=1):
            self._say(f"measuring the parts of {variant or 'stock'}")
            measured = self._measure_variant(variant)
            if measured is not None:
                variants[variant] = measured
            if number < len(wanted_variants) and variants and self._left() < self.request.minutes * 40.0:
                self.result.notes.append("The minutes did not allow every way of computing to be measured.")
                break
        for decoder in sorted(wanted - {""}):
            try:
                decoders[decoder] = self._probe("", decoder, 1, "").decode_ms
            except Refused as error:
                self.result.notes.append(f"{decoder} is left out: {error}")
        forecast, seen = self._measure_forecast(variants, guided)
        return Parts(reference.encode_ms, reference.save_ms, decoders, variants, forecast, seen, guided)

    def _probe(self, variant: str, decoder: str, steps: int, techniques: str) -> OneRun:
        """A short run of a variant."""
        base = self.request.base
        line = "+".join(text for text in (variant, techniques, decoder) if text) or "stock"
        probe = replace(of_line(line, base), steps=steps)
        return self._once(probe.over(base), 0)

    def _measure_variant(self, variant: str) -> VariantParts | None:
        refused: dict[str, str] = {}
        for techniques in ("deepcache(2)+dynamic_cfg(0.5)", "dynamic_cfg(0.5)"):
            try:
                # The first run compiles, and finds what is not loaded yet.
                self._probe(variant, "", _PROBE_STEPS, techniques)
                run = self._probe(variant, "", _PROBE_STEPS, techniques)
            except Refused as error:
                refused["deepcache" if techniques.startswith("deepcache") else "all"] = str(error)
                continue
            return _variant_parts(run, refused, self._predicted_gb())
        self.result.notes.append(f"{variant or 'stock'} is left out: {refused['all']}")
        return None

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

    def _predicted(self, parts: Parts) -> dict[Candidate, float]:
        decoders = list(parts.decoders)
        request = self.request
        found = (
            list(dict.fromkeys([*self.lines, *fewer_steps(list(parts.variants), request.base, decoders)]))
            if self.lines
            else space(list(parts.variants), request.base, decoders, request.steps, request.samplers)
        )
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


def _variant_parts(run: OneRun, refused: dict[str, str], predicted_gb: float) -> VariantParts:
    rows = rows_of(run.record.steps)
    kinds: list[Kind] = [(CACHED if row.cached else FULL, bool(row.uncond_rows)) for row in rows]
    steps: dict[Kind, float] = {}
    for kind in set(kinds):
        # The first step also prepares, and stands for its kind only where nothing else does.
        mine = [row.ms for row, its in zip(rows[1:], kinds[1:], strict=True) if its == kind]
        steps[kind] = statistics.median(mine or [rows[0].ms])
    extra = sum(float(run.record.phases_ms.get(name) or 0.0) for name in ("to_device", "prepare"))
    beside = max(run.sample_ms + extra - sum(steps[kind] for kind in kinds), 0.0)
    peak = run.record.memory.get("overall", {}).get("peak_allocated_gb")
    return VariantParts(steps, beside, peak if peak is not None else predicted_gb, refused)


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

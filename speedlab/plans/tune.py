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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.core import output_directory, progress_bar, show_on_node, tell_browser
from ..common.errors import ResultsError, SpeedLabError
from ..measure import timeline
from ..measure.context import NodeContext
from ..measure.drawn.accuracy import checkpoint_path
from ..measure.environment import environment, environment_hash
from ..measure.store import RunStore, cannot_write, write_atomically
from ..models.loading import HASHED, SOURCE, family_of, sampled_hash
from ..patching.wrappers import accelerators
from . import tuned
from .cell import OneRun, check_sampler
from .sheet import data_url, thumbnail
from .techniques import NodeTable, check_techniques, sigmas_node
from .techniques import Parts as Models
from .tune_images import Images
from .tune_parts import PartsMeasurement, forecasts_of
from .tune_request import HELD_OUT, TuneRequest
from .tune_search import FLOORS, NO_TIME, Found, Look, OutOfTime, Search, holds
from .tune_space import (
    DECODERS,
    Candidate,
    Parts,
    fewer_steps,
    of_line,
    over_budget,
    predicted_s,
    space,
    why_not,
)

log = logging.getLogger(__name__)

_LONG_REFERENCE = 3
SCHEMA = 1
EVENT = "speedlab.tune"


@dataclass
class TuneResult:
    """What a tune found, and all that its report shows. `thumbnails`: thumbnails by plan line and settings."""

    request: TuneRequest
    tuned_for: tuned.TunedFor
    env: dict[str, Any]
    parts: Parts | None = None
    found: Found | None = None
    stock_s: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    size: int = 0
    thumbnails: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    synthetic: bool = False
    checkpoint: dict[str, str] = field(default_factory=dict)  # its file's name and hash, as far as these are known
    sigmas: tuple[str, dict[str, Any]] | None = None  # the best plan's node of sigmas, as `_workflow` has its model


class Tune:
    """One tune. `run` does it all; a cancel leaves what was measured, and the best so far as the tuned plan."""

    def __init__(self, models: Models, request: TuneRequest, nodes: NodeTable, context: NodeContext) -> None:
        if not request.minutes > 0:
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
        self._parts = PartsMeasurement(
            models, request, self.lines, self.images, self.result.notes, self._left, self._say, self._count_forecasts
        )
        self.known: dict[str, Any] = {"schema": SCHEMA, "looks": {}, "seen": {}}
        self._node = timeline.executing().node_id
        self._search: Search | None = None
        self._new = self._own = name_of(replace(self.user, steps=steps))

    def run(self) -> TuneResult:
        """Tune. Raises SpeedLabError where not even one plan could be measured, and what a cancel raises."""
        self.store.check_writable()
        with _alone(tuned.folder_of(self.store)):
            self.started = time.monotonic()
            self._bar = progress_bar(max(round(self.request.minutes * 60), 1))
            self._open()
            self.images.file = f"tune-{self.known_key}"
            search: Search | None = None
            # On a CPU all plans take what is predicted, which is known before anything runs.
            if self.request.budget_gb and self.models.model.load_device.type == "cpu":
                self._refuse(over_budget(self._parts.predicted_gb(), self.request.budget_gb))
            try:
                self._say("your own image")
                own = self._reference(0)
                if self._left() < self._parts.least_s(own):
                    took = f"Your own image took {own.total_ms / 1000.0:.1f} s."
                    self.result.found = Found(None, [], [], [NO_TIME, took])
                else:
                    search = self._search = self._searching()
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
            show_on_node(f"Tune: done in {(time.monotonic() - self.started) / 60:.1f} min", self._node)
            held_out = range(len(self.prompts) - HELD_OUT, len(self.prompts))
            self._keep(confirmed=found.best is not None and set(held_out) <= found.best.looks.keys())
            if self.known_path is not None and found.complete:
                self.known_path.unlink(missing_ok=True)
        return self.result

    def _searching(self) -> Search:
        """The search, after the parts of its plans were measured."""
        parts = self.result.parts = self._parts.measure()
        predicted = self._predicted(parts)
        choice = len(self.prompts) - HELD_OUT
        search = Search(predicted, self.user, FLOORS[self.request.quality], choice, HELD_OUT, self._look, self._left)
        if not self._opened:
            search.see(self.user, self.images.references[0].total_ms / 1000.0)
        return search

    # What is kept between calls

    def _open(self) -> None:
        source = self.models.model.get_attachment(SOURCE)
        if source is not None:
            # Another file under the old name would be measured as this one.
            source.check_unchanged()
        path = checkpoint_path(self.models.model, self.context)
        self.result.synthetic = path is not None and _is_made_up(path)
        if path is not None:
            self.result.checkpoint = {"name": path.name, "sampled_sha256": sampled_hash(path), "hashed": HASHED}
        identity = {
            "request": asdict(self.request) | {"minutes": 0, "prompts": [asdict(p) for p in self.prompts]},
            "env": environment_hash(self.result.env),
            "checkpoint": self.result.checkpoint.get("sampled_sha256"),
            "weights": str(self.models.model.patches_uuid) if self.models.model.patches else "",
            "attached": [one.describe() for one in accelerators(self.models.model)],
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = tuned.folder_of(self.store) / "unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        # Without a file that tells the weights apart nothing could be resumed safely.
        self.known_path = folder / f"{key}.json" if source is not None else None
        if self.known_path is None or not self.known_path.is_file():
            return
        try:
            known = json.loads(self.known_path.read_text(encoding="utf-8"))
            for look in known["looks"].values():
                Look(**look)
            dict(known["seen"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return
        if known.get("schema") == SCHEMA:
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
            "checkpoint": self.result.checkpoint.get("sampled_sha256"), "asked": self._asked(),
        }  # fmt: skip
        plan = tuned.TunedPlan(
            self.tuned_for, one.line, self._differs(one), tuned.versions_of(self.result.env), figures, time.time()
        )
        # LoRAs have no name that holds from one start to the next, by which they could be told to be the same.
        other = confirmed or bool(self.models.model.patches)
        known = None if other else tuned.confirmed_before(self.store, plan)
        if known is None:
            tuned.keep(self.store, plan)
        else:
            self.result.notes.append(f"The tuned plan stays {known.plan}, which an earlier tune confirmed.")

    def _asked(self) -> str:
        """What limits a choice beside what the plan is for, as text."""
        one = self.request
        return str((one.budget_gb, one.candidates, one.steps, one.samplers))

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
            self.result.thumbnails.setdefault(self._own, thumbnail(run.images))
            if self._search is not None and not self._opened:
                self._search.see(self.user, run.total_ms / 1000.0)
        return run

    def _look(self, candidate: Candidate, prompt: int) -> Look:
        key = f"{name_of(candidate)} #{prompt}"
        known = self.known["looks"].get(key)
        if known is not None:
            return Look(**known)
        if prompt not in self.images.references and self._left() < self.images.references[0].total_ms / 1000.0:
            # The user's own image on this prompt has to be made first.
            raise OutOfTime
        self._reference(prompt)
        self._say(f"{candidate.line}, image {prompt + 1}")
        look, run = self.images.look(candidate, prompt)
        self.result.thumbnails.setdefault(name_of(candidate), thumbnail(run.images))
        self.known["seen"][candidate.skip] = forecasts_of(run)
        self.known["looks"][key] = asdict(look)
        self._write()
        self._new = name_of(candidate)
        return look

    def _count_forecasts(self, variant: str, skip: str) -> int:
        self._look(replace(self.user, variant=variant, skip=skip), 0)
        return int(self.known["seen"][skip])

    def _show(self, state: str) -> None:
        """The front so far for the browser, with the image that came last; see js/lib/front.js."""
        search, floor = self._search, FLOORS[self.request.quality]
        if search is None:
            return
        found = self.result.found
        best = search.best_so_far() if found is None else found.best
        latest = self.result.thumbnails.get(self._new)
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
                "pictures": {} if latest is None else {self._new: data_url(latest)},
            },
        )  # fmt: skip

    def candidates(self, variants: Sequence[str] = (), decoders: Sequence[str] = DECODERS) -> list[Candidate]:
        """Every plan that this tune chooses from; without `variants` of all ways of computing that may run here."""
        request, variants = self.request, list(variants) or self._parts.variants()
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
            self._refuse("; ".join(self.result.dropped) or "nothing was measured")
        return predicted

    def _refuse(self, reasons: str | None) -> None:
        if reasons is not None:
            raise SpeedLabError(f"Tune has no plan to try: {reasons}. Raise budget_gb, or give other candidates.")


def _is_made_up(path: Path) -> bool:
    """Whether a checkpoint says of itself that its weights are random, as this pack's demo files do."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "random weights" in (file.metadata() or {}).get("modelspec.title", "")
    except (OSError, SafetensorError):
        return False


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

"""Runs a sweep: its cells are measured in turn.

What a table cannot show, in sentences: what failed, the largest batch, where throughput saturates, overhead.

How far a sweep is: ComfyUI's bar over all steps, and a line with the time left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..common.core import output_directory, progress_bar, show_on_node
from ..common.errors import ResultsError
from ..measure import timeline
from ..measure.context import NodeContext
from ..measure.drawn.accuracy import accuracy, draws
from ..measure.peaks import rss_bytes
from ..measure.store import RunStore, new_run_id
from ..sampling.complete import save_pngs
from ..sampling.profiled import failure_message, failure_status
from .axes import MOST_IMAGES, Axis, Cell, CellSettings, baseline_of, make_cell, make_cells, parse_axis, with_batch
from .batch_search import BatchSearch, NotTriedError, refuse_too_large, saturation_point
from .cell import OneRun, Prepared, Prompt, Reloader, check_sampler, prepare, run_once
from .cell_record import CellRuns, SweepFacts, failed_record, measured_record, quality_of
from .in_turn import Turn, own_failure, turns
from .plan_text import parse_plan
from .sheet import keep_image, thumbnail
from .techniques import NodeTable, Parts, check_techniques

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepRequest:
    """What Benchmark was asked: axes and plan as written, settings of every cell, prompts, runs a cell."""

    axis_x: str
    values_x: str
    axis_y: str
    values_y: str
    base: CellSettings
    plan: str
    prompts: tuple[Prompt, ...]
    warmup: int = 1
    repeats: int = 5


@dataclass
class SweepResult:
    """Every cell with its record, in the order of the grid; thumbnails by cell place; notes for the reader."""

    sweep_id: str
    axis_x: Axis
    axis_y: Axis
    cells: list[CellRuns] = field(default_factory=list)
    thumbnails: dict[tuple[int, int], Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Sweep:
    """One sweep. `run` does it all; what was measured is written as soon as it is whole."""

    def __init__(self, parts: Parts, request: SweepRequest, nodes: NodeTable, context: NodeContext) -> None:
        plan = parse_plan(request.plan)
        base = replace(request.base.with_stack(plan.techniques), plan=plan.name)
        axis_x, axis_y = parse_axis(request.axis_x, request.values_x), parse_axis(request.axis_y, request.values_y)
        self.request, self.parts, self.nodes, self.context, self.base = request, parts, nodes, context, base
        self.store = RunStore(output_directory())
        named = context.scenario()
        self.result = SweepResult(new_run_id(), axis_x, axis_y)
        self.facts = SweepFacts(self.result.sweep_id, named.get("scenario"), request.prompts, parts)
        cells = make_cells(base, axis_x, axis_y)
        for cell in cells:
            check_techniques(cell.settings, nodes)
            check_sampler(cell.settings)
        self._of = {(cell.x, cell.y): CellRuns(cell, new_run_id()) for cell in cells}
        for runs in self._of.values():
            runs.baseline = self._baseline(runs.cell)
        self.result.cells = list(self._of.values())
        self.reloader = Reloader(parts)
        self._prepared: dict[tuple[int, int], Prepared] = {}
        self._baseline_images: dict[tuple[int, int], Any] = {}
        self._weights: Any = parts.model.model
        self._draws = draws(parts.model, context)
        self._start_rss = 0
        self._running: CellRuns | None = None
        self._measured_ms = 0.0

    def run(self) -> SweepResult:
        """Measure every cell. Raises what a cancel raises, after the rows of what was done are written."""
        self.store.check_writable()
        self._start_rss = rss_bytes() or 0
        started = time.perf_counter()
        self.progress = SweepProgress(sum(self._steps(runs) for runs in self.result.cells))
        with self._kept_on_cancel():
            self._rounds(self._in_order())
            if self.result.axis_x.open_end or self.result.axis_y.open_end:
                self._search_batches()
        wall_ms = (time.perf_counter() - started) * 1000.0
        self.progress.end(len(self.result.cells))
        self.result.notes += notes_of(self.result.cells, self._measured_ms, wall_ms)
        return self.result

    def _in_order(self) -> list[CellRuns]:
        """Baselines first, so that every other cell finds the images that it is compared with."""
        baselines = {(runs.baseline.x, runs.baseline.y) for runs in self.result.cells if runs.baseline is not None}
        return sorted(self.result.cells, key=lambda runs: (runs.cell.x, runs.cell.y) not in baselines)

    def _steps(self, runs: CellRuns) -> int:
        return runs.cell.settings.steps * len(self.request.prompts) * (self.request.warmup + self.request.repeats)

    def _rounds(self, cells: Sequence[CellRuns]) -> None:
        # Warm-up and the first measured round are in the given order, in which baselines come first.
        for turn in turns(cells, self.request.repeats, self.request.warmup):
            self.progress.begin(f"{turn.series.cell.name}: {turn.text}")
            self._measure(turn)
            if turn.left == 1 or turn.series.status != "ok":
                self._write(turn.series)

    def _measure(self, turn: Turn[CellRuns]) -> None:
        """One round of one cell. What goes wrong is the cell's row, not the end of the sweep."""
        self._running = runs = turn.series
        settings = runs.cell.settings
        with own_failure(lambda error: self._failed(turn, error)):
            refuse_too_large(runs.cell, self.result.cells, self.parts.model.load_device, self._start_rss)
            prepared = self._prepare(runs.cell)
            made: list[OneRun] = []
            for prompt in self.request.prompts:
                save = partial(self._save, runs.run_id, len(made) * settings.batch)
                run = run_once(prepared, prompt, self.context, self.progress.step, save)
                self.progress.finished(settings.steps)
                self._measured_ms += run.total_ms + run.compile_ms
                made.append(run)
            if turn.counts and not runs.repeats:
                self._look(runs, made)
            # Only the first repeat's images are looked at.
            turn.keep(tuple(replace(run, images=None, latent=None) for run in made))
        self._running = None

    def _save(self, name: str, first: int, images: Any) -> list[str]:
        """Images of a later repeat replace those of an earlier one."""
        paths = save_pngs(images, name, self.context, self.store, first)
        return [path.relative_to(self.store.root.parent).as_posix() for path in paths]

    def _failed(self, turn: Turn[CellRuns], error: Exception) -> str:
        runs = turn.series
        runs.status, runs.error = failure_status(error), failure_message(error)
        runs.was_tried = not isinstance(error, NotTriedError)
        log.warning("SpeedLab: %s ended with %s: %s", runs.cell.name, runs.status, runs.error)
        self.progress.more(-turn.left * self._steps(runs) // (self.request.warmup + self.request.repeats))
        self._prepared.pop((runs.cell.x, runs.cell.y), None)
        return runs.status

    def _prepare(self, cell: Cell) -> Prepared:
        import comfy.model_management as mm

        place, started = (cell.x, cell.y), time.perf_counter()
        if place in self._prepared and not self.reloader.keeps(self._prepared[place].parts):
            del self._prepared[place]
        if place not in self._prepared:
            self._prepared[place] = prepare(self.parts, cell.settings, self.nodes, self.reloader)
            self._release_weights()
            # Loading a checkpoint again is work that the user asked for, not the harness'.
            self._measured_ms += (time.perf_counter() - started) * 1000.0
        prepared = self._prepared[place]
        weights = prepared.parts.model.model
        if weights is not self._weights:
            # Other weights left on the device would count into this cell's peak.
            mm.unload_all_models()
            self._weights = weights
        return prepared

    def _release_weights(self) -> None:
        """What the reloader no longer keeps must not stay in memory through the cells that used it."""
        gone = [place for place, known in self._prepared.items() if not self.reloader.keeps(known.parts)]
        for place in gone:
            del self._prepared[place]

    def _look(self, runs: CellRuns, made: Sequence[OneRun]) -> None:
        """Compare the first measured images with the baseline's; keep a small copy for the contact sheet."""
        import torch

        place = (runs.cell.x, runs.cell.y)
        same_size = len({tuple(run.images.shape) for run in made}) == 1
        images = torch.cat([run.images for run in made]) if same_size else made[0].images
        self.result.thumbnails[place] = thumbnail(images)
        if same_size and self._draws and runs.cell.settings.prompt_tokens is None:
            runs.attributes = accuracy(images, [prompt.text for prompt in self.request.prompts])
        baseline = runs.baseline
        if baseline is None:
            return
        if (baseline.x, baseline.y) == place:
            self._baseline_images[place] = images
        elif (reference := self._baseline_images.get((baseline.x, baseline.y))) is not None:
            runs.quality = quality_of(images, reference)
            if runs.quality is not None:
                name = f"{runs.run_id}_difference.png"
                runs.difference = keep_image(self.store, "images", name, runs.quality.difference[:1])

    def _search_batches(self) -> None:
        """Double and halve the batch along the open axis, once for each value of the other one."""
        result = self.result
        opened = result.axis_x if result.axis_x.open_end else result.axis_y
        others = result.axis_y if result.axis_x.open_end else result.axis_x
        # The marked value first: the images of the others are compared with its.
        order = sorted(range(len(others.values)), key=lambda index: index != others.baseline)
        for index in order:
            result.notes.append(largest_note(self._search_batch(index, opened.most), others.values[index].label))

    def _search_batch(self, other: int, most: int | None) -> BatchSearch:
        """The search for one value of the other axis. It ends at the first cell that fails for another reason."""
        search = BatchSearch(most=min(most or MOST_IMAGES, MOST_IMAGES), limited=most is not None)
        for runs in self.result.cells:
            if (runs.cell.y if self.result.axis_x.open_end else runs.cell.x) == other:
                search.note(runs.cell.settings.batch, runs.status, runs.was_tried)
        while (batch := search.next()) is not None:
            runs = self._add_batch(batch, other)
            self.progress.more(self._steps(runs))
            self._rounds([runs])
            search.note(batch, runs.status, runs.was_tried)
        return search

    def _add_batch(self, batch: int, other: int) -> CellRuns:
        """A cell for one more batch size, at the end of the open axis or where an earlier search put that size."""
        result = self.result
        axis, place = with_batch(result.axis_x if result.axis_x.open_end else result.axis_y, batch)
        if result.axis_x.open_end:
            result.axis_x, x, y = axis, place, other
        else:
            result.axis_y, x, y = axis, other, place
        runs = CellRuns(make_cell(self.base, result.axis_x, result.axis_y, x, y), new_run_id())
        result.cells.append(runs)
        self._of[(x, y)] = runs
        runs.baseline = self._baseline(runs.cell)
        return runs

    def _baseline(self, cell: Cell) -> Cell | None:
        """The cell to compare with; None where a search never came to that batch size in the marked row or column."""
        base = self._of.get(baseline_of(cell, self.result.axis_x, self.result.axis_y))
        return None if base is None else base.cell

    def _write(self, runs: CellRuns) -> None:
        """Write the cell's record and its one row, once."""
        if runs.record is not None:
            return
        record = measured_record(runs, self.facts) if runs.repeats else failed_record(runs, self.facts)
        runs.record = self.store.keep(record)

    @contextmanager
    def _kept_on_cancel(self) -> Iterator[None]:
        """What was measured before a cancel gets its rows; a cell cut off before its first repeat says `cancelled`."""
        try:
            yield
        except BaseException as error:
            for runs in self.result.cells:
                if runs.record is None and runs.repeats:
                    runs.error = f"stopped after {len(runs.repeats)} of {self.request.repeats} repeats"
                elif runs is self._running and not runs.repeats:
                    runs.status, runs.error = failure_status(error), failure_message(error)
                else:
                    continue
                # The cancel is what ComfyUI has to see, not a full disk on the way.
                with suppress(ResultsError):
                    self._write(runs)
            raise


_REPEATS = 2


def notes_of(cells: Sequence[CellRuns], measured_ms: float, wall_ms: float) -> list[str]:
    """The notes of a finished sweep. `measured_ms` of `wall_ms` were spent in phases that the records name."""
    notes = [f"{runs.cell.name}: {runs.status}: {runs.error}" for runs in cells if runs.status != "ok"]
    notes += warning_notes(cells)
    notes += saturation_notes([runs for runs in cells if runs.status == "ok"])
    if wall_ms > 0 and measured_ms > 0:
        share = max(1.0 - measured_ms / wall_ms, 0.0)
        notes.append(f"{share:.1%} of the {wall_ms / 1000.0:.1f} s was neither loading nor anything that a row counts.")
    return notes


def warning_notes(cells: Sequence[CellRuns]) -> list[str]:
    """What the records warn of, with the cells that each sentence is about."""
    names_by_text: dict[str, list[str]] = {}
    for runs in cells:
        for text in () if runs.record is None else runs.record.warnings:
            names_by_text.setdefault(text, []).append(runs.cell.name)
    return [f"{'; '.join(names)}: {text}" for text, names in names_by_text.items()]


def saturation_notes(cells: Sequence[CellRuns]) -> list[str]:
    """Where more images at once gain nothing more, for each value of the axis beside `batch`.

    Sizes of one repeat say nothing of it: a single run swings by more than what is asked here.
    """
    groups: dict[str, dict[int, float]] = {}
    for runs in cells:
        rate = runs.record.summary.get("images_per_min") if runs.record is not None else None
        if rate and len(runs.repeats) >= _REPEATS and any(axis == "batch" for axis, _ in runs.cell.labels):
            other = ", ".join(f"{axis} {label}" for axis, label in runs.cell.labels if axis != "batch")
            groups.setdefault(other, {})[runs.cell.settings.batch] = float(rate)
    notes = []
    for other, rates in groups.items():
        point = saturation_point(rates)
        if point is not None:
            notes.append(
                f"{_where(other)}Throughput saturates at batch {point}: {rates[point]:.1f} images a minute, best "
                f"{max(rates.values()):.1f}, batch {max(rates)} {rates[max(rates)]:.1f}."
            )
    return notes


def largest_note(search: BatchSearch, other: str) -> str:
    """What the search for the largest batch found."""
    if search.broken_at is not None:
        known = f" Batch {max(search.fits)} fits." if search.fits else ""
        return f"{_where(other)}The search for the largest batch ended in an error at batch {search.broken_at}.{known}"
    if not search.fits:
        return f"{_where(other)}{'No batch size fits' if 1 in search.fails else 'None of the batch sizes fits'}."
    largest = max(search.fits)
    if largest + 1 in search.fails - search.predicted:
        return f"{_where(other)}The largest batch that fits is {largest}."
    fits = f"{_where(other)}Batch {largest} fits; whether a larger one does is not known:"
    refused = min((size for size in search.predicted if size > largest), default=None)
    if refused is not None:
        return f"{fits} batch {refused} was not tried, because it would run out of memory by prediction."
    return f"{fits} {'the limit given is' if search.limited else 'none is tried above'} {search.most or largest}."


def _where(other: str) -> str:
    return f"{other}: " if other else ""


class SweepProgress:
    """Counts sampling steps over all cells. At each step a cancel can act."""

    def __init__(self, total_steps: int) -> None:
        self.total = max(total_steps, 1)
        self.done = 0
        self._bar = progress_bar(self.total)
        self._started = time.monotonic()
        self._node = timeline.executing().node_id

    def begin(self, text: str) -> None:
        """Say which run begins."""
        left = self.left_s()
        line = text if left is None else f"{text}, {_duration(left)} left"
        log.info("SpeedLab: %s", line)
        show_on_node(line, self._node)

    def end(self, cells: int) -> None:
        """Say that all is done: the browser keeps the last text on the node."""
        show_on_node(f"{cells} cells in {_duration(time.monotonic() - self._started)}", self._node)

    def step(self, step: int) -> None:
        """Step number `step` of the running sampling is done. Raises ComfyUI's interrupt where one is asked for."""
        import comfy.model_management as mm

        mm.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(min(self.done + step, self.total), self.total)

    def finished(self, steps: int) -> None:
        """A sampling of `steps` steps is done."""
        self.done += steps
        self._bar.update_absolute(min(self.done, self.total), self.total)

    def more(self, steps: int) -> None:
        """There is more (or, negative, less) to do than was known."""
        self.total = max(self.total + steps, self.done, 1)

    def left_s(self) -> float | None:
        """Seconds that the rest takes at the speed so far; None before anything was done."""
        if not self.done:
            return None
        return (time.monotonic() - self._started) / self.done * (self.total - self.done)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"

"""Runs a sweep: cells in turn, round after round, so that drift hits them all alike (A B C, B C A)."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.core import output_directory
from ..common.errors import ResultsError
from ..measure.context import NodeContext
from ..measure.peaks import rss_bytes
from ..measure.store import RunStore, new_run_id
from ..sampling.profiled import failure_message, failure_status
from .axes import Axis, parse_axis, with_batch
from .batch_search import BatchSearch
from .cell_record import CellRuns, SweepFacts, failed_record, measured_record
from .cells import Cell, baseline_of, make_cell, make_cells
from .measure import OneRun, Prepared, Prompt, check_sampler, prepare, run_once
from .notes import largest_note, notes_of
from .plan_text import parse_plan
from .progress import SweepProgress
from .quality import quality_of
from .ram import NotTriedError, refuse_too_large
from .reload import Reloader
from .settings import MOST_PICTURES, CellSettings
from .sheet import save_picture, thumbnail
from .techniques import NodeTable, Parts, check_techniques
from .turns import turned

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
        self._baseline_pictures: dict[tuple[int, int], Any] = {}
        self._weights: Any = parts.model.model
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
        self.result.notes += notes_of(self.result.cells, self._measured_ms, wall_ms)
        return self.result

    def _in_order(self) -> list[CellRuns]:
        """Baselines first, so that every other cell finds the pictures that it is compared with."""
        baselines = {(runs.baseline.x, runs.baseline.y) for runs in self.result.cells if runs.baseline is not None}
        return sorted(self.result.cells, key=lambda runs: (runs.cell.x, runs.cell.y) not in baselines)

    def _steps(self, runs: CellRuns) -> int:
        return runs.cell.settings.steps * len(self.request.prompts) * (self.request.warmup + self.request.repeats)

    def _rounds(self, cells: Sequence[CellRuns]) -> None:
        rounds = self.request.warmup + self.request.repeats
        for index in range(rounds):
            # Warm-up and the first measured round are in the given order, in which baselines come first.
            for runs in turned(cells, max(index - self.request.warmup, 0)):
                if runs.status == "ok":
                    what = "warm-up" if index < self.request.warmup else f"repeat {index + 1 - self.request.warmup}"
                    self.progress.begin(f"{runs.cell.name}: {what} of {self.request.repeats}")
                    self._measure(runs, index)
                if index == rounds - 1 or runs.status != "ok":
                    self._write(runs)

    def _measure(self, runs: CellRuns, index: int) -> None:
        """One round of one cell. What goes wrong is the cell's row, not the end of the sweep."""
        import comfy.model_management as mm

        self._running = runs
        try:
            refuse_too_large(runs.cell, self.result.cells, self.parts.model.load_device, self._start_rss)
            prepared = self._prepare(runs.cell)
            made: list[OneRun] = []
            for prompt in self.request.prompts:
                batch = runs.cell.settings.batch
                run = run_once(
                    prepared, prompt, self.context, self.store, runs.run_id, len(made) * batch, self.progress.step
                )
                self.progress.finished(runs.cell.settings.steps)
                self._measured_ms += run.total_ms
                runs.first = runs.first or _light(run)
                made.append(run)
            if index >= self.request.warmup:
                if not runs.repeats:
                    self._look(runs, made)
                runs.repeats.append(tuple(_light(run) for run in made))
        except (mm.InterruptProcessingException, KeyboardInterrupt, SystemExit, ResultsError):
            raise
        except Exception as error:
            # Whatever a cell raises, a shape error deep in a library too, belongs into its row.
            runs.status, runs.error = failure_status(error), failure_message(error)
            runs.was_tried = not isinstance(error, NotTriedError)
            log.warning("SpeedLab: %s ended with %s: %s", runs.cell.name, runs.status, runs.error)
            self.progress.more(-self._steps(runs) * (self.request.repeats - len(runs.repeats)) // self._rounds_a_cell())
            self._prepared.pop((runs.cell.x, runs.cell.y), None)
        if runs.status != "ok":
            # Not inside the handler: there the error's frames still hold what did not fit.
            _free_memory(runs.status == "oom")
        self._running = None

    def _rounds_a_cell(self) -> int:
        return self.request.warmup + self.request.repeats

    def _prepare(self, cell: Cell) -> Prepared:
        import comfy.model_management as mm

        place, started = (cell.x, cell.y), time.perf_counter()
        if place in self._prepared and not self.reloader.keeps(self._prepared[place].parts):
            del self._prepared[place]
        if place not in self._prepared:
            self._prepared[place] = prepare(self.parts, cell.settings, self.nodes, self.reloader)
            self._let_go_of_weights()
            # Loading a checkpoint again is work that the user asked for, not the harness'.
            self._measured_ms += (time.perf_counter() - started) * 1000.0
        prepared = self._prepared[place]
        weights = prepared.parts.model.model
        if weights is not self._weights:
            # Other weights left on the device would count into this cell's peak.
            mm.unload_all_models()
            self._weights = weights
        return prepared

    def _let_go_of_weights(self) -> None:
        """What the reloader no longer keeps must not stay in memory through the cells that used it."""
        gone = [place for place, known in self._prepared.items() if not self.reloader.keeps(known.parts)]
        for place in gone:
            del self._prepared[place]

    def _look(self, runs: CellRuns, made: Sequence[OneRun]) -> None:
        """Compare the first measured pictures with the baseline's; keep a small copy for the contact sheet."""
        import torch

        place = (runs.cell.x, runs.cell.y)
        same_size = len({tuple(run.pictures.shape) for run in made}) == 1
        pictures = torch.cat([run.pictures for run in made]) if same_size else made[0].pictures
        self.result.thumbnails[place] = thumbnail(pictures)
        baseline = runs.baseline
        if baseline is None:
            return
        if (baseline.x, baseline.y) == place:
            self._baseline_pictures[place] = pictures
        elif (reference := self._baseline_pictures.get((baseline.x, baseline.y))) is not None:
            runs.quality = quality_of(pictures, reference)
            if runs.quality is not None:
                name = f"{runs.run_id}_difference.png"
                runs.difference = save_picture(self.store, "images", name, runs.quality.difference[:1])

    def _search_batches(self) -> None:
        """Double and halve the batch along the open axis, once for each value of the other one."""
        result = self.result
        opened = result.axis_x if result.axis_x.open_end else result.axis_y
        others = result.axis_y if result.axis_x.open_end else result.axis_x
        # The marked value first: the pictures of the others are compared with its.
        order = sorted(range(len(others.values)), key=lambda index: index != others.baseline)
        for index in order:
            result.notes.append(largest_note(self._search_batch(index, opened.most), others.values[index].label))

    def _search_batch(self, other: int, most: int | None) -> BatchSearch:
        """The search for one value of the other axis. It ends at the first cell that fails for another reason."""
        search = BatchSearch(most=min(most or MOST_PICTURES, MOST_PICTURES), limited=most is not None)
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


def _light(run: OneRun) -> OneRun:
    """A run without its pictures, of which only the first repeat's are looked at."""
    return replace(run, pictures=None)


def _free_memory(everything: bool) -> None:
    """Give back what a failed cell held, before the next one starts."""
    import comfy.model_management as mm

    gc.collect()
    if everything:
        mm.unload_all_models()
    mm.soft_empty_cache()

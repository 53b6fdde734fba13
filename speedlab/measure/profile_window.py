"""Which steps to look at closely: two or three like most others, or one whole interval of a technique that caches.

Profiles the chosen evaluations of an extra pass, with the same ranges in the trace as NVTX shows to Nsight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import nvtx
from .clock import synchronize
from .torch_trace import exported, new_profiler, start
from .trace import StepRow

_STEPS = 3
_LONGEST_INTERVAL = 8


@dataclass(frozen=True)
class Window:
    """Neighbouring steps by index, and the evaluations that belong to them, which lie in `first` <= n < `end`.

    A sampler that looks ahead evaluates other steps in between.
    """

    steps: tuple[int, ...]
    first: int
    end: int
    notes: tuple[str, ...] = ()
    evaluations: tuple[int, ...] = ()


def choose_window(rows: Sequence[StepRow], owners: Sequence[int]) -> Window | None:
    """The steps to profile of a run with these rows; `owners` names the step of each evaluation.

    Without caching steps 2 to 4, since the first one also holds what the sampler prepares. With caching one full step
    and the cached ones behind it, in the proportion of the run. None for a run without an evaluation.
    """
    taken = [row for row in rows if row.evals]
    if not taken:
        return None
    chosen = _interval(taken) if any(row.cached for row in taken) else (taken[1:] or taken)[:_STEPS]
    notes = []
    if len(chosen) > _LONGEST_INTERVAL:
        chosen = chosen[:_LONGEST_INTERVAL]
        notes.append(f"Of a long caching interval only the first {_LONGEST_INTERVAL} steps were profiled.")
    without = [row for row in taken if not row.uncond_rows]
    if 0 < len(without) < len(taken) and all(row.uncond_rows for row in chosen):
        notes.append(f"The profiled steps are with guidance; {len(without)} of {len(taken)} steps ran without.")
    if chosen[0] is taken[0]:
        notes.append("The profiled steps include the first, whose time may hold preparing and compiling.")
    steps = tuple(row.index for row in chosen)
    mine = [n for n, owner in enumerate(owners) if owner in steps]
    others = mine[-1] + 1 - mine[0] - len(mine)
    if others:
        notes.append(f"This sampler evaluates other steps in between: {others} of the profiled evaluations are theirs.")
    return Window(steps, mine[0], mine[-1] + 1, tuple(notes), tuple(mine))


def _interval(rows: Sequence[StepRow]) -> Sequence[StepRow]:
    """A full step with the cached ones behind it: a complete interval first, of those one after the first step."""
    starts = [n for n, row in enumerate(rows) if not row.cached] or [0]
    ends = [*starts[1:], len(rows)]
    caching = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start > 1]
    if not caching:
        return rows[:_STEPS]
    start, end = min(caching, key=lambda pair: (pair[1] == len(rows), pair[0] == 0, pair[0]))
    return rows[start:end]


class RecordFunctionEmitter:
    """Ranges of torch.profiler: a push opens one in the trace, a pop closes the innermost."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def push(self, name: str, payload: float | int | None = None) -> None:
        """Open a range; the number is left out, since names stay the same for every step."""
        from torch.profiler import record_function

        opened = record_function(name)
        opened.__enter__()
        self._open.append(opened)

    def pop(self) -> None:
        """Close the range that was opened last."""
        self._open.pop().__exit__(None, None, None)


class Recorder:
    """The observer of the profiled pass. Times of evaluation n reach to the beginning of evaluation n + 1."""

    def __init__(self, window: Window, owners: Sequence[int], device: Any) -> None:
        self.end = window.end
        self._window, self._owners, self._device = window, owners, device
        self._profiler = new_profiler(device)
        self._emitter = RecordFunctionEmitter()
        self._step: int | None = None
        self._running = False
        self.complete = False

    @contextmanager
    def evaluation(self, index: int, transformer_options: dict[str, Any]) -> Iterator[None]:
        """Start at the window's first evaluation and mark steps and evaluations in it."""
        if index < self._window.first:
            yield
            return
        if not self._running:
            self._start()
        step = self._owners[index]
        if step != self._step:
            if self._step is not None:
                self._emitter.pop()
            self._emitter.push(nvtx.STEP, step)
            self._step = step
        with nvtx.nvtx_range(self._emitter, nvtx.EVAL, index):
            yield
        self.complete = index == self._window.end - 1

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Mark one forward of the network."""
        if not self._running:
            yield
            return
        with nvtx.nvtx_range(self._emitter, nvtx.FORWARD):
            yield

    def close(self) -> None:
        """Stop profiling, when the device is done; also where the pass failed."""
        if not self._running:
            return
        self._running = False
        if self._step is not None:
            self._emitter.pop()
        self._emitter.pop()
        try:
            synchronize(self._device)
        finally:
            self._profiler.stop()

    @contextmanager
    def trace(self) -> Iterator[Mapping[str, Any]]:
        """What was recorded, as a Chrome trace."""
        with exported(self._profiler) as trace:
            yield trace

    def _start(self) -> None:
        synchronize(self._device)
        start(self._profiler)
        self._running = True
        self._emitter.push(nvtx.SAMPLE, len(self._window.steps))

"""Profiles the chosen evaluations of an extra pass, with the same ranges in the trace as NVTX shows to Nsight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import nvtx
from .clock import synchronize
from .profile_window import Window
from .trace_file import exported, new_profiler


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
        self._profiler.start()
        self._running = True
        self._emitter.push(nvtx.SAMPLE, len(self._window.steps))

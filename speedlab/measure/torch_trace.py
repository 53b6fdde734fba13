"""torch.profiler around a few steps, and its trace as a file for Perfetto and chrome://tracing.

The events of a torch.profiler trace in Chrome's format, and the arithmetic of time spans.

The exported file is a documented format that names the category of each event (kernel, copy, runtime call, operator),
which the profiler's Python objects do not on every torch version. Times are microseconds.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import ResultsError, UnavailableError
from .clock import synchronize
from .store import RunStore, cannot_write, write_atomically

# Variables that a tool sets for the processes it watches. All of these tools want CUPTI, which serves one at a time.
_WATCHING_VARIABLES = {
    "NSYS_PROFILING_SESSION_ID": "Nsight Systems (nsys)",
    "CUDA_INJECTION64_PATH": "a CUDA profiler (CUDA_INJECTION64_PATH)",
    "NV_NSIGHT_INJECTION_TRANSPORT_TYPE": "Nsight Compute (ncu)",
    "NVPROF_ID": "nvprof",
}


def require_profiler(detail: str) -> None:
    """Raises UnavailableError while another profiler watches this process: two at once spoil each other's numbers."""
    watcher = next((name for key, name in _WATCHING_VARIABLES.items() if os.environ.get(key)), None)
    if watcher is not None:
        raise UnavailableError(
            f"Profile Sampler cannot measure '{detail}' while {watcher} watches ComfyUI: both need the same interface "
            "of the driver. Choose detail 'timing', whose NVTX ranges that tool shows, or start ComfyUI without it."
        )
    if _torch_profiler_runs():
        raise UnavailableError(
            f"Profile Sampler cannot measure '{detail}' while torch.profiler is already running in ComfyUI. Stop it, "
            "or choose detail 'timing'."
        )


def _torch_profiler_runs() -> bool:
    import torch

    here = getattr(torch.autograd, "_profiler_enabled", None)
    anywhere = getattr(torch.autograd.profiler, "_is_profiler_enabled", False)
    return bool(anywhere) or (here is not None and bool(here()))


def new_profiler(device: Any) -> Any:
    """A torch.profiler for the host and, where it is supported, for `device`; not started yet.

    Stacks stay off: with them the named ranges go missing.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, supported_activities

    activities = [ProfilerActivity.CPU]
    accelerator = getattr(ProfilerActivity, str(getattr(device, "type", device)).upper(), None)
    if accelerator is not None and accelerator in supported_activities() and accelerator not in activities:
        activities.append(accelerator)
    made = profile(activities=activities, with_stack=False)
    if len(activities) > 1:
        # The first start loads and initialises CUPTI, which must not count into the first profiled step.
        first = profile(activities=activities, with_stack=False)
        start(first)
        try:
            torch.zeros(8, device=device).add_(1)
            synchronize(device)
        finally:
            first.stop()
    return made


def start(profiler: Any) -> None:
    """Start a profiler of one cycle. PyTorch warns of events that a second cycle would clear; with the option that it
    names instead (`acc_events`) it would turn every event into a Python object at the end, of which nothing is read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        profiler.start()


@contextmanager
def exported(profiler: Any) -> Iterator[Mapping[str, Any]]:
    """The trace of a stopped profiler as read from its export; the export itself is a temporary file."""
    with tempfile.TemporaryDirectory(prefix="speedlab-trace-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        yield json.loads(path.read_text(encoding="utf-8", errors="replace"))


def write_trace(trace: Mapping[str, Any], run_id: str, steps: tuple[int, ...], store: RunStore) -> str:
    """Write the trace beside the run's record and return its path relative to the output folder.

    What tells of the machine or its folders is left out, so that a trace can be shared. Raises ResultsError.
    """
    path = store.trace_path(run_id)
    kept = {key: value for key, value in trace.items() if key not in ("host_name", "traceName", "ERROR", "WARNING")}
    kept["speedlab"] = {"run_id": run_id, "steps": list(steps)}
    try:
        store.folder("runs")
        write_atomically(path, gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), 6, mtime=0))
    except ResultsError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    return path.relative_to(store.root.parent).as_posix()


OPERATOR = "cpu_op"
ANNOTATION = "user_annotation"
KERNEL = "kernel"
DEVICE_CATEGORIES = frozenset({KERNEL, "gpu_memcpy", "gpu_memset"})


@dataclass(frozen=True)
class Span:
    """One complete event."""

    category: str
    name: str
    start: float
    duration: float
    thread: tuple[Any, Any] = (None, None)
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        """Microseconds, on the trace's clock."""
        return self.start + self.duration

    @property
    def is_device(self) -> bool:
        """Whether the GPU did it."""
        return self.category in DEVICE_CATEGORIES

    @property
    def is_runtime(self) -> bool:
        """Whether it is a call of CUDA's (or HIP's) runtime or driver."""
        return self.category.endswith(("_runtime", "_driver"))


Interval = tuple[float, float]


def spans_of(trace: Mapping[str, Any]) -> list[Span]:
    """The complete events of a trace that was read from its JSON, in the order of the file."""
    return [
        Span(
            category=str(event.get("cat", "")),
            name=str(event["name"]),
            start=float(event["ts"]),
            duration=float(event.get("dur", 0.0)),
            thread=(event.get("pid"), event.get("tid")),
            args=event.get("args") or {},
        )
        for event in trace.get("traceEvents", ())
        if event.get("ph") == "X" and "ts" in event
    ]


def self_times(spans: Sequence[Span]) -> list[float]:
    """For each span its duration less that of the spans directly inside it on the same thread."""
    own = [span.duration for span in spans]
    order = sorted(range(len(spans)), key=lambda n: (str(spans[n].thread), spans[n].start, -spans[n].duration))
    open_spans: list[int] = []
    for n in order:
        span = spans[n]
        while open_spans and (spans[open_spans[-1]].thread != span.thread or spans[open_spans[-1]].end <= span.start):
            open_spans.pop()
        if open_spans:
            own[open_spans[-1]] -= span.duration
        open_spans.append(n)
    return [max(time, 0.0) for time in own]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals as disjoint ones, in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def length(intervals: Iterable[Interval]) -> float:
    """The summed length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Where two lists of disjoint, ordered intervals overlap."""
    both: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            both.append((start, end))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return both

"""The events of a torch.profiler trace in Chrome's format, and the arithmetic of time spans.

The exported file is a documented format that names the category of each event (kernel, copy, runtime call, operator),
which the profiler's Python objects do not on every torch version. Times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        """Whether the card did it."""
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

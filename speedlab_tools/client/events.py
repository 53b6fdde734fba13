"""A run seen from outside: the server's messages with the time each arrived, and spans computed from them.

One line that tells how far a run is: written over in a terminal, a few lines where output is a file.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TextIO

from ..host.progress import Reporter

TEXT_ENCODERS = frozenset({"CLIPTextEncode", "CLIPTextEncodeSDXL", "SpeedLabTextEncode", "SpeedLabPromptQueue"})
LOADERS = frozenset(
    {
        "CheckpointLoaderSimple",
        "LoraLoader",
        "VAELoader",
        "SpeedLabCheckpointLoader",
        "SpeedLabLoraStack",
        "SpeedLabVAELoader",
    }
)
SAVERS = frozenset({"SaveImage", "PreviewImage"})
SAMPLERS = frozenset(
    {"KSampler", "KSamplerAdvanced", "SpeedLabProfileSampler", "SpeedLabEnsembleSampler", "SpeedLabBenchmark"}
)


@dataclass(frozen=True)
class Event:
    """One message: `time_s` on the monotonic clock, `kind` as the server names it. `node` None ends the prompt."""

    time_s: float
    kind: str
    node: str | None = None
    value: int = 0
    maximum: int = 0


@dataclass(frozen=True)
class Span:
    """A node's execution: seconds on the monotonic clock."""

    node: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long the node ran."""
        return self.end_s - self.start_s


@dataclass
class EventLog:
    """The messages of one prompt in order of arrival. `complete` is False when the socket dropped in between."""

    events: list[Event] = field(default_factory=list)
    cached: set[str] = field(default_factory=set)
    complete: bool = True

    def add(self, event: Event) -> None:
        """Append a message."""
        self.events.append(event)


def node_spans(events: Sequence[Event]) -> list[Span]:
    """One span a node that ran: from its `executing` to the next one, since nodes run one after another."""
    marks = [event for event in events if event.kind == "executing"]
    return [Span(now.node, now.time_s, after.time_s) for now, after in pairwise(marks) if now.node is not None]


def _class(graph: Mapping[str, Mapping[str, Any]], node: str) -> str:
    return str(graph.get(node, {}).get("class_type", ""))


def text_to_image_s(log: EventLog, graph: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Seconds from the start of the first text encoding to the end of the last image saved, loaders taken out.

    None where the log has holes, or where no text was encoded or no image saved in this run (both were cached).
    """
    spans = node_spans(log.events)
    starts = [span.start_s for span in spans if _class(graph, span.node) in TEXT_ENCODERS]
    ends = [span.end_s for span in spans if _class(graph, span.node) in SAVERS]
    if not log.complete or not starts or not ends:
        return None
    start, end = min(starts), max(ends)
    loading = sum(
        s.seconds for s in spans if _class(graph, s.node) in LOADERS and start <= s.start_s and s.end_s <= end
    )
    return end - start - loading


def nodes_of(graph: Mapping[str, Mapping[str, Any]], classes: Collection[str]) -> list[str]:
    """The ids of a graph's nodes whose class is one of `classes`."""
    return [node_id for node_id, node in graph.items() if node.get("class_type") in classes]


BAR = 24


def duration(value: float) -> str:
    """Seconds as `42 s` or `3:07 min`."""
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"


def progress_text(title: str, value: int, maximum: int, elapsed_s: float) -> str:
    """`title  [####....] step 5/20, 12 s left`. The first step carries warm-up, so it alone predicts nothing."""
    filled = BAR * value // max(maximum, 1)
    left = ""
    if 0 < value < maximum and elapsed_s > 0:
        left = f", {duration(elapsed_s / value * (maximum - value))} left"
    return f"{title}  [{'#' * filled}{'.' * (BAR - filled)}] step {value}/{maximum}{left}"


def activity(class_type: str, title: str) -> str:
    """What a node does, in words."""
    for classes, words in (
        (LOADERS, "loading the model"),
        (TEXT_ENCODERS, "encoding the text"),
        (SAMPLERS, "sampling"),
        (SAVERS, "saving"),
    ):
        if class_type in classes:
            return words
    return title or class_type


class ProgressLine:
    """A listener for ComfyClient.run that prints to `stream` (standard error by default)."""

    def __init__(self, title: str, graph: Mapping[str, Mapping[str, Any]], stream: TextIO | None = None) -> None:
        self.title = title
        self.graph = graph
        self.reporter = Reporter(stream or sys.stderr)
        self._node: str | None = None
        self._started_s = 0.0
        self._quarter = -1

    def __call__(self, event: Event) -> None:
        if event.kind == "executing" and event.node is not None:
            self._enter(event)
        elif event.kind == "progress" and event.maximum > 0 and self._class(event.node) in SAMPLERS:
            self._step(event)

    def done(self) -> None:
        """End the line."""
        self.reporter.clear()

    def _class(self, node: str | None) -> str:
        return str(self.graph.get(node or "", {}).get("class_type", ""))

    def _enter(self, event: Event) -> None:
        self._node, self._started_s, self._quarter = event.node, event.time_s, -1
        if self.reporter.terminal:
            node = self.graph.get(event.node or "", {})
            title = str(node.get("_meta", {}).get("title", ""))
            self.reporter.alive(f"{self.title}  {activity(self._class(event.node), title)}")

    def _step(self, event: Event) -> None:
        if event.value <= 1:
            self._quarter = -1
        quarter = 4 * event.value // event.maximum
        if not self.reporter.terminal and quarter == self._quarter:
            return
        self._quarter = quarter
        self.reporter.alive(progress_text(self.title, event.value, event.maximum, event.time_s - self._started_s))

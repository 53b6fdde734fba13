"""A run seen from outside: the server's messages with the time each arrived, and spans computed from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

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


def text_to_picture_s(log: EventLog, graph: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Seconds from the start of the first text encoding to the end of the last picture saved, loaders taken out.

    None where the log has holes, or where no text was encoded or no picture saved in this run (both were cached).
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

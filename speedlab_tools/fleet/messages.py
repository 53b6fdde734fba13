"""What ends a fleet before its prompts are done.

What driver and workers say to each other: plain values, so that no exception of ours has to cross the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from speedlab.common.errors import SpeedLabError

from ..client.graph import ApiGraph


class FleetError(SpeedLabError):
    """The fleet cannot start or go on; the message says why and what to do. What was done is kept."""


@dataclass(frozen=True)
class ModelFile:
    """A model file as the driver sees it. On another machine it is the same where name and size are."""

    folder: str
    path: str
    size: int


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to start its ComfyUI. `cpu` None asks torch; `threads` None leaves them to torch.

    `folder` and `logs` are given where worker and driver share a machine; elsewhere the worker makes its own.
    """

    name: str
    fleet: str
    comfyui: str
    python: str
    managed: bool
    files: tuple[ModelFile, ...] = ()
    cpu: bool | None = None
    threads: str | None = None
    start_timeout_s: float = 300.0
    folder: str | None = None
    logs: str | None = None


@dataclass(frozen=True)
class Job:
    """One task's graph for `/prompt`, with what travels beside it."""

    ticket: int
    graph: ApiGraph
    extra: dict[str, Any]
    timeout_s: float


@dataclass(frozen=True)
class Ready:
    """The worker's ComfyUI answers at `url`, an address of its own machine alone."""

    machine: str
    url: str
    pid: int
    server_pid: int


@dataclass(frozen=True)
class Done:
    """Pictures as they were saved, records as JSON, and the seconds that ComfyUI took."""

    pictures: tuple[bytes, ...]
    records: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """ComfyUI refused the graph, or a node raised: another worker would say the same. `error` is its message."""

    error: str


@dataclass(frozen=True)
class Gone:
    """The worker is lost, or could not start; `reason` says how."""

    reason: str


Answer = Ready | Done | Failed | Gone


@dataclass(frozen=True)
class Event:
    """An answer with the worker that gave it, which of its starts that was, and its ticket; None: it was started."""

    worker: str
    hire: int
    ticket: int | None
    answer: Answer = field(repr=False)

"""What this pack's nodes did for a prompt: phases in the order in which they ran, kept until the prompt is old.

Nodes of one prompt cannot see each other's results, yet a record wants load, encode and decode beside the sampling.
Each pack node therefore notes its phase under the prompt that is executing.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ..common.timing import watching
from . import nvtx
from .clock import HostClock, Mark, host_ms
from .peaks import MemoryPeak, measure_peak

# `between` carries only memory: the peak of whatever ran between two measured blocks of a prompt, such as core nodes.
Phase = Literal["load", "text_encode", "free", "sample", "decode", "save", "report", "between"]

_KEPT_PROMPTS = 32
_RANGES: dict[str, str] = {"load": nvtx.LOAD, "text_encode": nvtx.TEXT_ENCODE, "decode": nvtx.DECODE}


@dataclass(frozen=True)
class PhaseEntry:
    """One node's work in one phase."""

    phase: Phase
    node_id: str | None
    ms: float
    peak: MemoryPeak
    info: dict[str, Any] = field(default_factory=dict)
    list_index: int | None = None
    end_ns: int = 0
    # Compiling in it, which is not in `ms`: no repeat compiles again.
    apart_ms: float = 0.0


@dataclass(frozen=True)
class Executing:
    """The node that ComfyUI is executing, and which item of a list; all are None outside of a prompt."""

    prompt_id: str | None = None
    node_id: str | None = None
    list_index: int | None = None


_lock = threading.Lock()
_prompts: OrderedDict[str, list[PhaseEntry]] = OrderedDict()


def executing() -> Executing:
    """The prompt and node that run in this context."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return Executing()
    context = get_executing_context()
    if context is None:
        return Executing()
    return Executing(str(context.prompt_id), str(context.node_id), context.list_index)


def entries(prompt_id: str | None) -> tuple[PhaseEntry, ...]:
    """The phases noted so far for a prompt; empty for an unknown or very old one."""
    with _lock:
        return tuple(_prompts.get(prompt_id, ())) if prompt_id is not None else ()


def note(entry: PhaseEntry) -> None:
    """Note a phase under the executing prompt; without one there is nothing to keep it for."""
    prompt_id = executing().prompt_id
    if prompt_id is None:
        return
    with _lock:
        known = _prompts.setdefault(prompt_id, [])
        # A client may queue again under an id that it used before: what is known then belongs to the earlier run.
        if entry.node_id is not None and any(_same_work(entry, other) for other in known):
            known.clear()
        known.append(entry)
        _prompts.move_to_end(prompt_id)
        while len(_prompts) > _KEPT_PROMPTS:
            _prompts.popitem(last=False)


def note_report() -> None:
    """Note when a report was done: it may stand between another run's sampling and its report."""
    now = executing()
    note(PhaseEntry("report", now.node_id, 0.0, MemoryPeak(), {}, now.list_index, time.perf_counter_ns()))


def _same_work(a: PhaseEntry, b: PhaseEntry) -> bool:
    return (a.phase, a.node_id, a.list_index) == (b.phase, b.node_id, b.list_index)


def note_between(peak: MemoryPeak) -> None:
    """Note what ran since the last measured block. Before the prompt's first one that is no business of the prompt."""
    if entries(executing().prompt_id):
        note(PhaseEntry("between", None, 0.0, peak))


@dataclass
class Block:
    """A measured block of work: filled when it ends well. Times in milliseconds; `ms` is without `apart_ms`."""

    info: dict[str, Any] = field(default_factory=dict)
    ms: float = 0.0
    apart_ms: float = 0.0
    end_ns: int = 0
    peak: MemoryPeak = field(default_factory=MemoryPeak)
    before: MemoryPeak = field(default_factory=MemoryPeak)


@contextmanager
def measured(name: Phase, device: Any = "cpu") -> Iterator[Block]:
    """Time a block and its memory peaks, synchronised at both ends, under the phase's NVTX range."""
    block, clock = Block(), HostClock(device)
    apart: list[tuple[Mark, Mark]] = []
    clock.settle()
    with measure_peak(device) as reading, watching(clock.mark, apart):
        block.before = reading.before
        start = clock.mark()
        with nvtx.nvtx_range(nvtx.emitter(name in _RANGES), _RANGES.get(name, nvtx.RUN)):
            yield block
            end = clock.mark()
    block.end_ns, block.peak = end.host_ns, reading.peak
    block.apart_ms = sum(host_ms(*span) for span in apart)
    block.ms = max(host_ms(start, end) - block.apart_ms, 0.0)


@contextmanager
def phase(
    name: Phase, device: Any = "cpu", list_index: int | None = None, shared_by: int | None = None
) -> Iterator[dict[str, Any]]:
    """Time a block as a phase of the executing prompt, synchronised at both ends; yields a dict for extra facts.

    `list_index` is the item that the block works on where one execution makes a whole list; `shared_by` is the length
    of a list that the block does its work for at once, of which each item bears an equal share.

    A block that fails is not noted: its time would describe nothing that the user can use.
    """
    with measured(name, device) as block:
        note_between(block.before)
        yield block.info
    now = executing()
    items = [now.list_index if list_index is None else list_index] if shared_by is None else range(shared_by)
    for item in items:
        ms, apart_ms = block.ms / len(items), block.apart_ms / len(items)
        note(PhaseEntry(name, now.node_id, ms, block.peak, block.info, item, block.end_ns, apart_ms))

"""Which kernels (on a card) or operators (on a CPU) the profiled steps spent their time in, from a trace's events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import nvtx
from .kernel_names import FAMILIES, OTHER, family_of, reading
from .trace_events import ANNOTATION, KERNEL, OPERATOR, Interval, Span, intersection, length, merged, self_times

KERNELS = "kernels"
OPERATORS = "operators"
_LONGEST_NAME = 400
_COMPILED = ("## Call CompiledFxGraph", "Torch-Compiled Region", "CompiledFunction")
_COPY_KINDS = ("HtoD", "DtoH", "DtoD", "PtoP", "HtoH", "HtoA", "AtoH")


@dataclass(frozen=True)
class KernelReport:
    """What a trace tells. `rows` is the record's `kernels[]`; shares are percent and add up to 100."""

    unit: str
    rows: tuple[dict[str, Any], ...]
    families: tuple[dict[str, Any], ...]
    runtime: tuple[dict[str, Any], ...]
    device: dict[str, Any] | None
    wall_ms: float
    total_ms: float
    between_ms: float | None


@dataclass
class _Row:
    calls: int = 0
    us: float = 0.0


def analyse(spans: Sequence[Span]) -> KernelReport:
    """Tables of one trace whose sampling lies in a span `sl/sample`."""
    window = _window(spans)
    inside = [span for span in spans if window[0] <= span.start <= window[1]]
    device = [span for span in spans if span.is_device and span.start >= window[0]]
    if device:
        timed: Iterable[tuple[str, float]] = ((span.name, span.duration) for span in device)
        between = None
    else:
        nested = [span for span in inside if span.category in (OPERATOR, ANNOTATION)]
        own = list(zip(nested, self_times(nested), strict=True))
        timed = ((span.name, us) for span, us in own if span.category == OPERATOR)
        between = sum(us for span, us in own if span.category == ANNOTATION) / 1000.0
    rows = _table(timed)
    total = sum(row["ms"] for row in rows)
    return KernelReport(
        unit=KERNELS if device else OPERATORS,
        rows=tuple(rows),
        families=tuple(_families(rows)),
        runtime=tuple(_runtime(inside)),
        device=_device_activity(device, inside, window) if device else None,
        wall_ms=round((window[1] - window[0]) / 1000.0, 4),
        total_ms=round(total, 4),
        between_ms=None if between is None else round(between, 4),
    )


def _window(spans: Sequence[Span]) -> Interval:
    """From the first profiled evaluation to the last; the card may still be working when the host is done."""
    samples = [span for span in spans if span.name == nvtx.SAMPLE and span.category == ANNOTATION]
    if samples:
        return samples[0].start, samples[0].end
    return (min((s.start for s in spans), default=0.0), max((s.end for s in spans), default=0.0))


def _table(timed: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    by_name: dict[str, _Row] = {}
    for name, us in timed:
        row = by_name.setdefault(_display_name(name), _Row())
        row.calls += 1
        row.us += us
    total = sum(row.us for row in by_name.values())
    ordered = sorted(by_name.items(), key=lambda item: (-item[1].us, item[0]))
    return [
        {
            "name": name,
            "family": family_of(name),
            "calls": row.calls,
            "ms": round(row.us / 1000.0, 4),
            "share": round(100.0 * row.us / total, 6) if total > 0 else 0.0,
            "reading": reading(name),
        }
        for name, row in ordered
    ]


def _display_name(name: str) -> str:
    """A compiled graph's name holds a hash that differs from machine to machine."""
    return "compiled graph (torch.compile)" if name.startswith(_COMPILED) else name[:_LONGEST_NAME]


def _families(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    tables = []
    for family, meaning in FAMILIES.items():
        mine = [row for row in rows if row["family"] == family]
        if mine:
            tables.append(
                {
                    "family": family,
                    "calls": sum(row["calls"] for row in mine),
                    "ms": round(sum(row["ms"] for row in mine), 4),
                    "share": round(sum(row["share"] for row in mine), 6),
                    "meaning": meaning,
                }
            )
    return sorted(tables, key=lambda table: (table["family"] == OTHER, -table["share"]))


def _runtime(inside: Sequence[Span]) -> list[dict[str, Any]]:
    by_name: dict[str, _Row] = {}
    for span in inside:
        if span.is_runtime:
            row = by_name.setdefault(span.name, _Row())
            row.calls += 1
            row.us += span.duration
    ordered = sorted(by_name.items(), key=lambda item: (-item[1].us, item[0]))
    return [{"name": name, "calls": row.calls, "ms": round(row.us / 1000.0, 4)} for name, row in ordered]


def _device_activity(device: Sequence[Span], inside: Sequence[Span], window: Interval) -> dict[str, Any]:
    end = max(window[1], *(span.end for span in device))
    wall = end - window[0]
    computing = merged((s.start, s.end) for s in device if s.category == KERNEL)
    copying = merged((s.start, s.end) for s in device if s.category != KERNEL)
    busy = length(merged([*computing, *copying]))
    waits = length(merged((s.start, s.end) for s in inside if s.is_runtime and "Synchronize" in s.name))
    overlap = length(intersection(computing, copying))
    copied = length(copying)
    return {
        "busy_ms": round(busy / 1000.0, 4),
        "busy_share": _percent(busy, wall),
        "host_wait_ms": round(waits / 1000.0, 4),
        "host_wait_share": _percent(waits, wall),
        "copies": {
            "ms": round(copied / 1000.0, 4),
            "overlap_ms": round(overlap / 1000.0, 4),
            "overlap_share": _percent(overlap, copied),
            "kinds": _copy_kinds(device),
        },
    }


def _percent(part: float, whole: float) -> float | None:
    return round(100.0 * part / whole, 4) if whole > 0 else None


def _copy_kinds(device: Sequence[Span]) -> list[dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for span in device:
        if span.category == KERNEL:
            continue
        kind = next((word for word in _COPY_KINDS if word in span.name), "memset" if "memset" in span.category else "")
        entry = kinds.setdefault(kind or "other", {"kind": kind or "other", "calls": 0, "ms": 0.0, "bytes": 0})
        entry["calls"] += 1
        entry["ms"] = round(entry["ms"] + span.duration / 1000.0, 4)
        entry["bytes"] += int(span.args.get("bytes") or 0)
    return sorted(kinds.values(), key=lambda entry: -entry["ms"])

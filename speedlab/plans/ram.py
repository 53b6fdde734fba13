"""How much RAM a batch may still take. A CPU that runs out of memory is killed, so nothing is tried there by force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measure.peaks import rss_bytes
from .batch_search import RAM_SHARE, predicted_bytes
from .cell_record import CellRuns
from .cells import Cell

_CGROUP = Path("/sys/fs/cgroup")


class NotTriedError(MemoryError):
    """A batch that was predicted not to fit, and therefore not run."""


def refuse_too_large(cell: Cell, known: Sequence[CellRuns], device: Any, start: int) -> None:
    """Raise NotTriedError for a batch on a CPU that will not fit by what smaller ones took.

    `start` is the resident set in bytes before the sweep.
    """
    batch, peaks = cell.settings.batch, _peaks(cell, known)
    smaller = {size: peak for size, peak in peaks.items() if size < batch}
    if device.type != "cpu" or not smaller or batch in peaks:
        return
    growth = predicted_bytes(smaller, start, batch)
    reason = too_large(growth, rss_bytes() or 0, start, free_ram_bytes())
    if reason is not None:
        raise NotTriedError(f"batch {batch} {reason}")


def free_ram_bytes() -> int:
    """RAM that this process may still take: what the system has left, or the limit of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdigit() else free


def too_large(growth: int, resident_now: int, start: int, free: int) -> str | None:
    """Why a batch whose peak lies `growth` bytes over `start` is not tried; None where it fits in 80 % of `free`."""
    needed = start + growth - resident_now
    if needed <= RAM_SHARE * free:
        return None
    return (
        f"not tried: it would run out of memory: {needed / 1e9:.1f} GB by prediction, more than {RAM_SHARE:.0%} of the "
        f"{free / 1e9:.1f} GB of RAM that are free"
    )


def _peaks(cell: Cell, known: Sequence[CellRuns]) -> dict[int, int]:
    """Peak resident bytes by batch size, of the cells that differ from this one in the batch alone."""
    same = [pair for pair in cell.labels if pair[0] != "batch"]
    peaks: dict[int, int] = {}
    for runs in known:
        peak = runs.first and runs.first.record.memory.get("overall", {}).get("peak_rss_gb")
        if peak and same == [pair for pair in runs.cell.labels if pair[0] != "batch"]:
            peaks[runs.cell.settings.batch] = int(peak * 1e9)
    return peaks

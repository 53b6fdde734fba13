"""The largest batch that fits: doubled until one does not, then the gap is halved. Pure.

How much RAM a batch may still take. A CPU that runs out of memory is killed, so nothing is tried there by force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..measure.peaks import rss_bytes
from .axes import Cell
from .cell_record import CellRuns

SATURATED = 0.95
RAM_SHARE = 0.8
_SIZES = 3


@dataclass
class BatchSearch:
    """Which batch to try next. `fits` and `fails` are what is known; `most` is a limit that needs no failure.

    `limited`: the user gave that limit. `predicted`: those of `fails` that were not tried. `broken_at`: the size whose
    run failed for another reason than memory, which ends the search.
    """

    fits: set[int] = field(default_factory=set)
    fails: set[int] = field(default_factory=set)
    most: int | None = None
    limited: bool = True
    predicted: set[int] = field(default_factory=set)
    broken_at: int | None = None

    def note(self, batch: int, status: str, was_tried: bool = True) -> None:
        """Note how a run of one batch size ended: `ok`, `oom`, or in another way."""
        if status in ("ok", "oom"):
            self.tried(batch, status == "ok")
            if not was_tried:
                self.predicted.add(batch)
        elif self.broken_at is None:
            self.broken_at = batch

    def tried(self, batch: int, fitted: bool) -> None:
        """Note the outcome of one batch size."""
        (self.fits if fitted else self.fails).add(batch)

    def next(self) -> int | None:
        """The next size to try, or None when the largest that fits is known (or nothing fits)."""
        if self.broken_at is not None:
            return None
        largest = max(self.fits, default=0)
        above = min((size for size in self.fails if size > largest), default=None)
        if largest == 0:
            smallest_failed = min(self.fails, default=None)
            return 1 if smallest_failed is None else (smallest_failed // 2 or None)
        if above is None:
            double = largest * 2 if self.most is None else min(largest * 2, self.most)
            return double if double > largest else None
        middle = (largest + above) // 2
        return middle if largest < middle < above else None


def predicted_bytes(peaks: Mapping[int, int], start: int, batch: int) -> int:
    """Growth over `start` in bytes that `batch` will need, by a line through what was measured.

    `peaks` are peak bytes by batch size. With one point the whole growth counts as proportional to the batch.
    """
    points = sorted(peaks.items())
    if not points:
        return 0
    last, top = points[-1]
    if len(points) == 1:
        return int(max(top - start, 0) * batch / last)
    before, below = points[-2]
    # A peak that did not grow was some other phase's; then the mean growth of an image is the safer guess.
    slope = (top - below) / (last - before) if top > below else max(top - start, 0) / last
    return int(max(top - start, 0) + slope * max(batch - last, 0))


def saturation_point(rates: Mapping[int, float]) -> int | None:
    """The smallest batch that reaches 95 % of the best images a minute.

    None where that is not shown: of fewer than three sizes, and where the largest one is the best, which a still larger
    one may exceed.
    """
    if len(rates) < _SIZES or max(rates, key=lambda batch: rates[batch]) == max(rates):
        return None
    best = max(rates.values())
    return min(batch for batch, rate in rates.items() if rate >= SATURATED * best)


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
        peak = runs.first and runs.first[0].record.memory.get("overall", {}).get("peak_rss_gb")
        if peak and same == [pair for pair in runs.cell.labels if pair[0] != "batch"]:
            peaks[runs.cell.settings.batch] = int(peak * 1e9)
    return peaks

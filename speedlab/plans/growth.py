"""What a cell adds to the memory of the process. Its peak would tell of all cells, whose weights are there in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.peaks import MemoryPeak

RSS, GROWTH = "peak_rss_gb", "rss_growth_gb"
Memory = Mapping[str, Mapping[str, Any]]


def growth_gb(start: int | None, peaks: Sequence[MemoryPeak], sampling: Mapping[str, Any]) -> float | None:
    """How far the resident set rose over `start` bytes in the blocks of one run; None where no peak can be measured.

    Less than the run needs where it reuses what an earlier one gave back and the process kept.
    """
    if start is None:
        return None
    known = [peak.rss / 1e9 for peak in peaks if peak.rss is not None]
    known += [float(sampling[RSS])] if sampling.get(RSS) is not None else []
    return round(max(max(known) - start / 1e9, 0.0), 4) if known else None


def with_growth(memory: Memory, growths: Sequence[float | None]) -> dict[str, Mapping[str, Any]]:
    """A cell's memory with its largest growth in place of the process's peak, which stays with each phase."""
    known = [growth for growth in growths if growth is not None]
    overall = {**memory.get("overall", {}), RSS: None, GROWTH: max(known, default=None)}
    return {**memory, "overall": overall}

"""The largest batch that fits: doubled until one does not, then the gap is halved. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    # A peak that did not grow was some other phase's; then the mean growth of a picture is the safer guess.
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

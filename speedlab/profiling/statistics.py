"""Summary statistics of step and run times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and spread of a series; percentiles interpolate linearly, the deviation is the sample's."""

    median: float
    mean: float
    min: float
    max: float
    p10: float
    p90: float
    std: float


def spread(values: Sequence[float]) -> Spread | None:
    """Statistics of `values`, or None for an empty series; one value has a deviation of 0."""
    if not values:
        return None
    return Spread(
        median=statistics.median(values),
        mean=statistics.fmean(values),
        min=min(values),
        max=max(values),
        p10=percentile(values, 0.10),
        p90=percentile(values, 0.90),
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
    )


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th quantile (0 to 1) with linear interpolation. Raises ValueError for an empty series."""
    if not values:
        raise ValueError("percentile of an empty series")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

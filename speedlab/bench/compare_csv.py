"""Two results tables against each other: ratio of times with a confidence interval, regressions named. Pure."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..profiling.record import CSV_COLUMNS
from .errors import BenchError

KEY = ("scenario", "plan", "batch", "width", "height", "steps", "cfg", "sampler", "scheduler", "precision",
       "accelerators", "seed", "checkpoint")  # fmt: skip
_NAMED = frozenset({"scenario", "plan", "batch", "width", "height", "steps", "cfg"})
CONFIDENCE = 0.95
THRESHOLD = 0.03
# No run is shorter or longer, and none is repeated more often; beyond that arithmetic would overflow.
_SHORTEST_S, _LONGEST_S, _MOST_REPEATS = 1e-9, 1e9, 10**6
_WIDEST = 600.0


@dataclass(frozen=True)
class Sample:
    """Times of one setting: mean and standard deviation in seconds over `count` repeats."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """B's time over A's. `low` and `high` bound the ratio with 95 % confidence; None where a side has one repeat.

    `varying` are the fields of the key that no name shows and that tell some of the settings compared apart.
    """

    key: tuple[str, ...]
    a: Sample
    b: Sample
    ratio: float
    low: float | None
    high: float | None
    varying: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        """B is slower by more than 3 %, beyond doubt."""
        return self.low is not None and self.low > 1.0 and self.ratio > 1.0 + THRESHOLD

    @property
    def name(self) -> str:
        """The setting in a few words."""
        row = dict(zip(KEY, self.key, strict=True))
        size = f"{row['width']}x{row['height']} batch {row['batch']}"
        told = f"{row['scenario'] or '-'}: {row['plan'] or 'stock'}, {size}, {row['steps']} steps, cfg {row['cfg']}"
        return ", ".join([told, *(f"{field} {row[field] or '-'}" for field in self.varying)])


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a results table. Raises BenchError for a file that is none, naming the columns that differ."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            lines = [line for line in reader if line]
    except FileNotFoundError:
        raise BenchError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchError(f"{path} cannot be read as a table: {error}") from error
    if header is None:
        raise BenchError(f"{path} is empty")
    if tuple(header) != CSV_COLUMNS:
        missing = [name for name in CSV_COLUMNS if name not in header]
        foreign = [name for name in header if name not in CSV_COLUMNS]
        what = "; ".join(
            f"{word} {', '.join(names)}" for word, names in (("it lacks", missing), ("unknown are", foreign)) if names
        )
        raise BenchError(
            f"{path} is not a results table of this version: {what or 'its columns stand in another order'}"
        )
    broken = [number for number, line in enumerate(lines, start=2) if len(line) != len(CSV_COLUMNS)]
    if broken:
        raise BenchError(f"{path}: line {broken[0]} has not {len(CSV_COLUMNS)} cells; it was cut off or edited")
    return [dict(zip(CSV_COLUMNS, line, strict=True)) for line in lines]


def samples(rows: Sequence[Mapping[str, str]], path: Path) -> dict[tuple[str, ...], Sample]:
    """One sample a setting, of all its good rows together. Raises BenchError for a cell that is no number."""
    grouped: dict[tuple[str, ...], list[Sample]] = {}
    for row in rows:
        if row["status"] != "ok" or not row["time_s"]:
            continue
        try:
            mean = float(row["time_mean_s"] or row["time_s"])
            sample = Sample(mean, float(row["time_std_s"] or 0.0), max(int(row["repeats"] or 1), 1))
        except ValueError as error:
            raise BenchError(f"{path}: run {row['run_id']} has a time that is no number: {error}") from None
        if not _SHORTEST_S <= mean <= _LONGEST_S:
            raise BenchError(f"{path}: run {row['run_id']} has the impossible time {mean:g} s")
        if not 0.0 <= sample.std <= _LONGEST_S:
            raise BenchError(f"{path}: run {row['run_id']} has the impossible deviation {sample.std:g} s")
        if sample.count > _MOST_REPEATS:
            raise BenchError(f"{path}: run {row['run_id']} has more than {_MOST_REPEATS} repeats")
        grouped.setdefault(tuple(row[name] for name in KEY), []).append(sample)
    return {key: _pooled(group) for key, group in grouped.items()}


def compare(a: Mapping[tuple[str, ...], Sample], b: Mapping[tuple[str, ...], Sample]) -> list[Comparison]:
    """Every setting that both tables have, the worst first."""
    shared = [key for key in a if key in b]
    varying = tuple(
        name for place, name in enumerate(KEY) if name not in _NAMED and len({key[place] for key in shared}) > 1
    )
    compared = [replace(_compare(key, a[key], b[key]), varying=varying) for key in shared]
    return sorted(compared, key=lambda entry: -entry.ratio)


def _pooled(group: Sequence[Sample]) -> Sample:
    """Mean and deviation of all repeats of several rows."""
    count = sum(sample.count for sample in group)
    mean = sum(sample.mean * sample.count for sample in group) / count
    squares = sum((s.count - 1) * s.std**2 + s.count * (s.mean - mean) ** 2 for s in group)
    return Sample(mean, math.sqrt(squares / (count - 1)) if count > 1 else 0.0, count)


def _compare(key: tuple[str, ...], a: Sample, b: Sample) -> Comparison:
    """Welch's interval on the logarithm of the ratio: relative errors of both means add up there."""
    ratio = b.mean / a.mean
    if a.count < 2 or b.count < 2:
        return Comparison(key, a, b, ratio, None, None)
    variances = [(sample.std / sample.mean) ** 2 / sample.count for sample in (a, b)]
    total = sum(variances)
    if total == 0.0:
        return Comparison(key, a, b, ratio, ratio, ratio)
    freedom = total**2 / sum(v**2 / (s.count - 1) for v, s in zip(variances, (a, b), strict=True))
    reach = _student(freedom) * math.sqrt(total)
    # Samples that scatter far beyond their mean bound nothing; exp would overflow.
    high = ratio * math.exp(reach) if reach < _WIDEST else math.inf
    return Comparison(key, a, b, ratio, ratio * math.exp(-reach), high)


def _student(freedom: float) -> float:
    """The two-sided quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2.0, freedom))

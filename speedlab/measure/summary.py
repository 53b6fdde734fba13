"""The figures of a run: one function computes them, and every surface shows these and no others.

A step's time is sampling time over steps, and the rate its inverse, so that steps / it_per_s is the sampling time. A
median over all steps is not given: where a technique makes steps of several kinds it is the commonest kind's.

Summary statistics of step and run times.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .record_shape import is_number
from .trace import StepRow

FULL, CACHED, FORECAST, CFG_OFF = "full", "cached", "forecast", "cfg_off"
KINDS = (FULL, CACHED, FORECAST, CFG_OFF)
KIND_NAMES = {FULL: "full", CACHED: "cached", FORECAST: "forecast", CFG_OFF: "CFG off"}
NO_STEPS = (
    "This record is of schema 1 and holds no steps: the rate it held was not sampling time over steps, so none is "
    "shown. Measure again to have one."
)
OLD_TOTAL = (
    "This record is of schema 1, whose time from text to image left out moving weights to the device, so none is "
    "shown. Measure again to have one."
)
# What schema 1 derived from the median step.
_OF_MEDIAN_STEP = ("step_median_ms", "step_min_ms", "step_max_ms", "step_p10_ms", "step_p90_ms", "step_std_ms")
# What schema 1 derived from its time from text to image.
_OF_OLD_TOTAL = ("totals_ms", "images_per_min")
_FIELDS = tuple(f.name for f in dataclasses.fields(StepRow))


def summarise(
    runs_ms: Sequence[float],
    steps: Sequence[Sequence[StepRow]],
    first_eval_ms: float | None,
    first_step_ms: float | None,
) -> dict[str, Any]:
    """The record's `summary` from every measured run.

    `steps` holds the step rows of each measured run; `first_eval_ms` and `first_step_ms` are of the very first run,
    warm-up included, which pays for compilation.
    """
    per_run = spread(list(runs_ms))
    taken = len(steps[0]) if steps else 0
    kinds = _kinds(steps)
    usual = kinds.get(_first_kind(steps), {})
    # The only step there is exceeds no other.
    alone = usual.get("samples") == usual.get("steps") == 1 and steps[0][0].ms == first_step_ms
    usual_ms = None if alone else usual.get("median_ms")
    return {
        "repeats": len(runs_ms),
        "runs_ms": [round(ms, 3) for ms in runs_ms],
        "run": None if per_run is None else {k: round(v, 3) for k, v in dataclasses.asdict(per_run).items()},
        **speed(None if per_run is None else per_run.median, taken),
        "step_kinds": kinds,
        "first_eval_ms": _round(first_eval_ms),
        "first_step_excess_ms": None if first_step_ms is None or usual_ms is None else _round(first_step_ms - usual_ms),
        "images_per_min": None,
    }


def speed(sampling_ms: float | None, steps: int) -> dict[str, Any]:
    """Steps, time of a step and steps a second of a sampling; None where nothing was sampled."""
    known = sampling_ms is not None and sampling_ms > 0 and steps > 0
    step_ms = sampling_ms / steps if known else None  # type: ignore[operator]
    # Six digits, not decimals: a step may take minutes.
    return {
        "steps": steps,
        "step_time_ms": None if step_ms is None else float(f"{step_ms:.6g}"),
        "it_per_s": None if step_ms is None else float(f"{1000.0 / step_ms:.6g}"),
    }


def step_kinds(rows: Sequence[StepRow]) -> list[str | None]:
    """What each step of a run was; None for one that the sampler took without an evaluation."""
    with_uncond = any(row.uncond_rows for row in rows)
    return [_kind(row, with_uncond) for row in rows]


def _kind(row: StepRow, with_uncond: bool) -> str | None:
    if not row.evals:
        return None
    if not row.cond_rows and not row.uncond_rows:
        return FORECAST  # no evaluation reached the network
    if row.cached:
        return CACHED
    return CFG_OFF if with_uncond and not row.uncond_rows else FULL


def _kinds(steps: Sequence[Sequence[StepRow]]) -> dict[str, dict[str, float | int]]:
    """Steps of one run and the spread over all runs, by kind; `samples` are the steps that the spread is of.

    A run's first step, which also prepares, stands for its kind only where nothing else does.
    """
    found: dict[str, dict[str, float | int]] = {}
    runs = [list(zip(rows, step_kinds(rows), strict=True)) for rows in steps]
    for kind in KINDS:
        mine = [row.ms for run in runs for row, its in run[1:] if its == kind]
        samples = mine or [row.ms for run in runs for row, its in run if its == kind]
        times = spread(samples)
        if times is not None:
            count = sum(its == kind for _, its in runs[0])
            spreads = {f"{name}_ms": round(value, 4) for name, value in dataclasses.asdict(times).items()}
            found[kind] = {"steps": count, "samples": len(samples), **spreads}
    return found


def _first_kind(steps: Sequence[Sequence[StepRow]]) -> str:
    return next((kind for kind in step_kinds(steps[0]) if kind), FULL) if steps else FULL


def has_median(kind: Mapping[str, Any]) -> bool:
    """Whether a kind's `median_ms` is one; of a single step it is that step's time. Older records hold no samples."""
    samples = kind.get("samples", kind.get("steps"))
    return is_number(samples) and samples > 1


def rows_of(steps: Sequence[Mapping[str, Any]]) -> tuple[StepRow, ...]:
    """A record's `steps` as rows. Raises KeyError for a step that lacks a field."""
    return tuple(StepRow(**{name: step[name] for name in _FIELDS}) for step in steps)


def from_schema_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """A record of schema 1, which held the median step's rate, with the rate computed from its steps.

    A file may hold anything: what is no number is left out. Without steps there is no rate, and a warning says so. Its
    time from text to image is not that of schema 2 and goes, with a warning too.
    """
    phases = data.get("phases_ms")
    data = {**data, "schema": 2}
    if isinstance(phases, Mapping):
        data["phases_ms"] = {**phases, "to_device": "unknown", "total": None}
        if phases.get("total") is not None:
            data = _warned(data, OLD_TOTAL)
    old = data.get("summary")
    if not isinstance(old, Mapping):
        return data
    steps = data.get("steps")
    times = [_step_ms(step) for step in steps] if isinstance(steps, (list, tuple)) else []
    known = [ms for ms in times if ms is not None]
    runs = old.get("runs_ms")
    measured = [ms for ms in runs if is_number(ms)] if isinstance(runs, (list, tuple)) else []
    sampling_ms = statistics.median(measured) if measured else sum(known)
    rows = _sound_rows(steps) if known else ()
    summary = {name: value for name, value in old.items() if name not in _OF_MEDIAN_STEP and name not in _OF_OLD_TOTAL}
    summary |= speed(float(sampling_ms), len(times)) if known else {"it_per_s": None, "step_time_ms": None}
    summary["step_kinds"] = kinds = _kinds([rows]) if rows else {}
    usual, excess = kinds.get(_first_kind([rows]), {}).get("median_ms"), old.get("first_step_excess_ms")
    before = old.get("step_median_ms")
    if is_number(excess):
        summary["first_step_excess_ms"] = _round(excess + before - usual) if usual and is_number(before) else None
    upgraded = {**data, "summary": summary}
    return _warned(upgraded, NO_STEPS) if not known and old.get("it_per_s") is not None else upgraded


def _warned(data: dict[str, Any], warning: str) -> dict[str, Any]:
    warnings = data.get("warnings", ())
    return {**data, "warnings": [*warnings, warning]} if isinstance(warnings, (list, tuple)) else data


def _step_ms(step: Any) -> float | None:
    """Device time of a step where there is one, else host time; None for what is no step."""
    if not isinstance(step, Mapping):
        return None
    ms = step.get("cpu_ms") if step.get("gpu_ms") is None else step.get("gpu_ms")
    return ms if is_number(ms) and ms >= 0 else None


def _sound_rows(steps: Any) -> tuple[StepRow, ...]:
    """The rows of steps that all are whole; none where one is not."""
    try:
        rows = rows_of(steps)
    except (KeyError, TypeError):
        return ()
    counts = (count for row in rows for count in (row.evals, row.cond_rows, row.uncond_rows))
    whole = all(_step_ms(step) is not None for step in steps) and all(map(is_number, counts))
    return rows if whole else ()


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


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

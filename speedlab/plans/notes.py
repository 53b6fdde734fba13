"""What a table cannot show, in sentences: what failed, the largest batch, where throughput saturates, overhead."""

from __future__ import annotations

from collections.abc import Sequence

from .batch_search import BatchSearch, saturation_point
from .cell_record import CellRuns

_REPEATS = 2


def notes_of(cells: Sequence[CellRuns], measured_ms: float, wall_ms: float) -> list[str]:
    """The notes of a finished sweep. `measured_ms` of `wall_ms` were spent in phases that the records name."""
    notes = [f"{runs.cell.name}: {runs.status}: {runs.error}" for runs in cells if runs.status != "ok"]
    notes += warning_notes(cells)
    notes += saturation_notes([runs for runs in cells if runs.status == "ok"])
    if wall_ms > 0 and measured_ms > 0:
        share = max(1.0 - measured_ms / wall_ms, 0.0)
        notes.append(f"{share:.1%} of the {wall_ms / 1000.0:.1f} s was neither loading nor anything that a row counts.")
    return notes


def warning_notes(cells: Sequence[CellRuns]) -> list[str]:
    """What the records warn of, with the cells that each sentence is about."""
    told: dict[str, list[str]] = {}
    for runs in cells:
        for text in () if runs.record is None else runs.record.warnings:
            told.setdefault(text, []).append(runs.cell.name)
    return [f"{'; '.join(names)}: {text}" for text, names in told.items()]


def saturation_notes(cells: Sequence[CellRuns]) -> list[str]:
    """Where more pictures at once gain nothing more, for each value of the axis beside `batch`.

    Sizes of one repeat say nothing of it: a single run swings by more than what is asked here.
    """
    groups: dict[str, dict[int, float]] = {}
    for runs in cells:
        rate = runs.record.summary.get("images_per_min") if runs.record is not None else None
        if rate and len(runs.repeats) >= _REPEATS and any(axis == "batch" for axis, _ in runs.cell.labels):
            other = ", ".join(f"{axis} {label}" for axis, label in runs.cell.labels if axis != "batch")
            groups.setdefault(other, {})[runs.cell.settings.batch] = float(rate)
    notes = []
    for other, rates in groups.items():
        point = saturation_point(rates)
        if point is not None:
            notes.append(
                f"{_where(other)}Throughput saturates at batch {point}: {rates[point]:.1f} images a minute, best "
                f"{max(rates.values()):.1f}, batch {max(rates)} {rates[max(rates)]:.1f}."
            )
    return notes


def largest_note(search: BatchSearch, other: str) -> str:
    """What the search for the largest batch found."""
    if search.broken_at is not None:
        known = f" Batch {max(search.fits)} fits." if search.fits else ""
        return f"{_where(other)}The search for the largest batch ended in an error at batch {search.broken_at}.{known}"
    if not search.fits:
        return f"{_where(other)}{'No batch size fits' if 1 in search.fails else 'None of the batch sizes fits'}."
    largest = max(search.fits)
    if largest + 1 in search.fails - search.predicted:
        return f"{_where(other)}The largest batch that fits is {largest}."
    fits = f"{_where(other)}Batch {largest} fits; whether a larger one does is not known:"
    refused = min((size for size in search.predicted if size > largest), default=None)
    if refused is not None:
        return f"{fits} batch {refused} was not tried, because it would run out of memory by prediction."
    return f"{fits} {'the limit given is' if search.limited else 'none is tried above'} {search.most or largest}."


def _where(other: str) -> str:
    return f"{other}: " if other else ""

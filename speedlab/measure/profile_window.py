"""Which steps to look at closely: two or three like most others, or one whole interval of a technique that caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .trace import StepRow

_STEPS = 3
_LONGEST_INTERVAL = 8


@dataclass(frozen=True)
class Window:
    """Neighbouring steps by index, and the evaluations that belong to them, which lie in `first` <= n < `end`.

    A sampler that looks ahead evaluates other steps in between.
    """

    steps: tuple[int, ...]
    first: int
    end: int
    notes: tuple[str, ...] = ()
    evaluations: tuple[int, ...] = ()


def choose_window(rows: Sequence[StepRow], owners: Sequence[int]) -> Window | None:
    """The steps to profile of a run with these rows; `owners` names the step of each evaluation.

    Without caching steps 2 to 4, since the first one also holds what the sampler prepares. With caching one full step
    and the cached ones behind it, in the proportion of the run. None for a run without an evaluation.
    """
    taken = [row for row in rows if row.evals]
    if not taken:
        return None
    chosen = _interval(taken) if any(row.cached for row in taken) else (taken[1:] or taken)[:_STEPS]
    notes = []
    if len(chosen) > _LONGEST_INTERVAL:
        chosen = chosen[:_LONGEST_INTERVAL]
        notes.append(f"Of a long caching interval only the first {_LONGEST_INTERVAL} steps were profiled.")
    without = [row for row in taken if not row.uncond_rows]
    if 0 < len(without) < len(taken) and all(row.uncond_rows for row in chosen):
        notes.append(f"The profiled steps are with guidance; {len(without)} of {len(taken)} steps ran without.")
    if chosen[0] is taken[0]:
        notes.append("The profiled steps include the first, whose time may hold preparing and compiling.")
    steps = tuple(row.index for row in chosen)
    mine = [n for n, owner in enumerate(owners) if owner in steps]
    others = mine[-1] + 1 - mine[0] - len(mine)
    if others:
        notes.append(f"This sampler evaluates other steps in between: {others} of the profiled evaluations are theirs.")
    return Window(steps, mine[0], mine[-1] + 1, tuple(notes), tuple(mine))


def _interval(rows: Sequence[StepRow]) -> Sequence[StepRow]:
    """A full step with the cached ones behind it: a complete interval first, of those one after the first step."""
    starts = [n for n, row in enumerate(rows) if not row.cached] or [0]
    ends = [*starts[1:], len(rows)]
    caching = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start > 1]
    if not caching:
        return rows[:_STEPS]
    start, end = min(caching, key=lambda pair: (pair[1] == len(rows), pair[0] == 0, pair[0]))
    return rows[start:end]

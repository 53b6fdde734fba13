"""How much slower B is than A, from sessions of both in turn on a machine whose own speed drifts. Pure.

A session is what ran together: rows of one table in whose course no run of the other table lies, and between which no
more than ten minutes pass. A row's run began at the time in its run id (a sweep gives its ids when it begins) and ended
at its timestamp; rows that overlap are therefore one session, and so are all rows of a table that have no such times.
Nothing inside a session counts as a repeat, for a machine keeps its speed for minutes and then moves by a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from speedlab.measure.record import RUN_ID

CONFIDENCE = 0.975  # checked by simulation: five in a hundred equal pairs of series at most are called different
TURNS = 3
GAP_S = 600.0
_RUN_STAMP, _ROW_STAMP = "%Y%m%d-%H%M%S", "%Y-%m-%dT%H:%M:%S%z"
_STAMP_LETTERS = 15
_HOUR_S = 3600.0  # what happened between sessions that lie further apart is no steady drift
_WIDEST = 600.0  # beyond that exp would overflow


@dataclass(frozen=True)
class Span:
    """When a run began and ended, in seconds since 1970."""

    start: float
    end: float


@dataclass(frozen=True)
class Session:
    """One setting in one session: the middle of its time (None where unknown) and its time in seconds."""

    middle: float | None
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """B's time over A's, with the bounds of its interval."""

    ratio: float
    low: float
    high: float


def span_of(run_id: str, timestamp: str) -> Span | None:
    """When a row's run went on; None where one of the two is not as SpeedLab writes it."""
    if not RUN_ID.fullmatch(run_id):
        return None
    try:
        end = datetime.strptime(timestamp, _ROW_STAMP)
        start = datetime.strptime(run_id[:_STAMP_LETTERS], _RUN_STAMP).replace(tzinfo=end.tzinfo)
        began, ended = start.timestamp(), end.timestamp()
    except (ValueError, OverflowError):
        return None
    # A second report on one run has an id younger than the run.
    return Span(min(began, ended), ended)


def split(mine: Sequence[Span | None], other: Sequence[Span | None]) -> list[int]:
    """The number of the session of each of `mine`: see the module's text."""
    sessions = [0] * len(mine)
    timed = sorted((span.start, span.end, place) for place, span in enumerate(mine) if span is not None)
    between = [span for span in other if span is not None]
    number, ended = 0, -math.inf
    for start, end, place in timed:
        parted = any(ended <= span.start and span.end <= start for span in between)
        if start - ended > GAP_S or parted:
            number += 1
        sessions[place] = number
        ended = max(ended, end)
    return sessions


def turns(a: Sequence[Session], b: Sequence[Session]) -> int:
    """How many pairs of one session of A and one of B that follow each other, each counted once: A B A B has two."""
    sides = [side for _, _, side in _in_time(a, b)]
    pairs, place = 0, 0
    while place + 1 < len(sides):
        if sides[place] != sides[place + 1]:
            pairs, place = pairs + 1, place + 1
        place += 1
    return pairs


def estimate(a: Sequence[Session], b: Sequence[Session]) -> Estimate:
    """The ratio from sessions with three turns or more.

    Steps from each session to the next, on the logarithm of time: a step from A to B holds the difference, one from B
    to A holds it with the other sign, and every step holds a steady drift in proportion to its length. Least squares
    give both. What is left is the machine's, and is taken either as a walk, new in every step, or as a level of its
    own in every session, new in every second step with the sign turned; the wider of both intervals counts.
    """
    import numpy as np
    from scipy.stats import t as student

    order = _in_time(a, b)
    times, values, sides = (np.array(column, dtype=float) for column in zip(*order, strict=True))
    lengths = np.minimum(np.diff(times), _HOUR_S) / _HOUR_S
    design, steps = np.stack([np.diff(sides), lengths], axis=1), np.diff(values)
    inverse = np.linalg.pinv(design)
    freedom = len(steps) - int(np.linalg.matrix_rank(design))
    difference = float(inverse[0] @ steps)
    rest = float(np.sum((steps - design @ (inverse @ steps)) ** 2))
    weights, leaves = inverse[0], np.eye(len(steps)) - design @ inverse
    levels = 2.0 * np.eye(len(steps)) - np.eye(len(steps), k=1) - np.eye(len(steps), k=-1)
    as_walk = rest / freedom * float(weights @ weights)
    as_levels = rest / float(np.trace(leaves @ levels)) * float(weights @ levels @ weights)
    reach = float(student.ppf(0.5 + CONFIDENCE / 2.0, freedom)) * math.sqrt(max(as_walk, as_levels))
    return Estimate(math.exp(difference), _exp(difference - reach), _exp(difference + reach))


def _in_time(a: Sequence[Session], b: Sequence[Session]) -> list[tuple[float, float, int]]:
    """Time, logarithm of seconds and side (A 0, B 1) of every session whose time is known, in the order of time."""
    both = [(one, side) for side, sessions in enumerate((a, b)) for one in sessions]
    return sorted((one.middle, math.log(one.seconds), side) for one, side in both if one.middle is not None)


def _exp(value: float) -> float:
    """Bounds that say nothing are 0 and infinity."""
    return math.exp(value) if abs(value) < _WIDEST else (math.inf if value > 0.0 else 0.0)

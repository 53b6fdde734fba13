"""Many inputs through many readers, counted. Input `index` of a target is always the same for a seed."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from .outcome import Target, judge

SEED = 20260101
_KEPT_DEFECTS = 20


@dataclass
class Tally:
    """What became of a target's inputs. `defects`: a reason with the first input that showed it, and how many did."""

    target: str
    counts: Counter[str] = field(default_factory=Counter)
    defects: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """How many were read."""
        return sum(self.counts.values())

    def line(self) -> str:
        """One line of the printed table."""
        return (
            f"{self.target:<22}{self.inputs:>9}{self.counts['fine']:>9}{self.counts['refused']:>9}"
            f"{self.counts['defect']:>9}{self.seconds:>9.1f}"
        )


HEADER = f"{'reader':<22}{'inputs':>9}{'fine':>9}{'refused':>9}{'defects':>9}{'seconds':>9}"


def draw(target: Target, index: int, seed: int = SEED) -> object:
    """The input of that number."""
    return target.make(Random(f"{seed}/{target.name}/{index}"))


def fuzz(target: Target, inputs: int, seed: int = SEED) -> Tally:
    """Read so many inputs."""
    tally = Tally(target.name)
    started = time.perf_counter()
    with _quiet():
        for index in range(inputs):
            outcome = judge(target, draw(target, index, seed))
            tally.counts[outcome.verdict] += 1
            if outcome.verdict == "defect" and (outcome.reason in tally.defects or len(tally.defects) < _KEPT_DEFECTS):
                first, count = tally.defects.get(outcome.reason, (index, 0))
                tally.defects[outcome.reason] = (first, count + 1)
    tally.seconds = time.perf_counter() - started
    return tally


def shares(targets: Sequence[Target], inputs: int) -> list[int]:
    """Inputs for each target: equal shares, whose sum is at least `inputs`."""
    return [-(-inputs // len(targets))] * len(targets)


@contextmanager
def _quiet() -> Iterator[None]:
    """Readers warn of what they are fed; a hundred thousand warnings help nobody."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

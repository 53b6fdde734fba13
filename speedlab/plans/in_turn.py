"""Measures variants in turn: round after round in a rotated order, so that a drift of the machine hits all alike.

Benchmark, the GPU suite, demo and the scripts of benchmarks/ measure through this. What a variant is, what one run
does and what becomes of the figures is theirs; order, warm-up, repeats and failures are here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..common.core import release_unused_memory
from ..common.errors import ResultsError

T = TypeVar("T")
Run = TypeVar("Run")


@dataclass(kw_only=True, eq=False)
class Series(Generic[Run]):
    """What was measured of one variant: `first` is its very first run, where compilation shows, `repeats` those that
    count. A series whose status is no longer `ok` is not measured again.
    """

    first: Run | None = None
    repeats: list[Run] = field(default_factory=list)
    status: str = "ok"
    error: str | None = None


AnySeries = TypeVar("AnySeries", bound=Series[Any])


@dataclass(frozen=True)
class Turn(Generic[AnySeries]):
    """One variant's turn in round `number`, counted from the first warm-up."""

    series: AnySeries
    number: int
    warmup: int
    repeats: int

    @property
    def counts(self) -> bool:
        """Whether this is no warm-up."""
        return self.number >= self.warmup

    @property
    def left(self) -> int:
        """Rounds that the variant still has, this one included."""
        return self.warmup + self.repeats - self.number

    @property
    def text(self) -> str:
        """What to call it while it runs."""
        return f"repeat {self.number - self.warmup + 1} of {self.repeats}" if self.counts else "warm-up"

    def keep(self, run: Any) -> None:
        """Add the turn's run to its series."""
        if self.series.first is None:
            self.series.first = run
        if self.counts:
            self.series.repeats.append(run)


def turns(
    variants: Sequence[AnySeries], repeats: int, warmup: int = 0, goes_on: Callable[[int], bool] = lambda rounds: True
) -> Iterator[Turn[AnySeries]]:
    """Every turn in order: warm-up and the first round that counts as given, each later round with another one first.

    `goes_on` is asked before each round but the first, with the number of rounds that are done.
    """
    for number in range(warmup + repeats):
        if number and not goes_on(number):
            return
        for series in turned(variants, max(number - warmup, 0)):
            if series.status == "ok":
                yield Turn(series, number, warmup, repeats)


def turned(items: Sequence[T], number: int) -> list[T]:
    """The items in the order of round `number`: A B C, B C A, C A B, and again.

    In a fixed order whatever recurs with each round, a GPU that is cold at its start say, would be the first one's.
    """
    begin = number % len(items) if items else 0
    return [*items[begin:], *items[:begin]]


@contextmanager
def own_failure(note: Callable[[Exception], str | None]) -> Iterator[None]:
    """What goes wrong inside ends one variant, not the others. `note` keeps it and gives its status, or None where the
    device must not be touched again.

    Raises what ends everything: a cancel, results that cannot be written, and whatever `note` raises.
    """
    import comfy.model_management as mm

    try:
        yield
    except (mm.InterruptProcessingException, ResultsError):
        raise
    except Exception as error:
        # Techniques, compilers and drivers raise types of their own.
        status = note(error)
        if status is None:
            return
        _release(error)
        if status == "oom":
            mm.unload_all_models()
        release_unused_memory()


def _release(error: BaseException | None) -> None:
    """The frames of an error hold the tensors that did not fit: free memory only after they are cleared."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

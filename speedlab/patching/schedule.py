"""Where an evaluation stands in a sampler's schedule, found from sigmas and never from counting evaluations.

Samplers such as Heun and DPM++ SDE evaluate the model more than once a step, and cond and uncond may come together or
apart, so a call counter drifts. A schedule that falls all the way, or rises all the way (noise inversion), names a step
by the sigma alone. In any other one a sigma may stand several times; there the sampler's callback, once a step, says
which of them is near.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# exp(log(sigma)) in fp32, as DPM-Solver does it, is off by a few 1e-7; neighbouring steps differ by far more.
_RELATIVE_TOLERANCE = 1e-5

Order = Literal["falls", "rises", "mixed"]


def order_of(sigmas: Sequence[float]) -> Order:
    """Whether every sigma is below the one before it, or above it; `mixed` also where one is repeated."""
    pairs = list(itertools.pairwise(sigmas))
    apart = 1.0 + 2.0 * _RELATIVE_TOLERANCE
    if all(before > after * apart for before, after in pairs):
        return "falls"
    return "rises" if all(after > before * apart for before, after in pairs) else "mixed"


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The last step whose sigma is at or above `sigma`; the first step for a sigma above them all.

    Of a schedule that rises, the last step whose sigma is at or below `sigma`. `sigmas` has one entry more than there
    are steps, as ComfyUI's `sample_sigmas` has. Raises ValueError without a single step.
    """
    steps = len(sigmas) - 1
    if steps < 1:
        raise ValueError("a schedule needs at least two sigmas")
    if sigmas[0] < sigmas[-1]:
        threshold = sigma * (1.0 + _RELATIVE_TOLERANCE)
        return max((index for index in range(steps) if sigmas[index] <= threshold), default=0)
    threshold = sigma * (1.0 - _RELATIVE_TOLERANCE)
    return max((index for index in range(steps) if sigmas[index] >= threshold), default=0)


@dataclass
class StepTracker:
    """Locates the evaluations of one run, given one after another, in any schedule of at least one step.

    `done` is how many steps the sampler's callback has reported. `went_back`: the evaluation that was located last
    belongs to a step that the sampler had left, as a sampler returns to one that adds noise again.
    """

    sigmas: tuple[float, ...]
    done: int = 0
    went_back: bool = False
    order: Order = field(init=False)
    _last: int | None = None
    _last_index: int | None = None
    # Whether the step that the sampler has come to was evaluated since the last callback.
    _visited: bool = False
    # Evaluations of the step before it since then, and how many a step has there; None before one has shown it.
    _behind: int = 0
    _usual: int | None = None
    # Whether one at a sigma that stands twice in a row was located before that was known.
    _guessed: bool = False

    def __post_init__(self) -> None:
        if len(self.sigmas) < 2:
            raise ValueError("a schedule needs at least two sigmas")
        self.order = order_of(self.sigmas)

    @property
    def reached(self) -> int:
        """The step that the sampler has come to; by its evaluations where it calls no callback."""
        return min(self._at, len(self.sigmas) - 2)

    @property
    def _at(self) -> int:
        """`reached`, and the number of steps behind the last callback."""
        return min(self.done or self._last or 0, len(self.sigmas) - 1)

    def step_done(self, index: int) -> None:
        """The callback for step `index`. Samplers that run parts of a schedule one after another begin again at 0."""
        if index != self._last_index:
            self._last_index = index
            self.reach(max(self.done, index) + 1)

    def reach(self, done: int) -> None:
        """As if `done` steps had been reported."""
        if done != self.done:
            if 0 < self.done < len(self.sigmas):
                ends = self.sigmas[self.done - 1 : self.done + 1]
                if min(ends) > 0.0 and not self._equals(self.done, ends[0]):
                    self._usual = max(self._usual or 0, self._behind)
            self.done, self._visited, self._behind = done, False, 0

    def locate(self, sigma: float) -> int | None:
        """The step of the evaluation at `sigma`; None where a mixed schedule does not lead through it near here.

        None, too, from where a sampler turns out to evaluate between two sigmas, after it did so at a sigma that
        stands twice in a row: that evaluation was taken for the next step's.
        """
        at = self._at
        step = step_of(sigma, self.sigmas) if self.order != "mixed" else self._nearby(sigma, at)
        if step is None or (self._guessed and self._usual):
            return None
        self._behind += step == self.done - 1
        left = self.done - 1 if self.done else step + 1
        self.went_back = self._last is not None and step < min(self._last, left)
        self._last = step
        self._visited = self._visited or step == at
        return step

    def _nearby(self, sigma: float, at: int) -> int | None:
        if self._is(at, sigma):
            # A sampler that evaluates between two sigmas, after its callback, does so at their own where they are one.
            if self.done and not self._visited and self._equals(at - 1, sigma):
                self._guessed = self._guessed or self._usual is None
                return at - 1 if self._behind < (self._usual or 0) else at
            return at
        # Behind its callback a step goes on until the next one's sigma is evaluated; from there a sampler looks ahead.
        around = (
            [(at + 1, at), (at - 1, at - 1)] if self._visited or not self.done else [(at - 1, at - 1), (at + 1, at)]
        )
        for exact, between in around:
            if self._is(exact, sigma):
                return exact
            if self._lies_in(between, sigma):
                return between
        if self._lies_in(at + 1, sigma):
            return at + 1
        return next((step for step in range(at + 2, len(self.sigmas) - 1) if self._is(step, sigma)), None)

    def _is(self, step: int, sigma: float) -> bool:
        """Whether `sigma` is the one of `step`."""
        return 0 <= step < len(self.sigmas) - 1 and self._equals(step, sigma)

    def _equals(self, place: int, sigma: float) -> bool:
        own = self.sigmas[place]
        return abs(own - sigma) <= _RELATIVE_TOLERANCE * max(abs(own), abs(sigma))

    def _lies_in(self, step: int, sigma: float) -> bool:
        """Whether `step` leads through `sigma`; the last one leads to the end of the schedule, too."""
        last = len(self.sigmas) - 2
        if not 0 <= step <= last:
            return False
        low, high = sorted(self.sigmas[step : step + 2])
        return low < sigma < high or (step == last and self._equals(last + 1, sigma))


def steps_before(fraction: float, steps: int) -> int:
    """floor(fraction * steps), kept from falling short where the product is a whole number in exact arithmetic."""
    return math.floor(fraction * steps + 1e-9)

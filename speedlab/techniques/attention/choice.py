"""Which attention to use for a shape: a short measurement, remembered, on a CPU for the next start too.

Nothing here knows ComfyUI; the caller brings the functions that are measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...common.measured import measured_once
from ...common.timing import MARGIN, apart, least_seconds

PREFERRED = "sdpa"
_ROUNDS = (5, 10)
_BUDGET_S = 0.1
_SHORTEST = 16
# Longer sequences would not change the choice, only the time that measuring takes: what attention without a fused
# kernel reads and writes grows with the square of the length, so it falls behind further.
_LONGEST = {"cpu": 1024}
_LONGEST_ELSEWHERE = 4096
# Fewer pairs of query and key take little time, whatever computes them: attention to a prompt, and the inner layers.
_WORTH_MEASURING = 1024 * 1024

_CANDIDATES = {
    # Sub-quadratic attention saves memory that a CPU does not lack, and takes 1.7 times as long there.
    "cpu": (PREFERRED, "split", "onednn"),
    "cuda": (PREFERRED, "sdpa_flash", "sdpa_mem_efficient", "sdpa_cudnn", "xformers", "flash_attn"),
}
_CANDIDATES_ELSEWHERE = (PREFERRED, "split", "sub_quadratic")


def candidates(device_type: str) -> tuple[str, ...]:
    """The backends that `auto` compares on a device such as `cpu` or `cuda`, all of them exact: sage is not."""
    return _CANDIDATES.get(device_type, _CANDIDATES_ELSEWHERE)


def bucket(length: int) -> int:
    """The power of two that stands for sequences of about `length` tokens."""
    return max(_SHORTEST, 1 << max(0, length - 1).bit_length())


def measured_length(tokens: int, device_type: str) -> int:
    """How many tokens to measure with, to choose for sequences of `tokens`."""
    return min(tokens, _LONGEST.get(device_type, _LONGEST_ELSEWHERE))


@dataclass(frozen=True)
class Shape:
    """What decides which attention is fastest. `queries` and `keys` are buckets, in tokens."""

    device: str
    dtype: Any
    head_dim: int
    queries: int
    keys: int
    masked: bool

    @property
    def is_worth_measuring(self) -> bool:
        """Whether the choice of a backend matters at this size."""
        return self.queries * self.keys >= _WORTH_MEASURING

    def __str__(self) -> str:
        masked = ", masked" if self.masked else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.queries}x{self.keys} tokens, head size {self.head_dim}, {dtype}{masked}"


@dataclass(frozen=True)
class Choice:
    """The backend picked for a shape, and the seconds that each candidate took (those that ran)."""

    name: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass
class ChoiceTable:
    """Choices made so far, one a shape."""

    _choices: dict[Shape, Choice] = field(default_factory=dict)

    def choose(
        self,
        shape: Shape,
        able: Callable[[], Collection[str]],
        runners: Callable[[], Mapping[str, Callable[[], object]]],
    ) -> Choice:
        """The choice for `shape`; measured now where it is the first time, and where it matters.

        `able` gives the candidates that can do it, of which a kept choice must be one. `runners` makes what is
        measured: for each of them a function that runs it once to the end.
        """
        if not shape.is_worth_measuring:
            return Choice(PREFERRED)
        known = self._choices.get(shape)
        if known is None:
            timed, on_cpu = partial(_timed, shape, runners), shape.device == "cpu"
            try:
                name = measured_once(f"attention of {shape}", timed, able()) if on_cpu else timed()
            except _UnsureError as error:
                name = error.name
            known = self._choices[shape] = Choice(name)
        return known


class _UnsureError(Exception):
    """`PREFERRED` failed, as it does where memory is short: the next start is to measure again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _timed(shape: Shape, runners: Callable[[], Mapping[str, Callable[[], object]]]) -> str:
    with apart("Timing attention backends"):
        found = pick(measure(runners()))
    times = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in found.seconds.items())
    logging.info("Attention Backend: auto picked %s for %s on %s (%s).", found.name, shape, shape.device, times)
    if PREFERRED not in found.seconds:
        raise _UnsureError(found.name)
    return found.name


def pick(seconds: Mapping[str, float]) -> Choice:
    """The fastest, unless `PREFERRED` is about as fast; `PREFERRED` where nothing could be measured."""
    if not seconds:
        return Choice(PREFERRED)
    fastest = min(seconds, key=lambda name: seconds[name])
    preferred = seconds.get(PREFERRED)
    if preferred is not None and seconds[fastest] > MARGIN * preferred:
        fastest = PREFERRED
    return Choice(fastest, dict(seconds))


def measure(
    runners: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The least seconds that each of `runners` took; see `least_seconds`. Any may fail; `PREFERRED` keeps its turns."""
    others = [name for name in runners if name != PREFERRED]
    return least_seconds(
        runners, rounds=_ROUNDS, budget_s=_BUDGET_S, may_fail=list(runners), may_be_dropped=others, clock=clock
    )

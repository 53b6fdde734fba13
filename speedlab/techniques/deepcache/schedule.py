"""Which steps DeepCache evaluates in full, and from which of them the others take their features."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ...patching.position import Part, window

Schedule = Literal["uniform", "nonuniform", "adaptive"]
Features = Literal["copy", "extrapolate"]
_POWER_DECREMENT = 0.02


@dataclass(frozen=True)
class DeepCacheConfig:
    """What the DeepCache node sets.

    interval: one full step in this many, `adaptive`: in at most this many; 1 is off.
    branch: 0 caches deepest; cached steps run input blocks 0..branch and the last branch + 1 output blocks.
    start, end: the window as fractions of the whole schedule's n steps, floor(start * n) <= step < floor(end * n).
    schedule: `uniform`, or `nonuniform` with full steps denser around step `center`, the more so the larger `power`.
    `adaptive`: a step is cached while the error that this adds to the latent, as the last full step measured it, stays
    within `tolerance` (relative to the denoised latent) since that step.
    features: those of the last full step, or a line through those of the last two where that was measured to be closer.
    Raises ValueError for a value out of range.
    """

    interval: int = 3
    branch: int = 0
    start: float = 0.0
    end: float = 1.0
    schedule: Schedule = "uniform"
    center: int = 15
    power: float = 1.4
    features: Features = "copy"
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"cache_interval is {self.interval}; it must be 1 (off) or more")
        if self.branch < 0:
            raise ValueError(f"cache_branch_id is {self.branch}; it must be 0 or more")
        for name, value in (("start_percent", self.start), ("end_percent", self.end)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
        for name, choices in (("schedule", get_args(Schedule)), ("features", get_args(Features))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if not 0.0 <= self.tolerance <= 1.0:
            raise ValueError(f"tolerance is {self.tolerance}; it must lie between 0 and 1")
        if self.center < 0:
            raise ValueError(f"center is {self.center}; it must be 0 or more")

    @property
    def is_off(self) -> bool:
        """Whether no step of any schedule would be cached."""
        is_exact = self.is_adaptive and self.tolerance == 0.0
        return self.interval == 1 or self.start >= self.end or is_exact

    @property
    def is_adaptive(self) -> bool:
        """Whether each run decides about its steps by itself."""
        return self.schedule == "adaptive"


def sources(config: DeepCacheConfig, steps: int, part: Part | None = None) -> tuple[int | None, ...]:
    """For each of a run's `steps` steps the full step whose features serve it.

    A step that is its own source is evaluated in full and its features are kept; None is a step outside the window,
    evaluated in full without keeping anything. The run's first step in the window is always its own source, and of the
    adaptive schedule every step is until the run decides otherwise. `part` is the run's place in the whole schedule;
    without it the run is the whole.
    """
    first, end = window(config.start, config.end, steps, part)
    if config.interval == 1 or first >= end:
        return (None,) * steps
    full = full_steps(config, first, end)
    plan: list[int | None] = [None] * steps
    source = first
    for step in range(first, end):
        source = step if step in full else source
        plan[step] = source
    return tuple(plan)


def full_steps(config: DeepCacheConfig, first: int, end: int) -> frozenset[int]:
    """The full steps of the window `first` <= step < `end`; uniform ones where `fallback` has something to say."""
    if config.is_adaptive:
        return frozenset(range(first, end))
    spread = _spread(config, first, end)
    if spread is None:
        return frozenset(range(first, end, config.interval))
    return frozenset(first + step for step in spread)


def fallback(config: DeepCacheConfig, steps: int, part: Part | None = None) -> str | None:
    """Why a run of `steps` steps has uniform full steps though others were asked for; None where it has those."""
    first, end = window(config.start, config.end, steps, part)
    if config.schedule != "nonuniform" or first >= end or _spread(config, first, end) is not None:
        return None
    if config.power <= 1.0:
        why = f"with power {config.power:g} a non-uniform schedule gathers nothing around its center"
        remedy = "Choose a power above 1."
    else:
        count = -(-(end - first) // config.interval)
        why = f"no non-uniform schedule has {count} full steps of {end - first} around step {config.center}"
        remedy = "Another center or a larger cache_interval has one."
    return f"DeepCache: {why}; the uniform one is used. {remedy}"


def _spread(config: DeepCacheConfig, first: int, end: int) -> tuple[int, ...] | None:
    """The non-uniform full steps, counted from `first`; None where the schedule is another one or there are none."""
    if config.schedule != "nonuniform":
        return None
    steps = end - first
    return nonuniform_steps(steps, -(-steps // config.interval), config.center - first, config.power)


def nonuniform_steps(steps: int, count: int, center: int, power: float) -> tuple[int, ...] | None:
    """`count` of `steps` steps, dense around `center`: the 1:N schedule of DeepCache (Ma et al., CVPR 2024).

    Points evenly spaced between the roots of -center and steps - center are raised to `power` again, and their real
    parts are cut to whole numbers: roots of negative numbers are complex, and the published lists rest on that. Where
    two points fall on one step, a smaller power is tried; None where none above 1 gives `count` different steps.
    """
    while power > 1.0:
        points = np.linspace((-center) ** (1.0 / power), (steps - center) ** (1.0 / power), count + 1) ** power
        offsets = np.unique(points.real.astype(np.int32))[1:-1]
        chosen = (0, *(int(offset) + center for offset in offsets))
        # A center before the window can put a point onto step 0 again.
        rises = all(earlier < later for earlier, later in itertools.pairwise((*chosen, steps)))
        if len(chosen) == count and rises:
            return chosen
        power -= _POWER_DECREMENT
    return None

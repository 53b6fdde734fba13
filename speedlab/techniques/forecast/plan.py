"""Which steps a run evaluates in full, as far as that can be told before the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...patching.position import Part, window

Mode = Literal["fixed", "adaptive"]

# A run with fewer steps has hardly any left between the first ones, where the image changes most, and the last ones.
FEWEST_STEPS = 10
_FIRST_FULL, _LAST_FULL = 4, 2
# The fixed plan evaluates at least one step in this many.
_WIDEST_GAP = 3


@dataclass(frozen=True)
class ForecastConfig:
    """What the Forecast node sets.

    adaptive: a step is forecast while the error that this adds to the latent, as the last full step measured it, stays
    within `tolerance` (relative to the denoised latent) since the last full step.
    fixed: forecasts grow from every second step to two in a row, whatever the image.
    max_skip: the most forecasts in a row; 0 is off. start, end: the window as shares of the whole schedule's n steps,
    floor(start * n) <= step < floor(end * n). Raises ValueError for a value out of range.
    """

    mode: Mode = "adaptive"
    tolerance: float = 0.02
    max_skip: int = 3
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        if not 0.0 <= self.tolerance <= 1.0:
            raise ValueError(f"tolerance is {self.tolerance}; it must lie between 0 and 1")
        if self.max_skip < 0:
            raise ValueError(f"max_skip is {self.max_skip}; it must be 0 (off) or more")
        for name, value in (("start_percent", self.start), ("end_percent", self.end)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must lie between 0 and 1")

    @property
    def is_off(self) -> bool:
        """Whether no step of any run would be forecast."""
        is_exact = self.mode == "adaptive" and self.tolerance == 0.0
        return self.max_skip == 0 or is_exact or self.start >= self.end


def open_steps(config: ForecastConfig, steps: int, part: Part | None = None) -> range:
    """The steps of a run of `steps` steps that may be forecast: neither the first four nor the last two of the run.

    The denoised latent of the last step is the image. `part` is the run's place in the whole schedule.
    """
    if steps < FEWEST_STEPS or config.is_off:
        return range(0)
    first, end = window(config.start, config.end, steps, part)
    return range(max(first, _FIRST_FULL), min(end, steps - _LAST_FULL))


def fixed_plan(config: ForecastConfig, steps: int, part: Part | None = None) -> frozenset[int]:
    """The steps that the fixed plan forecasts: the gap between full steps grows by a half at each of them."""
    forecast = set()
    half_gaps, in_a_row = 4, 0
    for step in open_steps(config, steps, part):
        if in_a_row + 1 >= min(_WIDEST_GAP, config.max_skip + 1, half_gaps // 2):
            half_gaps, in_a_row = half_gaps + 1, 0
        else:
            forecast.add(step)
            in_a_row += 1
    return frozenset(forecast)

"""Where an evaluation stands in a sampler's schedule, told from sigmas and never from counting calls.

Samplers such as Heun and DPM++ SDE evaluate the model more than once a step, and cond and uncond may come together or
apart, so a call counter drifts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# exp(log(sigma)) in fp32, as DPM-Solver does it, is off by a few 1e-7; neighbouring steps differ by far more.
_RELATIVE_TOLERANCE = 1e-5


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The last step whose sigma is at or above `sigma`; the first step for a sigma above them all.

    `sigmas` has one entry more than there are steps, as ComfyUI's `sample_sigmas` has. Raises ValueError without a
    single step.
    """
    steps = len(sigmas) - 1
    if steps < 1:
        raise ValueError("a schedule needs at least two sigmas")
    threshold = sigma * (1.0 - _RELATIVE_TOLERANCE)
    for index in range(steps - 1, -1, -1):
        if sigmas[index] >= threshold:
            return index
    return 0


def steps_before(fraction: float, steps: int) -> int:
    """floor(fraction * steps), kept from falling short where the product is a whole number in exact arithmetic."""
    return math.floor(fraction * steps + 1e-9)

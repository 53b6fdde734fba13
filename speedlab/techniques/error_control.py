"""What leaves out work decides by what that would have missed, as measured at each step that is evaluated in full.

A line through the values of the last two full steps stands for the value of a later one, damped by how much of its
slope lasted when that was last measured, down to a copy. At a full step the same is made for the step itself and
compared with what the model gave: its error, weighted by what it does to the latent, tells how far the next steps go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..patching.position import Position, StepFinder

# Values that lie closer together have no slope: a corrector evaluates where the next step's predictor does.
CLOSEST = 1e-5
# How much of a slope lasts where nothing has been measured yet.
_LASTS = 0.5
# Slopes mostly level off, so that the next one lasts less than the last: on the mixtures of benchmarks/quality.py this
# halves the error on Karras schedules, and costs next to nothing on the others.
_LEVELS_OFF = 0.83
# What is missed varies from step to step, so that more is expected than the last full step has measured.
_CAUTION = 1.5
# A sampler that follows its schedule begins a step at the step's sigma; for flow models some begin just below 1.
_BEGINS_WITHIN = 0.01


class Anchor(NamedTuple):
    """A value [B, ...] at `log_snr`, minus the logarithm of sigma; `lasts` is one number a latent."""

    log_snr: float
    prediction: torch.Tensor
    lasts: torch.Tensor | None


def continued(older: Anchor, newer: Anchor, log_snr: float) -> torch.Tensor:
    """The value at `log_snr` on the damped line through both, in fp32."""
    distance = (log_snr - newer.log_snr) / (newer.log_snr - older.log_snr)
    at = newer.prediction.float()
    lasts = _LASTS if newer.lasts is None else _to_latents(newer.lasts, at)
    return at + lasts * distance * (at - older.prediction.float())


def lasting(older: Anchor, newer: Anchor, found: torch.Tensor, log_snr: float) -> torch.Tensor:
    """How much of the slope from `newer` to `found` will last, for each latent [B]: by what the one before left."""
    at = newer.prediction.float()
    before = (at - older.prediction.float()).flatten(1) / (newer.log_snr - older.log_snr)
    behind = (found - at).flatten(1) / (log_snr - newer.log_snr)
    size = before.square().sum(1)
    share = (before * behind).sum(1) / size
    return _LEVELS_OFF * torch.where(size > 0, share, torch.zeros_like(share)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Backtest:
    """What was missed by standing in for one call in a full step, None where that could not be made whole.

    It was made over the distance `reach` from a value, or from two that lay `base` apart.
    """

    error: torch.Tensor | None
    reach: float
    base: float | None

    def error_at(self, distance: float) -> float:
        """The error to expect over `distance` from here. Waits for the device.

        A copy misses in proportion to the distance, a line through two values in proportion to those from both.
        """
        if self.error is None:
            return math.inf
        growth = distance / self.reach
        if self.base is not None:
            growth *= (distance + self.reach) / (self.reach + self.base)
        return float(self.error) * growth


@dataclass
class Backtests:
    """Those of the evaluations of the full step that was evaluated last, and which one that is."""

    step: int | None = None
    tests: list[Backtest] = field(default_factory=list)

    def begin(self, step: int) -> None:
        """What is added from here on is of `step`."""
        if step != self.step:
            self.tests, self.step = [], step

    def error_at(self, step: int, distance: float) -> float | None:
        """The error to expect over `distance` from the full step `step`; None where that is not known.

        That of the worst evaluation of that step: of a sampler that adds noise, its evaluations differ.
        """
        if self.step != step or not self.tests or any(test.error is None for test in self.tests):
            return None
        errors = [test.error_at(distance) for test in self.tests]
        return math.nan if any(math.isnan(error) for error in errors) else max(errors)


@dataclass
class Budget:
    """What the steps that were not evaluated in full since the last one that was have added to the latent."""

    tolerance: float
    spent: float = 0.0

    def allows(self, error: float, step: int, last: int, sigmas: Sequence[float]) -> bool:
        """Whether `step`, with `error` in the denoised latent, still fits in since the full step `last`.

        An error of the denoised latent enters the latent with 1 - next sigma / sigma.
        """
        spent = self.spent if step - last > 1 else 0.0
        spent += _CAUTION * (1.0 - sigmas[step + 1] / sigmas[step]) * error
        fits = spent <= self.tolerance
        self.spent = spent if fits else 0.0
        return fits

    def refuses(self) -> bool:
        """A step is evaluated in full for another reason: False, and nothing is spent any more."""
        self.spent = 0.0
        return False


def obstacle(finder: StepFinder, position: Position | None, is_new: bool) -> str | None:
    """Why the place of an evaluation in the run is not sound enough to go by from here on; `is_new`: its step is."""
    if position is None:
        return finder.why_not()
    if not finder.falls:
        return "the sigmas of this schedule do not fall from step to step"
    if position.went_back:
        return "this sampler goes back to steps that it had left"
    begins = finder.sigmas[position.step]
    if is_new and abs(position.sigma - begins) > _BEGINS_WITHIN * begins:
        return "this sampler takes steps of its own, not those of its schedule"
    return None


def missed(found: Mapping[int, torch.Tensor], guesses: Mapping[int, torch.Tensor], cfg: float | None) -> torch.Tensor:
    """The largest relative error in the batch: of the guided prediction, or of the worst group without `cfg`."""
    pairs = [(found[group], guesses[group]) for group in found]
    if cfg is not None and set(found) == {0, 1}:
        (cond, cond_guess), (uncond, uncond_guess) = ((found[group], guesses[group]) for group in (0, 1))
        pairs = [(uncond + cfg * (cond - uncond), uncond_guess + cfg * (cond_guess - uncond_guess))]
    return torch.stack([relative_errors(*pair).max() for pair in pairs]).max()


def relative_errors(true: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """The error of each latent [B], relative to its size."""
    size, error = true.flatten(1).norm(dim=1), (true - guess).flatten(1).norm(dim=1)
    return torch.where(error > 0, error / size, error)


def _to_latents(numbers: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return numbers.reshape(-1, *[1] * (latents.ndim - 1))

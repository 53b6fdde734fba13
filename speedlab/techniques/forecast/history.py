"""What one sampling run remembers of its predictions, and a forecast from that.

A prediction is the denoised latent of one group of conds (the positive ones, say) at one call of ComfyUI's
calc_cond_batch. Over the negative logarithm of sigma it is continued as a line through its values at the last two full
steps, whose slope is damped by how much the slope lasted when it was last measured, down to 0, which is a copy. Noise
that a sampler adds leaves slopes without relation to each other: with such samplers forecasts become copies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...patching.cond_identity import active_parts

# Predictions that lie closer together have no slope: a corrector evaluates where the next step's predictor does.
_CLOSEST = 1e-5
# How much of a slope lasts where nothing has been measured yet.
_LASTS = 0.5
# Slopes mostly level off, so that the next one lasts less than the last: on the mixtures of benchmarks/quality.py this
# halves the error on Karras schedules, and costs next to nothing on the others.
_LEVELS_OFF = 0.83


class Anchor(NamedTuple):
    """A prediction [B, ...] in fp32 at `log_snr`, minus the logarithm of sigma; `lasts` is one number a latent."""

    log_snr: float
    prediction: torch.Tensor
    lasts: torch.Tensor | None


@dataclass
class Evaluation:
    """One model evaluation with guidance.

    `cfg` is None where predictions are not combined as ComfyUI's own guider does. `seen` counts how often each group of
    conds was asked for, `calls` how often any was.
    """

    step: int
    sigma: float
    cfg: float | None
    seen: Counter[Hashable] = field(default_factory=Counter)
    calls: int = 0

    @property
    def log_snr(self) -> float:
        """Minus the logarithm of sigma."""
        return -math.log(self.sigma)


@dataclass(frozen=True)
class Backtest:
    """What forecasts of one call in a full step missed, None where not all could be made.

    They were made over the distance `reach`, from two predictions that lay `base` apart.
    """

    error: torch.Tensor | None
    reach: float
    base: float

    def error_at(self, distance: float) -> float:
        """The error to expect of a forecast over `distance` from here. Waits for the device.

        A line through two values misses in proportion to the distances from both.
        """
        growth = distance * (distance + self.reach) / (self.reach * (self.reach + self.base))
        return math.inf if self.error is None else float(self.error) * growth


@dataclass
class Histories:
    """Anchors of the last full steps for each key, and which steps were evaluated in full."""

    full: list[int] = field(default_factory=list)
    # Of the evaluations of the full step that was evaluated last, and which one that is.
    backtests: list[Backtest] = field(default_factory=list)
    tested: int | None = None
    _anchors: dict[Hashable, dict[int, Anchor]] = field(default_factory=dict)
    _finite: list[torch.Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all predictions."""
        self.full.clear()
        self._anchors.clear()
        self._finite.clear()
        self.backtests.clear()

    def forget_before(self, step: int) -> None:
        """Let go of what serves no evaluation at `step` or later: all but the last two full steps before it."""
        before = [full for full in self.full if full < step][:-2]
        for old in before:
            self.full.remove(old)
            for anchors in self._anchors.values():
                anchors.pop(old, None)
        if before:
            self._anchors = {key: anchors for key, anchors in self._anchors.items() if anchors}

    def are_finite(self) -> bool:
        """Whether all predictions since the last question were numbers. Waits for the device."""
        asked, self._finite = self._finite, []
        return not asked or bool(torch.stack(asked).all())

    def newest(self, key: Hashable, step: int, log_snr: float) -> tuple[Anchor, Anchor] | None:
        """The predictions of the last two full steps before `step`, the older first; None if one of them has none.

        None too where they do not lie one behind the other and before `log_snr`.
        """
        before = [full for full in self.full if full < step][-2:]
        anchors = self._anchors.get(key, {})
        if len(before) < 2 or any(full not in anchors for full in before):
            return None
        older, newer = (anchors[full] for full in before)
        in_order = older.log_snr + _CLOSEST < newer.log_snr < log_snr - _CLOSEST
        return (older, newer) if in_order else None

    def is_ready(self, keys: Mapping[int, Hashable], evaluation: Evaluation) -> bool:
        """Whether each of `keys` can be forecast for this evaluation."""
        return all(self.newest(key, evaluation.step, evaluation.log_snr) for key in keys.values())

    def forecast(self, key: Hashable, evaluation: Evaluation) -> torch.Tensor:
        """A new tensor [B, ...] in fp32; `is_ready` has to be true."""
        pair = self.newest(key, evaluation.step, evaluation.log_snr)
        assert pair is not None
        return continued(*pair, evaluation.log_snr)

    def observe(self, keys: Mapping[int, Hashable], evaluation: Evaluation, out: Sequence[torch.Tensor]) -> None:
        """Keep what a full evaluation predicted for each group, and measure what a forecast would have missed."""
        step, log_snr = evaluation.step, evaluation.log_snr
        if step not in self.full:
            self.full = sorted((*self.full, step))
        guesses, found = {}, {group: out[group].to(torch.float32, copy=True) for group in keys}
        reach = base = 0.0
        for group, key in keys.items():
            pair, lasts = self.newest(key, step, log_snr), None
            if pair is not None:
                guesses[group] = continued(*pair, log_snr)
                lasts = _lasting(*pair, found[group], log_snr)
                reach, base = log_snr - pair[1].log_snr, pair[1].log_snr - pair[0].log_snr
            self._anchors.setdefault(key, {})[step] = Anchor(log_snr, found[group], lasts)
            self._finite.append(torch.isfinite(found[group]).all())
        first, is_whole = evaluation.calls == 0, len(guesses) == len(keys)
        if step != self.tested:
            self.backtests, self.tested = [], step
        if keys:
            error = _missed(found, guesses, evaluation.cfg if first else None) if is_whole else None
            self.backtests.append(Backtest(error, reach, base))

    def error_at(self, step: int, distance: float) -> float | None:
        """The error to expect of forecasts over `distance` from the full step `step`; None where that is not known.

        That of the worst evaluation of that step: of a sampler that adds noise, its evaluations differ.
        """
        if self.tested != step or not self.backtests or any(test.error is None for test in self.backtests):
            return None
        return max(test.error_at(distance) for test in self.backtests)


def keys_of(
    conds: Sequence[Any], x: torch.Tensor, options: Mapping[str, Any], evaluation: Evaluation
) -> dict[int, Hashable]:
    """For each group of conds that is there, under what its prediction is kept.

    A key holds all that makes the same group another one: the conds that are active at this sigma and their
    ControlNets, the latents' shape, type and place, the context window, the attention layers that are replaced, and how
    often this evaluation asked for the same before (perturbed attention evaluates the prompt a second time).
    """
    window = tuple(getattr(options.get("context_window"), "index_list", ()))
    replaced = frozenset(
        (kind, place) for kind, places in options.get("patches_replace", {}).items() for place in places
    )
    sigma = evaluation.sigma
    keys: dict[int, Hashable] = {}
    for group, members in enumerate(conds):
        if members is None:
            continue
        identity = (group, active_parts(members, sigma), tuple(x.shape), x.dtype, x.device, window, replaced)
        keys[group] = (*identity, evaluation.seen[identity])
        evaluation.seen[identity] += 1
    return keys


def continued(older: Anchor, newer: Anchor, log_snr: float) -> torch.Tensor:
    """The prediction at `log_snr` on the damped line through both."""
    distance = (log_snr - newer.log_snr) / (newer.log_snr - older.log_snr)
    lasts = _LASTS if newer.lasts is None else _to_latents(newer.lasts, newer.prediction)
    return newer.prediction + lasts * distance * (newer.prediction - older.prediction)


def _lasting(older: Anchor, newer: Anchor, found: torch.Tensor, log_snr: float) -> torch.Tensor:
    """How much of the slope from `newer` to `found` will last, for each latent [B]: by what the one before left."""
    before = (newer.prediction - older.prediction).flatten(1) / (newer.log_snr - older.log_snr)
    behind = (found - newer.prediction).flatten(1) / (log_snr - newer.log_snr)
    size = before.square().sum(1)
    share = (before * behind).sum(1) / size
    return _LEVELS_OFF * torch.where(size > 0, share, torch.zeros_like(share)).clamp(0.0, 1.0)


def _missed(found: Mapping[int, torch.Tensor], guesses: Mapping[int, torch.Tensor], cfg: float | None) -> torch.Tensor:
    """The largest relative error in the batch: of the guided prediction, or of the worst group without `cfg`."""
    pairs = [(found[group], guesses[group]) for group in found]
    if cfg is not None and set(found) == {0, 1}:
        (cond, cond_guess), (uncond, uncond_guess) = pairs
        pairs = [(uncond + cfg * (cond - uncond), uncond_guess + cfg * (cond_guess - uncond_guess))]
    errors = []
    for true, guess in pairs:
        size, error = true.flatten(1).norm(dim=1), (true - guess).flatten(1).norm(dim=1)
        errors.append(torch.where(error > 0, error / size, error).max())
    return torch.stack(errors).max()


def _to_latents(numbers: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return numbers.reshape(-1, *[1] * (latents.ndim - 1))

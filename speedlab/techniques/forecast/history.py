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
from typing import Any

import torch

from ...patching.cond_identity import active_parts
from ..error_control import CLOSEST, Anchor, Backtest, Backtests, continued, lasting, missed


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


@dataclass
class Histories:
    """Anchors of the last full steps for each key, and which steps were evaluated in full."""

    full: list[int] = field(default_factory=list)
    backtests: Backtests = field(default_factory=Backtests)
    _anchors: dict[Hashable, dict[int, Anchor]] = field(default_factory=dict)
    _finite: list[torch.Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all predictions."""
        self.full.clear()
        self._anchors.clear()
        self._finite.clear()
        self.backtests = Backtests()

    def forget_before(self, step: int) -> None:
        """Release what no evaluation needs at `step` or later: all but the last two full steps before it."""
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
        in_order = older.log_snr + CLOSEST < newer.log_snr < log_snr - CLOSEST
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
                lasts = lasting(*pair, found[group], log_snr)
                reach, base = log_snr - pair[1].log_snr, pair[1].log_snr - pair[0].log_snr
            self._anchors.setdefault(key, {})[step] = Anchor(log_snr, found[group], lasts)
            self._finite.append(torch.isfinite(found[group]).all())
        first, is_whole = evaluation.calls == 0, len(guesses) == len(keys)
        self.backtests.begin(step)
        if keys:
            error = missed(found, guesses, evaluation.cfg if first else None) if is_whole else None
            self.backtests.tests.append(Backtest(error, reach, base))


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

"""DeepCache's adaptive schedule: which steps are cached, by what the full ones show that caching would have missed.

At a full step the outer blocks run a second time, on the features that a cached step there would have had. How far the
denoised latent is then off is the very error that caching makes. The features' own distance does not tell it: of UNets
with random weights the ratio of both spans 500-fold in one run of 20 steps, for it falls with sigma.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...patching.cond_identity import active_parts
from ...patching.notes import report_note, warn
from ..error_control import Backtest, Backtests, Budget, missed, relative_errors
from .schedule import DeepCacheConfig

_COND, _UNCOND = 0, 1


@dataclass
class Missed:
    """What caching would have missed in the calls of one evaluation.

    `cfg` is None where predictions are not combined as ComfyUI's own guider does.
    """

    cfg: float | None = None
    is_whole: bool = True
    reach: float = math.inf
    base: float | None = math.inf
    # By whether they are of cond or uncond: full and cached predictions, one chunk each.
    _pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def compare(
        self, full: torch.Tensor, cached: torch.Tensor, kinds: Sequence[int], reach: float, base: float | None
    ) -> None:
        """`full` and `cached` [chunks * B, ...] are the model's answers; `kinds` names the chunks."""
        self.reach = min(self.reach, reach)
        self.base = None if base is None or self.base is None else min(self.base, base)
        chunks = (one.to(torch.float32, copy=True).chunk(len(kinds)) for one in (full, cached))
        for kind, *pair in zip(kinds, *chunks, strict=True):
            self._pairs.setdefault(kind, []).append((pair[0], pair[1]))

    def end_call(self) -> list[Backtest]:
        """Of one call of calc_cond_batch, after which the next one's begins; the first is the one that is guided."""
        pairs, is_whole, cfg = self._pairs, self.is_whole, self.cfg
        self._pairs, self.is_whole, self.cfg = {}, True, None
        if not is_whole:
            return [Backtest(None, self.reach, self.base)]
        if not pairs:
            return []
        error = _error(pairs, cfg)
        tests = [Backtest(error, self.reach, None)]
        # Of a line, which may have been given up for a copy, the one that grows faster counts.
        return [*tests, Backtest(error, self.reach, self.base)] if self.base is not None else tests


def _error(pairs: Mapping[int, list[tuple[torch.Tensor, torch.Tensor]]], cfg: float | None) -> torch.Tensor:
    if all(len(chunks) == 1 for chunks in pairs.values()):
        found = {kind: chunks[0][0] for kind, chunks in pairs.items()}
        return missed(found, {kind: chunks[0][1] for kind, chunks in pairs.items()}, cfg)
    # Areas and several prompts: how ComfyUI puts them together is not seen here, so the worst of each counts.
    worst = {
        kind: torch.stack([relative_errors(*pair).max() for pair in chunks]).max() for kind, chunks in pairs.items()
    }
    if cfg is None or set(worst) != {_COND, _UNCOND}:
        return torch.stack(list(worst.values())).max()
    return abs(cfg) * worst[_COND] + abs(1.0 - cfg) * worst[_UNCOND]


@dataclass
class ErrorControl:
    """What one run knows of its errors. A plan holds for each step its source, as `schedule.sources` makes it."""

    config: DeepCacheConfig
    decided: set[int] = field(default_factory=set)
    # How many rows of the outer blocks ran to measure.
    rows: int = 0
    _tests: Backtests = field(default_factory=Backtests)
    _budget: Budget = field(init=False)
    # What was evaluated in the last full step.
    _known: set[Hashable] = field(default_factory=set)
    _known_at: int | None = None
    _reported_numbers: bool = False
    _reported_changes: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.config.tolerance)

    def decide(self, step: int, plan: list[int | None], sigmas: Sequence[float], options: Mapping[str, Any]) -> None:
        """At the first evaluation of `step`: make it a cached one in `plan`, if its error fits in."""
        if step in self.decided:
            return
        last = max((full for full in self.decided if full < step and plan[full] == full), default=None)
        self.decided.add(step)
        error = None
        if last is not None and plan[step] is not None and step - last < self.config.interval:
            error = self._tests.error_at(last, math.log(sigmas[last] / sigmas[step]))
        if last is None or error is None:
            self._budget.refuses()
            return
        if math.isnan(error) and not self._reported_numbers:
            self._reported_numbers = True
            warn(options, "DeepCache: a prediction of the model held NaN or infinity; nothing is cached behind it.")
        if self._budget.allows(error, step, last, sigmas):
            plan[step] = last

    def may_cache_behind(self, step: int, plan: Sequence[int | None]) -> bool:
        """Whether it pays to measure at `step`: a full one that another step of the window follows."""
        return plan[step] == step and step + 1 < len(plan) and plan[step + 1] is not None

    def is_known(self, step: int, is_full: bool, sigma: float, conds: Sequence[Any], x: Any, options: Any) -> bool:
        """Whether all that is asked for was evaluated in the last full step, too; in a full one it is noted."""
        asked = {
            (group, active_parts(members, sigma), tuple(x.shape))
            for group, members in enumerate(conds)
            if members is not None
        }
        known = not self._known or asked <= self._known
        if not known and self._known_at != step and not self._reported_changes:
            self._reported_changes = True
            report_note(
                options,
                "DeepCache: the prompts or ControlNets that act change during this run; steps where another one "
                "begins or ends are evaluated in full.",
            )
        if is_full or not known:
            self._known = asked | (self._known if self._known_at == step else set())
            self._known_at = step
        return known

    def observe(self, step: int, tests: Sequence[Backtest]) -> None:
        """What was measured in a call of the full step `step`."""
        self._tests.begin(step)
        self._tests.tests.extend(tests)

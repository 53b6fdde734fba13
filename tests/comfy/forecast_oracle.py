"""Forecast in its plainest form: every evaluation is made, and what a forecast step predicted is then replaced.

Loops over latents and lists, in fp64, from the formulas of the method; nothing here comes from the pack.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch


def published_plan(steps: int) -> set[int]:
    """The forecast steps of the fixed plan as its text states it."""
    forecast: set[int] = set()
    if steps < 10:
        return forecast
    gap, missed = 2.0, 0
    for i in range(steps):
        if i < 4 or i >= steps - 2 or (missed + 1) % min(3, math.floor(gap)) == 0:
            missed = 0
            gap += 0.5 if i >= 4 else 0.0
        else:
            forecast.add(i)
            missed += 1
    return forecast


@dataclass
class Plain:
    """One run. `forecast` are the steps to replace; None: by error control at `tolerance` with guidance `cfg`."""

    forecast: Collection[int] | None = None
    tolerance: float = 0.02
    cfg: float = 1.0
    full: list[int] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    kept: dict[Any, dict[int, tuple[float, torch.Tensor, list[float]]]] = field(default_factory=dict)
    error: dict[int, list[tuple[float, float, float]]] = field(default_factory=dict)
    spent: float = 0.0
    seen: set[int] = field(default_factory=set)
    # Whether what replaces attention does not see evaluations that are forecast.
    unseen: bool = False

    def calc_cond_batch(self, executor: Any, model: Any, conds: list, x: Any, t: Any, options: dict) -> list:
        sigmas = [float(s) for s in options["transformer_options"]["sample_sigmas"]]
        sigma = float(t[0])
        step = max(i for i, s in enumerate(sigmas[:-1]) if s >= sigma * (1 - 1e-5) or i == 0)
        place = -math.log(sigma)
        if step not in self.seen:
            self.seen.add(step)
            if self.decides(step, sigmas):
                self.left_out.add(step)
        if self.unseen and step in self.left_out:
            options = {**options, "transformer_options": {**options["transformer_options"], "patches_replace": {}}}
        out = executor(model, conds, x, t, options)
        groups = [group for group, members in enumerate(conds) if members is not None]
        keys = {group: (len(conds), group) for group in groups}
        before = [known for known in self.full if known < step][-2:]
        if step in self.left_out:
            result = list(out)
            for group, key in keys.items():
                result[group] = self.line(key, before, place).to(x.dtype)
            return result
        if step not in self.full:
            self.full.append(step)
            self.full.sort()
        guesses = {}
        for group, key in keys.items():
            true, lasts = out[group].double(), [0.5] * len(x)
            if len(before) == 2 and all(known in self.kept.get(key, {}) for known in before):
                guesses[group] = self.line(key, before, place)
                lasts = self.lasting(key, before, place, true)
            self.kept.setdefault(key, {})[step] = (place, true, lasts)
        if len(conds) == 2 and len(guesses) == len(groups):
            old, new = (self.kept[keys[0]][known][0] for known in before)
            self.measure(step, place - new, new - old, out, guesses)
        return out

    def decides(self, step: int, sigmas: list[float]) -> bool:
        if self.forecast is not None:
            return step in self.forecast
        steps, last = len(sigmas) - 1, max((known for known in self.full if known < step), default=-1)
        if steps < 10 or step < 4 or step >= steps - 2 or step - last > 3 or last not in self.error:
            self.spent = 0.0
            return False
        if step - last == 1:
            self.spent = 0.0
        distance = math.log(sigmas[last]) - math.log(sigmas[step])
        expected = [
            error * distance * (distance + reach) / (reach * (reach + base)) for error, reach, base in self.error[last]
        ]
        self.spent += 1.5 * (1 - sigmas[step + 1] / sigmas[step]) * max(expected)
        if self.spent <= self.tolerance:
            return True
        self.spent = 0.0
        return False

    def line(self, key: Any, before: list[int], place: float) -> torch.Tensor:
        (old_place, old, _), (new_place, new, lasts) = (self.kept[key][known] for known in before)
        rows = []
        for row in range(len(new)):
            slope = (new[row] - old[row]) / (new_place - old_place)
            rows.append(new[row] + lasts[row] * (place - new_place) * slope)
        return torch.stack(rows)

    def lasting(self, key: Any, before: list[int], place: float, true: torch.Tensor) -> list[float]:
        (old_place, old, _), (new_place, new, _) = (self.kept[key][known] for known in before)
        found = []
        for row in range(len(new)):
            old_slope = ((new[row] - old[row]) / (new_place - old_place)).flatten()
            new_slope = ((true[row] - new[row]) / (place - new_place)).flatten()
            size = float(old_slope @ old_slope)
            found.append(0.83 * min(max(float(new_slope @ old_slope) / size, 0.0), 1.0) if size else 0.0)
        return found

    def measure(self, step: int, reach: float, base: float, out: list, guesses: dict[int, torch.Tensor]) -> None:
        def guided(groups: Any) -> torch.Tensor:
            cond = groups[0].double()
            return groups[1].double() + self.cfg * (cond - groups[1].double()) if 1 in guesses else cond

        true, guess = guided(out), guided(guesses)
        rows = [float((a - b).norm() / a.norm()) for a, b in zip(true, guess, strict=True)]
        self.error.setdefault(step, []).append((max(rows), reach, base))


def with_forecasts(model: Any, plain: Plain) -> Any:
    """A clone of `model` for one single run."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.add_wrapper_with_key(
        WrappersMP.CALC_COND_BATCH, "plain forecast", lambda executor, *args: plain.calc_cond_batch(executor, *args)
    )
    return clone

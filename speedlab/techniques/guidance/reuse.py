"""Uncond from the difference to cond that an earlier step found, in place of evaluating it.

Of the noise predictions the difference changes slowly. In denoised latents, which ComfyUI's predictions are, it is
sigma times as large: uncond = cond - difference * sigma / sigma then.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...patching.cond_identity import active_parts, with_unique_uuids
from ...patching.notes import is_forecast, report_note, warn
from ...patching.position import Position


class Difference:
    """Cond minus uncond as the model gave them last, of one run: fp32 [B, ...] a kind of evaluation."""

    def __init__(self) -> None:
        # By what the conds and the latents are: the sigma, the difference there, and whether all of it are numbers.
        self._kept: dict[Hashable, tuple[float, torch.Tensor, torch.Tensor]] = {}
        self._kept_at: int | None = None
        self._position: Position | None = None
        self._may_stand = False
        # A node may evaluate a changed model on the same pair, after the evaluation itself.
        self._seen: set[Hashable] = set()
        self._told_of_numbers = False

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    @contextmanager
    def evaluating(self, position: Position, may_stand: bool) -> Iterator[None]:
        """The evaluation inside stands at `position`; `may_stand`: its uncond need not come from the model."""
        self._position, self._may_stand = position, may_stand
        self._seen.clear()
        try:
            yield
        finally:
            self._position = None

    def key_of(self, conds: list, x: torch.Tensor, options: Mapping[str, Any]) -> Hashable | None:
        """What the difference between both of `conds` is kept under; None where they are not what guidance asks for."""
        if self._position is None or len(conds) != 2 or None in conds:
            return None
        parts = tuple(active_parts(group, self._position.sigma) for group in conds)
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        key = (parts, tuple(x.shape), x.dtype, x.device, window)
        if key in self._seen:
            return None
        self._seen.add(key)
        return key

    def stands(self, key: Hashable, options: Mapping[str, Any]) -> bool:
        """Whether the evaluation may do without the model's uncond; the record gets why not. Waits for the device."""
        assert self._position is not None
        if key not in self._kept:
            if self._kept and self._kept_at != self._position.step:
                report_note(
                    options,
                    "Dynamic CFG: the prompts, ControlNets or sizes that act change during this run; uncond is "
                    "evaluated where they do.",
                )
            return False
        if self._may_stand and not self._kept[key][2]:
            if self._kept_at != self._position.step:  # at the same step it is repeated
                self.tell_of_numbers(options)
            return False
        return self._may_stand

    def tell_of_numbers(self, options: Mapping[str, Any]) -> None:
        """Say once that predictions said nothing about the steps to come."""
        if not self._told_of_numbers:
            self._told_of_numbers = True
            warn(
                options,
                "Dynamic CFG: a prediction of the model held NaN or infinity; the step after it evaluates uncond.",
            )

    def uncond(self, key: Hashable, cond: torch.Tensor) -> torch.Tensor:
        """What stands for uncond beside `cond`, where `stands` is true."""
        assert self._position is not None
        sigma, difference, _ = self._kept[key]
        return (cond.float() - difference * (self._position.sigma / sigma)).to(cond.dtype)

    def keep(self, key: Hashable, cond: torch.Tensor, uncond: torch.Tensor) -> None:
        """Remember what the model gave, and of no step before."""
        assert self._position is not None
        if self._kept_at != self._position.step:
            self._kept.clear()
            self._kept_at = self._position.step
        if self._position.sigma > 0.0:
            found = cond.float() - uncond.float()
            self._kept[key] = (self._position.sigma, found, torch.isfinite(found).all())


def evaluate_with_difference(
    difference: Difference,
    executor: Any,
    model: Any,
    conds: list,
    x: torch.Tensor,
    timestep: Any,
    model_options: dict,
    *args: Any,
) -> tuple[list[torch.Tensor], bool]:
    """A CALC_COND_BATCH, and whether it made uncond from cond."""
    options = model_options.get("transformer_options", {})
    named = with_unique_uuids(conds)
    key = difference.key_of(named, x, options)
    if key is None:
        return executor(model, conds, x, timestep, model_options, *args), False
    if difference.stands(key, options):
        out = list(executor(model, [named[0], None], x, timestep, model_options, *args))
        out[1] = difference.uncond(key, out[0])
        return out, True
    out = executor(model, conds, x, timestep, model_options, *args)
    if not is_forecast(options):
        difference.keep(key, out[0], out[1])
    return out, False

"""Leaving out uncond for one model evaluation, and finding out whether anything in the way of guidance needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.samplers import CFGGuider

POST_CFG = "sampler_post_cfg_function"
# What core hands to post-CFG functions that has no true value without uncond.
_UNCOND_KEYS = frozenset({"uncond", "uncond_denoised"})
_CUSTOM_GUIDANCE = {
    "sampler_cfg_function": "a custom CFG function (such as RescaleCFG or Perp-Neg)",
    "sampler_pre_cfg_function": "a pre-CFG function (such as TCFG, APG or FreSca)",
    "sampler_calc_cond_batch_function": "a custom evaluation of the conditions (such as Skip Layer Guidance)",
}


class UncondReadError(Exception):
    """A post-CFG function asked for the prediction that was left out."""


def is_guided(guider: Any) -> bool:
    """Whether this guider may evaluate uncond: at CFG 1 ComfyUI's own leaves it out by itself."""
    return _is_custom(guider) or not math.isclose(guider.cfg, 1.0)


def obstacle(guider: Any, model_options: Mapping[str, Any]) -> str | None:
    """Why uncond must stay, in words for the user; None where it may go."""
    if _is_custom(guider):
        return f"the guider {type(guider).__name__} combines predictions in a way of its own"
    if model_options.get("disable_cfg1_optimization", False):
        return "the sampler (a cfg_pp one) or a node (such as Self-Attention Guidance) needs uncond at every step"
    for option, words in _CUSTOM_GUIDANCE.items():
        if model_options.get(option):
            return f"the model carries {words}, which needs uncond"
    return None


def _is_custom(guider: Any) -> bool:
    return type(guider).predict_noise is not CFGGuider.predict_noise


def evaluate_without_uncond(
    executor: Any, x: Any, timestep: Any, model_options: dict, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, bool]:
    """One evaluation of a PREDICT_NOISE `executor` at CFG 1, for which ComfyUI itself skips uncond, and whether it did.

    A node further in may set another CFG, as CFGOverride does; uncond is then evaluated as that node wants it. Raises
    UncondReadError if a post-CFG function reads the uncond prediction; nothing of the result is then used.
    """
    watch = _Watch()
    guider = executor.class_obj
    cfg, guider.cfg = guider.cfg, 1.0
    try:
        result = executor(x, timestep, watch.over(model_options), *args, **kwargs)
    finally:
        guider.cfg = cfg
    if watch.reader is not None:  # it asked, and swallowed the refusal
        raise UncondReadError(watch.reader)
    return result, not watch.overridden


def with_observer(model_options: dict, observe: Callable[[Mapping[str, Any]], None]) -> dict:
    """A copy of `model_options` in which `observe` sees cond and uncond predictions before any post-CFG function."""

    def look(args: Mapping[str, Any]) -> torch.Tensor:
        observe(args)
        return args["denoised"]

    return {**model_options, POST_CFG: [look, *model_options.get(POST_CFG, ())]}


class _Watch:
    """Hands post-CFG functions their arguments and notes if one reads what does not exist in this evaluation."""

    def __init__(self) -> None:
        self.reader: str | None = None
        self.overridden = False

    def over(self, model_options: dict) -> dict:
        functions = [self._watched(function) for function in model_options.get(POST_CFG, ())]
        return {**model_options, POST_CFG: [self._look, *functions]}

    def _look(self, args: Mapping[str, Any]) -> torch.Tensor:
        self.overridden = not math.isclose(args["cond_scale"], 1.0)
        return args["denoised"]

    def _watched(self, function: Callable[[dict], Any]) -> Callable[[dict], Any]:
        name = getattr(function, "__qualname__", type(function).__name__)

        def watched(args: dict) -> Any:
            return function(_Arguments(args, self, name))

        return watched


class _Arguments(dict):
    """A post-CFG function's arguments without uncond: to read it is an error, by whatever way of reading a dict."""

    def __init__(self, values: Mapping[str, Any], watch: _Watch, reader: str) -> None:
        super().__init__({**values, **dict.fromkeys(_UNCOND_KEYS)})
        self._watch, self._reader = watch, reader

    def _check(self, key: object) -> None:
        if key in _UNCOND_KEYS:
            self._watch.reader = self._reader
            raise UncondReadError(self._reader)

    def __getitem__(self, key: Any) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._check(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._check(key)
        return super().pop(key, *default)

    def copy(self) -> _Arguments:
        return _Arguments({key: dict.__getitem__(self, key) for key in dict.keys(self)}, self._watch, self._reader)

    # An own __iter__ makes dict(args) and f(**args) read each value through __getitem__.
    def __iter__(self) -> Any:
        return super().__iter__()

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

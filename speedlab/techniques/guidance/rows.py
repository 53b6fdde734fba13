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
# What combines the two predictions, and so has nothing to do where there is one.
_COMBINING = {
    "sampler_cfg_function": "the custom CFG function (such as RescaleCFG or Perp-Neg)",
    "sampler_pre_cfg_function": "the pre-CFG function (such as TCFG, APG or FreSca)",
}


class _UncondReadError(Exception):
    """A post-CFG function asked for the prediction that was left out."""


def is_guided(guider: Any) -> bool:
    """Whether this guider may evaluate uncond: at CFG 1 ComfyUI's own leaves it out by itself."""
    return _is_custom(guider) or not math.isclose(guider.cfg, 1.0)


def obstacle(guider: Any, model_options: Mapping[str, Any]) -> str | None:
    """Why neither uncond nor its evaluation may go, in words for the user; None where they may."""
    if _is_custom(guider):
        return f"the guider {type(guider).__name__} combines predictions in a way of its own"
    if model_options.get("sampler_calc_cond_batch_function"):
        return (
            "the model carries a custom evaluation of the conditions (such as Skip Layer Guidance), which needs uncond"
        )
    return None


def needs_a_value(model_options: Mapping[str, Any]) -> str | None:
    """Why uncond may not be left out, though another value than the model's own may stand for it; None where it may."""
    if model_options.get("disable_cfg1_optimization", False):
        return "the sampler (a cfg_pp one) or a node (such as Self-Attention Guidance) needs uncond at every step"
    return None


def looks_at_uncond(guider: Any, model_options: Mapping[str, Any]) -> bool:
    """Whether a node asks for uncond at every step and changes attention: Self-Attention Guidance sees that of uncond,
    Normalized Attention Guidance mixes both."""
    options = model_options.get("transformer_options", {})
    kinds = {*options.get("patches", {}), *options.get("patches_replace", {})}
    return bool(needs_a_value(guider.model_options)) and any(kind.startswith("attn") for kind in kinds)


def _is_custom(guider: Any) -> bool:
    return type(guider).predict_noise is not CFGGuider.predict_noise


def evaluate_without_uncond(
    executor: Any, x: Any, timestep: Any, model_options: dict, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, list[str] | None]:
    """One evaluation of a PREDICT_NOISE `executor` at CFG 1, for which ComfyUI itself skips uncond.

    What combines both predictions is left out with uncond: custom CFG functions, pre-CFG functions, and post-CFG
    functions that read uncond. Their names are the second result. None in its place: a node further in sets another
    CFG, as CFGOverride does, and uncond was evaluated as that node wants it.
    """
    idle = [words for option, words in _COMBINING.items() if model_options.get(option)]
    scales: list[float] = []
    functions = [_unless_it_reads_uncond(function, idle) for function in model_options.get(POST_CFG, ())]
    options = with_observer(
        {**{key: value for key, value in model_options.items() if key not in _COMBINING}, POST_CFG: functions},
        lambda predictions: scales.append(float(predictions["cond_scale"])),
    )
    guider = executor.class_obj
    cfg, guider.cfg = guider.cfg, 1.0
    try:
        result = executor(x, timestep, options, *args, **kwargs)
        if all(math.isclose(scale, 1.0) for scale in scales):
            return result, idle
        # With both predictions there, nothing that combines them may be missing.
        return (executor(x, timestep, model_options, *args, **kwargs) if idle else result), None
    finally:
        guider.cfg = cfg


def with_observer(model_options: dict, observe: Callable[[Mapping[str, Any]], None]) -> dict:
    """A copy of `model_options` in which `observe` sees cond and uncond predictions before any post-CFG function."""

    def look(args: Mapping[str, Any]) -> torch.Tensor:
        observe(args)
        return args["denoised"]

    return {**model_options, POST_CFG: [look, *model_options.get(POST_CFG, ())]}


def _unless_it_reads_uncond(function: Callable[[dict], Any], idle: list[str]) -> Callable[[dict], Any]:
    """A post-CFG function that changes nothing where it asks for uncond; its name is then added to `idle`."""
    name = getattr(function, "__qualname__", type(function).__name__)

    def watched(args: dict) -> Any:
        arguments = _Arguments(args)
        try:
            result = function(arguments)
        except _UncondReadError:
            result = None
        if not arguments.was_read:  # a function may also catch the refusal
            return result
        idle.append(f"the post-CFG function {name}")
        return args["denoised"]

    return watched


class _Arguments(dict):
    """A post-CFG function's arguments without uncond: to read it is an error, by whatever way of reading a dict."""

    def __init__(self, values: Mapping[str, Any], origin: _Arguments | None = None) -> None:
        super().__init__({**values, **dict.fromkeys(_UNCOND_KEYS)})
        self.was_read, self._origin = False, origin or self

    def _check(self, key: object) -> None:
        if key in _UNCOND_KEYS:
            self._origin.was_read = True
            raise _UncondReadError

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
        return _Arguments({key: dict.__getitem__(self, key) for key in dict.keys(self)}, self._origin)

    # An own __iter__ makes dict(args) and f(**args) read each value through __getitem__.
    def __iter__(self) -> Any:
        return super().__iter__()

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

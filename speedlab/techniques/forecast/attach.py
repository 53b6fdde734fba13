"""Forecast: the denoised latent of some steps is continued from the steps before, and the model is not evaluated.

A step is full or forecast with all its evaluations. The forecast stands in for ComfyUI's calc_cond_batch, for each
group of conds by itself: ControlNets are not evaluated either, and guidance and the sampler go on as they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.samplers import CFGGuider

from ...common.errors import UnavailableError
from ...patching.cond_identity import scheduled_hooks, with_unique_uuids
from ...patching.notes import FORECAST, report_cached, report_ran, warn
from ...patching.position import StepFinder
from ...patching.wrappers import Accelerator, Site, Wrapper, attach, declare, run_state, state_of
from ..deepcache.attach import KEY as DEEPCACHE
from .history import keys_of
from .plan import ForecastConfig
from .run import Run

__all__ = ["KEY", "ForecastConfig", "attach_forecast"]

KEY = FORECAST
# What leaves out evaluations too, by the site and key of its wrapper.
_RIVALS = (
    ("DeepCache", Site.APPLY_MODEL, DEEPCACHE),
    ("EasyCache", Site.DIFFUSION_MODEL, "easycache"),
    ("LazyCache", Site.PREDICT_NOISE, "lazycache"),
)


def attach_forecast(model: Any, config: ForecastConfig) -> Any:
    """A clone of MODEL `model`, of any kind, that forecasts as `config` says; `model` itself where `config` is off."""
    if config.is_off:
        return model
    clone = attach(model, KEY, _wrappers(config))
    options: dict[str, Any] = {"mode": config.mode}
    if config.mode == "adaptive":
        options["tolerance"] = config.tolerance
    options |= {"max_skip": config.max_skip, "start_percent": config.start, "end_percent": config.end}
    declare(clone, Accelerator("forecast", options))
    return clone


def _wrappers(config: ForecastConfig) -> Mapping[Site, Wrapper]:
    """The closure holds the frozen `config` alone: clones of a model share it, so state lives in the run."""

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_rivals(executor.class_obj.model_options)
        run = Run(config, StepFinder.of_run(executor.class_obj, *args, **kwargs))
        try:
            with run_state(executor.class_obj, KEY, run):
                return executor(*args, **kwargs)
        finally:
            run.histories.clear()

    return {
        Site.OUTER_SAMPLE: outer_sample,
        Site.SAMPLER_SAMPLE: _sampler_sample,
        Site.PREDICT_NOISE: _predict_noise,
        Site.CALC_COND_BATCH: _calc_cond_batch,
    }


def _refuse_rivals(model_options: Mapping[str, Any]) -> None:
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    for name, site, key in _RIVALS:
        if wrappers.get(site.value, {}).get(key):
            raise UnavailableError(
                f"Forecast and {name} cannot work on one model: both leave out evaluations, and Forecast would "
                f"continue and enlarge the errors of {name}. Take one of the two nodes out of the graph."
            )


def _sampler_sample(
    executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, callback: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around the sampler: its callback counts steps; at its end a warning is recorded if nothing was forecast."""
    options = extra_args.get("model_options", {}).get("transformer_options", {})
    run: Run | None = state_of(options, KEY)
    heard = callback if run is None else run.finder.listening(callback)
    result = executor(model_wrap, sigmas, extra_args, heard, *args, **kwargs)
    if run is not None and not run.end(options):
        report_ran(options, "forecast", None)
    return result


def _predict_noise(
    executor: Any, x: Any, timestep: Any, model_options: dict | None = None, *args: Any, **kwargs: Any
) -> Any:
    model_options = {} if model_options is None else model_options
    options = model_options.get("transformer_options", {})
    run: Run | None = state_of(options, KEY)
    if run is None or run.stepped_aside:
        return executor(x, timestep, model_options, *args, **kwargs)
    position = run.finder.locate(model_options, timestep)
    reason = run.obstacle(position) or scheduled_hooks(executor.class_obj)
    if reason is not None:
        run.step_aside(reason, options)
    if position is None or position.sigma <= 0.0 or run.stepped_aside:
        return executor(x, timestep, model_options, *args, **kwargs)
    if run.is_new and run.finder.is_lost and (run.config.start > 0.0 or run.config.end < 1.0):
        warn(options, run.finder.lost_text("Forecast", "its window"))
    guider = executor.class_obj
    combines_as_core = type(guider).predict_noise is CFGGuider.predict_noise
    cfg = float(guider.cfg) if combines_as_core else None
    with run.evaluating(position, cfg, options):
        return executor(x, timestep, model_options, *args, **kwargs)


def _calc_cond_batch(
    executor: Any, model: Any, conds: list, x: torch.Tensor, timestep: Any, model_options: dict, *args: Any
) -> Any:
    options = model_options.get("transformer_options", {})
    run: Run | None = state_of(options, KEY)
    if run is None:
        return executor(model, conds, x, timestep, model_options, *args)
    run.calls += 1
    evaluation = run.current
    if evaluation is None:
        return executor(model, conds, x, timestep, model_options, *args)
    conds = with_unique_uuids(conds)
    keys = keys_of(conds, x, options, evaluation)
    run.tell_of_changes(keys.values(), options)
    is_forecast = run.is_forecast and run.histories.is_ready(keys, evaluation)
    if is_forecast:
        run.answered = True
        run.forecasts += 1
        report_cached(options)
        out = [torch.zeros_like(x) for _ in conds]
        for group, key in keys.items():
            out[group] = run.histories.forecast(key, evaluation).to(x.dtype)
    else:
        out = executor(model, conds, x, timestep, model_options, *args)
        run.histories.observe(keys, evaluation, out)
    run.has_forecast = is_forecast
    evaluation.calls += 1
    return out

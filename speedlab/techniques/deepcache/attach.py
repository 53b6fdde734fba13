"""DeepCache (Ma et al., CVPR 2024): re-use deep UNet features from one step for the next ones.

On full steps ComfyUI's own forward runs, and what reaches one of the outer output blocks from below is kept. On cached
steps only the outer blocks run. A step is full or cached with all its evaluations: samplers such as Heun and DPM++ SDE
evaluate twice a step, and an evaluation belongs to the last step whose sigma is at or above its own (at or below, where
sigmas rise). The adaptive schedule decides step by step (`adaptive`); the others know their full steps before the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from comfy.samplers import CFGGuider

from ...common.errors import UnavailableError
from ...models.unet import require_unet
from ...patching.cond_identity import scheduled_hooks, with_unique_uuids
from ...patching.notes import MOST_FEW_STEPS, report_cached, report_note, report_ran, report_saved, warn
from ...patching.position import Position, StepFinder, counting_steps
from ...patching.wrappers import (
    Accelerator,
    Site,
    Wrapper,
    accelerators,
    attach,
    declare,
    refuse_work_units,
    run_state,
    state_of,
)
from ..error_control import obstacle
from .features import Expected, Run, chunk_keys
from .forward import keeping, largest_branch, partial_forward, reusing
from .schedule import DeepCacheConfig, fallback, sources

__all__ = ["KEY", "DeepCacheConfig", "attach_deepcache"]

KEY = "speedlab.deepcache"


def attach_deepcache(model: Any, config: DeepCacheConfig) -> Any:
    """A clone of MODEL `model` that caches as `config` says; `model` itself where `config` is off.

    A branch that is too deep for the model is replaced by the largest, with a warning. Raises UnavailableError for a
    model that is no image UNet.
    """
    if config.is_off:
        return model
    unet = require_unet(model, "DeepCache")
    deepest = largest_branch(unet)
    asked, clamped = config, None
    if config.branch > deepest:
        clamped = (
            f"DeepCache: cache_branch_id {config.branch} is too deep for this model; the largest, {deepest}, is used."
        )
        logging.warning("%s", clamped)
        config = replace(config, branch=deepest)
    clone = attach(model, KEY, _wrappers(config, clamped))
    declare(clone, Accelerator("deepcache", _options(asked)))
    return clone


def branch_of(model: Any) -> int | None:
    """The branch that MODEL `model` caches; None where DeepCache is not on it."""
    options = next((one.options for one in accelerators(model) if one.name == "deepcache"), None)
    if options is None:
        return None
    return min(options["cache_branch_id"], largest_branch(require_unet(model, "DeepCache")))


def _options(config: DeepCacheConfig) -> Mapping[str, Any]:
    options: dict[str, Any] = {
        "cache_interval": config.interval,
        "cache_branch_id": config.branch,
        "start_percent": config.start,
        "end_percent": config.end,
        "schedule": config.schedule,
    }
    if config.schedule == "nonuniform":
        options |= {"center": config.center, "power": config.power}
    if config.is_adaptive:
        options["tolerance"] = config.tolerance
    if config.features != "copy":
        options["features"] = config.features
    return options


def _wrappers(config: DeepCacheConfig, clamped: str | None) -> Mapping[Site, Wrapper]:
    """The closures hold the frozen `config` and a text: clones of a model share them, so state lives in the run.

    `clamped` is what the record of each run has to say about a branch that was too deep.
    """

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patcher = executor.class_obj.model_patcher
        refuse_work_units(patcher, "DeepCache")
        _refuse_followers(patcher.model_options)
        if config.is_adaptive:
            _refuse_easy_cache(executor.class_obj.model_options)
        run = Run(config, StepFinder.of_run(executor.class_obj, *args, **kwargs), clamped=clamped)
        try:
            with run_state(executor.class_obj, KEY, run):
                return executor(*args, **kwargs)
        finally:
            run.clear()

    return {
        Site.OUTER_SAMPLE: outer_sample,
        Site.SAMPLER_SAMPLE: counting_steps(KEY, _tell_unused),
        Site.PREDICT_NOISE: _predict_noise,
        Site.CALC_COND_BATCH: _calc_cond_batch,
        Site.APPLY_MODEL: _apply_model,
        Site.DIFFUSION_MODEL: partial_forward(config.branch),
    }


def _refuse_followers(model_options: Mapping[str, Any]) -> None:
    """A node that counts its way from the middle block through the output blocks, as SUPIRApply does, loses count where
    a cached step leaves most of them out."""
    patches = model_options.get("transformer_options", {}).get("patches", {})
    owners = {
        id(owner) for function in patches.get("output_block_patch", ()) if (owner := _owner(function)) is not None
    }
    for function in patches.get("middle_block_after_patch", ()):
        if id(_owner(function)) in owners:
            raise UnavailableError(
                f"DeepCache and {type(_owner(function)).__name__} (as of SUPIRApply) cannot work on one model: it "
                "follows every forward block by block, and cached steps leave blocks out. Take one of the two out."
            )


def _refuse_easy_cache(model_options: Mapping[str, Any]) -> None:
    """EasyCache counts the forwards that it sees, and answers some itself: what caching misses cannot be measured."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    if wrappers.get(Site.DIFFUSION_MODEL.value, {}).get("easycache"):
        raise UnavailableError(
            "DeepCache with the adaptive schedule and EasyCache cannot work on one model: EasyCache would take what "
            "DeepCache measures for steps of the sampler. Choose the uniform schedule, or take one of the two out."
        )


def _owner(function: Any) -> Any:
    return getattr(function, "__self__", None)


def _tell_unused(run: Run, options: Mapping[str, Any]) -> None:
    """At the sampler's end the record gets what was cached, or a warning that no step was."""
    unit = "rows by their deep blocks"
    if run.control is not None:
        unit += f" ({run.control.rows} more rows of the outer blocks measured that)"
    report_saved(options, "deepcache", run.cached_rows, run.rows, unit)
    if not run.reused:
        measured = run.control is not None and not run.stepped_aside
        why = ", for none would have stayed within tolerance" if measured else "; all were evaluated in full"
        report_note(options, f"DeepCache: no step of this run was cached{why}.")
        report_ran(options, "deepcache", None)


def _predict_noise(
    executor: Any, x: Any, timestep: Any, model_options: dict | None = None, *args: Any, **kwargs: Any
) -> Any:
    model_options = {} if model_options is None else model_options
    run: Run | None = state_of(model_options.get("transformer_options", {}), KEY)
    if run is None or run.stepped_aside:
        return executor(x, timestep, model_options, *args, **kwargs)
    position = run.finder.locate(model_options, timestep)
    options = model_options.get("transformer_options", {})
    reason = _obstacle(run, position, executor.class_obj)
    if reason is not None or position is None:
        run.stepped_aside = True
        run.clear()
        rest = "the rest of this run" if run.reused else "this run"
        warn(options, f"DeepCache: {reason}; nothing is cached in {rest}.")
        return executor(x, timestep, model_options, *args, **kwargs)
    if not run.warned:
        run.warned = True
        _tell(run, position, options)
    if position.went_back:
        report_note(
            options, "DeepCache: this sampler goes back to steps that it had left, and evaluates there in full."
        )
    guider = executor.class_obj
    combines_as_core = type(guider).predict_noise is CFGGuider.predict_noise
    with run.evaluating(position, float(guider.cfg) if combines_as_core else None, options):
        return executor(x, timestep, model_options, *args, **kwargs)


def _obstacle(run: Run, position: Position | None, guider: Any) -> str | None:
    """Why nothing is cached from here on; what the adaptive schedule measures needs more to hold still."""
    if run.control is None:
        return None if position is not None else run.finder.why_not()
    is_new = position is not None and position.step not in run.control.decided
    return obstacle(run.finder, position, is_new) or scheduled_hooks(guider)


def _tell(run: Run, position: Position, options: Mapping[str, Any]) -> None:
    """Say what this run does in place of what was asked for: once, at its first evaluation."""
    config = run.config
    if run.clamped is not None:  # the log had it when the model was patched
        report_note(options, run.clamped)
        report_ran(options, "deepcache", _options(config))
    if run.finder.is_lost and (config.start > 0.0 or config.end < 1.0):
        warn(options, run.finder.lost_text("DeepCache", "its window"))
    plan = sources(config, position.steps, position.part)
    if position.part.total <= MOST_FEW_STEPS and any(source not in (None, step) for step, source in enumerate(plan)):
        warn(
            options,
            f"DeepCache: of {position.part.total} steps each changes the image much, so cached ones make another image "
            "than the model would. Take the node out for models of few steps, or choose the adaptive schedule, which "
            "caches what it measured to be small.",
        )
    uniform = fallback(config, position.steps, position.part)
    if uniform is not None:
        warn(options, uniform)
        report_ran(options, "deepcache", _options(replace(config, schedule="uniform")))


def _calc_cond_batch(
    executor: Any, model: Any, conds: list, x: torch.Tensor, timestep: Any, model_options: dict, *args: Any
) -> Any:
    conds = with_unique_uuids(conds)
    options = model_options.get("transformer_options", {})
    run: Run | None = state_of(options, KEY)
    if run is None or run.control is None or run.current is None or run.current.source is None:
        return executor(model, conds, x, timestep, model_options, *args)
    evaluation, step = run.current, run.current.step
    if not run.control.is_known(step, evaluation.source == step, float(timestep.reshape(-1)[0]), conds, x, options):
        run.evaluate_in_full(evaluation)
    out = executor(model, conds, x, timestep, model_options, *args)
    if evaluation.source == step:
        run.control.observe(step, evaluation.missed.end_call())
    return out


def _apply_model(
    executor: Any,
    x: torch.Tensor,
    timestep: Any,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Decides, around the model that may be compiled, what its forward does: all of it, or the outer blocks."""
    options = {} if transformer_options is None else transformer_options
    inputs = (x, timestep, c_concat, c_crossattn, control, options)
    run: Run | None = state_of(options, KEY)
    if run is None:
        return executor(*inputs, **kwargs)
    run.rows += len(x)
    evaluation = run.current
    if evaluation is None or evaluation.source is None:
        return executor(*inputs, **kwargs)
    keys = chunk_keys(x, options, evaluation)
    if keys is None:
        return executor(*inputs, **kwargs)
    if evaluation.step != evaluation.source:
        features = run.recall(keys, evaluation)
        if features is not None:
            report_cached(options)
            run.reused = True
            run.cached_rows += len(x)
            with reusing(options, features):
                return executor(*inputs, **kwargs)
        if run.is_new(keys, evaluation):
            report_note(
                options,
                "DeepCache: the prompts or sizes that act change during this run; a step where one begins is evaluated "
                "in full.",
            )
    expected = None if evaluation.previous is None else run.expected(keys, evaluation)
    cached = None if expected is None else _as_cached(run, executor, inputs, kwargs, expected)
    with keeping(options) as kept:
        result = executor(*inputs, **kwargs)
    # More than one forward, or one of other rows: another node evaluates in a way of its own, with parts unnamed here.
    is_plain = len(kept) == 1 and kept[0].shape[0] == x.shape[0]
    if evaluation.previous is not None:
        kinds = options.get("cond_or_uncond", ())
        if expected is None or cached is None or not is_plain or len(kinds) != len(keys):
            evaluation.missed.is_whole = False
        else:
            evaluation.missed.compare(result, cached, kinds, expected.reach, expected.base)
    if is_plain:
        run.store(keys, evaluation, kept[0])
    return result


def _as_cached(run: Run, executor: Any, inputs: tuple, kwargs: dict, expected: Expected) -> torch.Tensor:
    """What a cached step would answer where a full one is to follow. Before that one, which uses up the ControlNet's
    residuals; a copy, since what a CUDA graph returns is overwritten."""
    assert run.control is not None
    run.control.rows += len(inputs[0])
    with reusing(inputs[-1], expected.features):
        return executor(*inputs, **kwargs).clone()

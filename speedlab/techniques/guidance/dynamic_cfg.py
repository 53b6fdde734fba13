"""Dynamic CFG: leave out the unconditional prediction where it changes little, and save its half of an evaluation.

`fixed` drops it after a share of the steps. `adaptive` is Adaptive Guidance (Castillo et al., 2023): it is dropped for
the rest of the run once both predictions of the noise point the same way. A window of steps or sigmas is left without
guidance outside (Kynkaanniemi et al., 2024, "Applying Guidance in a Limited Interval"). ComfyUI itself skips uncond at
CFG 1, so the guider's CFG is 1 for such an evaluation and only then. Where something needs uncond, the technique steps
aside for the run with a warning, and the image is the one without it.

Inside the window uncond may be evaluated every k-th step alone (`reuse`); guidance goes on in the others.

Half the rows take more than half the time where a layer's work is to read its weights. On a CPU Precision's
`convolution` is there for that: nothing here decides by timing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from ...common.errors import SpeedLabError, UnavailableError
from ...models.unet import require_unet
from ...patching.cond_identity import scheduled_hooks
from ...patching.notes import is_forecast, report_note, report_ran, report_saved, warn
from ...patching.position import Position, StepFinder, counting_steps
from ...patching.schedule import steps_before
from ...patching.wrappers import Accelerator, SharedState, Site, Wrapper, attach, declare, run_state, state_of
from .reuse import Difference, evaluate_with_difference
from .rows import evaluate_without_uncond, is_guided, looks_at_uncond, needs_a_value, obstacle, with_observer

KEY = "speedlab.dynamic_cfg"
Mode = Literal["fixed", "adaptive"]
# How an evaluation gets its uncond: from the model, from an earlier one's difference to cond, or not at all.
Way = Literal["full", "difference", "none"]


@dataclass(frozen=True)
class DynamicCFGConfig:
    """What the Dynamic CFG node sets.

    fixed: of the n steps of the whole schedule, step i keeps uncond when i < floor(stop_at * n).
    adaptive: uncond goes once the cosine similarity of the two noise predictions exceeds `similarity`, in every latent
    of the batch.
    Both keep it only from step floor(start_at * n) on, and in steps that begin at a sigma above `sigma_low` and not
    above `sigma_high` (0: no limit). From step floor(uncond_from * n) on the model evaluates it every
    `uncond_interval`-th step, and its last difference to cond stands for it in the others. Raises ValueError for a
    value out of range, SpeedLabError for a range of steps or sigmas that holds none.
    """

    mode: Mode = "fixed"
    stop_at: float = 0.75
    similarity: float = 0.99
    start_at: float = 0.0
    sigma_low: float = 0.0
    sigma_high: float = 0.0
    uncond_interval: int = 1
    uncond_from: float = 0.25

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        for name in ("stop_at", "start_at", "uncond_from"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("sigma_low", "sigma_high"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (no limit) or more")
        if 0.0 < self.sigma_high <= self.sigma_low:
            raise SpeedLabError(
                f"Dynamic CFG: sigma_high is {self.sigma_high:g} and sigma_low {self.sigma_low:g}, so that no step has "
                "guidance. Set sigma_high above sigma_low, or to 0 for no limit."
            )
        if self.mode == "fixed" and 0.0 < self.start_at >= self.stop_at:
            raise SpeedLabError(
                f"Dynamic CFG: start_at is {self.start_at:g} and stop_at {self.stop_at:g}, so that no step has "
                "guidance. Set start_at below stop_at."
            )
        if self.uncond_interval < 1:
            raise ValueError(f"uncond_interval is {self.uncond_interval}; it must be 1 (every step) or more")
        if not -1.0 <= self.similarity <= 1.0:
            raise ValueError(f"similarity is {self.similarity}; it must lie between -1 and 1")

    @property
    def is_off(self) -> bool:
        """Whether uncond would be evaluated at every step of any run."""
        stays = self.stop_at >= 1.0 if self.mode == "fixed" else self.similarity >= 1.0
        return stays and not self.has_window and self.uncond_interval == 1

    @property
    def has_window(self) -> bool:
        """Whether uncond is missing at the start of the run, or outside a range of sigmas."""
        return self.start_at > 0.0 or self.sigma_low > 0.0 or self.sigma_high > 0.0

    def options(self) -> dict[str, Any]:
        """What the user chose, for the record; of the optional inputs those that act."""
        options: dict[str, Any] = {"mode": self.mode}
        options |= {"stop_at": self.stop_at} if self.mode == "fixed" else {"similarity": self.similarity}
        options |= {name: value for name in ("start_at", "sigma_low", "sigma_high") if (value := getattr(self, name))}
        if self.uncond_interval > 1:
            options |= {"uncond_interval": self.uncond_interval, "uncond_from": self.uncond_from}
        return options


@dataclass
class Run(SharedState):
    """State of one run, reachable through `patching.state_of` until the run ends."""

    config: DynamicCFGConfig
    finder: StepFinder = field(default_factory=StepFinder)
    converged: bool = False
    stepped_aside: bool = False
    # Whether an evaluation of this run was made without uncond, or with another value in its place.
    left_out: bool = False
    # Evaluations, all and those whose uncond the model did not make.
    evaluations: int = 0
    without: int = 0
    guided: bool = False
    # What stands for uncond in steps that do not evaluate it.
    difference: Difference = field(default_factory=Difference)
    reported_keeping: bool = False
    reported_idle: set[str] = field(default_factory=set)
    # Whether another node sets the CFG inside of this one.
    overridden: bool = False
    reported_part: bool = False
    # The `timestep` of the last evaluation, if its predictions could not be compared.
    no_number_at: Any = None

    def step_aside(self, reason: str, model_options: Mapping[str, Any]) -> None:
        """Keep uncond for the rest of the run, and say why, once."""
        if not self.stepped_aside:
            options = model_options.get("transformer_options", {})
            rest = "the rest of this run" if self.left_out else "this run"
            warn(options, f"Dynamic CFG: uncond stays on in {rest}, because {reason}.")
        self.stepped_aside = True

    def keeps(self, reason: str, model_options: Mapping[str, Any]) -> None:
        """Say once that uncond, or what stands for it, is there where it was to be left out."""
        if not self.reported_keeping:
            self.reported_keeping = True
            options = model_options.get("transformer_options", {})
            warn(options, f"Dynamic CFG: uncond stays on in this run, because {reason}.")

    def tell_of_numbers(self, options: Mapping[str, Any], timestep: Any = None) -> None:
        """Say that predictions were no numbers, unless the evaluation at `timestep` repeats the one that gave them."""
        if self.no_number_at is not None and self.no_number_at is not timestep:
            self.difference.tell_of_numbers(options)
        self.no_number_at = None

    def tell_of_part(self, model_options: Mapping[str, Any]) -> None:
        """Say once where shares of the steps cannot count those of the whole schedule."""
        shares = {"start_at": self.config.start_at}
        if self.config.mode == "fixed":
            shares["stop_at"] = self.config.stop_at
        if self.config.uncond_interval > 1:
            shares["uncond_from"] = self.config.uncond_from
        counting = [name for name, share in shares.items() if 0.0 < share < 1.0]
        if self.finder.is_lost and not self.reported_part and counting:
            what = " and ".join(counting)
            warn(model_options.get("transformer_options", {}), self.finder.lost_text("Dynamic CFG", what))
        self.reported_part = True

    def tell_of_idle(self, names: Iterable[str], model_options: Mapping[str, Any]) -> None:
        """Say once for each what has no effect in steps without uncond."""
        for name in names:
            if name not in self.reported_idle:
                self.reported_idle.add(name)
                options = model_options.get("transformer_options", {})
                report_note(options, f"Dynamic CFG: {name} acts in the steps with uncond alone.")


def attach_dynamic_cfg(model: Any, config: DynamicCFGConfig) -> Any:
    """A clone of MODEL `model` that leaves out uncond as `config` says; `model` itself where `config` is off.

    Raises UnavailableError for a model that is no image UNet.
    """
    if config.is_off:
        return model
    require_unet(model, "Dynamic CFG")
    # Outside Forecast, which then sees no uncond that the model did not evaluate.
    clone = attach(model, KEY, _wrappers(config), outermost=(Site.CALC_COND_BATCH,))
    declare(clone, Accelerator("dynamic_cfg", config.options()))
    return clone


def _wrappers(config: DynamicCFGConfig) -> Mapping[Site, Wrapper]:
    """The closure holds the frozen `config` alone: clones of a model share it, so state lives in the run."""

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_easy_cache(executor.class_obj.model_options)
        run = Run(config, StepFinder.of_run(executor.class_obj, *args, **kwargs))
        try:
            with run_state(executor.class_obj, KEY, run):
                return executor(*args, **kwargs)
        finally:
            run.difference.clear()

    wrappers = {
        Site.OUTER_SAMPLE: outer_sample,
        Site.SAMPLER_SAMPLE: counting_steps(KEY, _tell_unused),
        Site.PREDICT_NOISE: _predict_noise,
    }
    return wrappers | ({Site.CALC_COND_BATCH: _calc_cond_batch} if config.uncond_interval > 1 else {})


def _tell_unused(run: Run, options: Mapping[str, Any]) -> None:
    """At the sampler's end the record gets what was left out, or a warning that nothing was."""
    run.tell_of_numbers(options)
    report_saved(options, "dynamic_cfg", run.without, run.evaluations, "evaluations of the negative prompt")
    if not run.left_out:
        report_ran(options, "dynamic_cfg", None)
        if not run.stepped_aside and not run.reported_keeping:
            report_note(options, f"Dynamic CFG: it left out nothing in this run, because {_why_not(run)}.")


_OVERRIDDEN = (
    "another node (such as CFGOverride) sets the CFG in steps whose uncond was to be left out, so that ComfyUI "
    "evaluates it there. Take one of the two out, or end its range where stop_at begins"
)


def _why_not(run: Run) -> str:
    if not run.guided:
        return "at CFG 1 ComfyUI itself evaluates no uncond"
    if run.overridden:
        return _OVERRIDDEN
    if run.config.uncond_interval > 1:
        return "none of its steps comes between two that evaluate uncond"
    if run.config.has_window:
        return "all of its steps lie inside the window"
    if run.config.mode == "fixed":
        return "all of its steps lie before stop_at"
    return "both predictions never agreed as much as similarity asks for"


def _refuse_easy_cache(model_options: Mapping[str, Any]) -> None:
    """ComfyUI's EasyCache starts again when the batch loses uncond, with a rate of change of 0: it would then skip
    every evaluation to the end of its window.
    """
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    if wrappers.get(Site.DIFFUSION_MODEL.value, {}).get("easycache"):
        raise UnavailableError(
            "Dynamic CFG and EasyCache cannot work on one model: when Dynamic CFG leaves out the negative prompt, "
            "EasyCache skips all later steps. Take one of the two nodes out of the graph; "
            "DeepCache and LazyCache do go with Dynamic CFG."
        )


def _predict_noise(
    executor: Any, x: Any, timestep: Any, model_options: dict | None = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    options = {} if model_options is None else model_options
    run: Run | None = state_of(options.get("transformer_options", {}), KEY)
    if run is None:
        return executor(x, timestep, options, *args, **kwargs)
    # Attention Backend repeats an evaluation that gave NaN.
    run.tell_of_numbers(options.get("transformer_options", {}), timestep)
    # At CFG 1 there is no evaluation of the negative prompt that could be left out.
    run.evaluations += is_guided(executor.class_obj)
    if run.stepped_aside or not is_guided(executor.class_obj):
        return executor(x, timestep, options, *args, **kwargs)
    run.guided = True
    reason = obstacle(executor.class_obj, options)
    if reason is not None:
        run.step_aside(reason, options)
        return executor(x, timestep, options, *args, **kwargs)
    way, position = _way_of(run, options, timestep)
    if way == "none" and (reason := needs_a_value(options)) is not None:
        run.keeps(reason, options)
        way = "difference" if run.config.uncond_interval > 1 else "full"
    if way == "difference" and (reason := _no_difference(executor.class_obj, options)) is not None:
        run.keeps(reason, options)
        way = "full"
    if way == "none":
        result, idle = evaluate_without_uncond(executor, x, timestep, options, *args, **kwargs)
        if idle is None:
            if not run.overridden:
                run.overridden = True
                warn(options.get("transformer_options", {}), f"Dynamic CFG: {_OVERRIDDEN}.")
            return result
        run.tell_of_idle(idle, options)
        run.left_out = True
        run.without += 1
        return result
    if way == "full" and run.config.mode == "adaptive":
        options = with_observer(options, lambda predictions: _compare(run, timestep, predictions))
    if position is None:
        return executor(x, timestep, options, *args, **kwargs)
    with run.difference.evaluating(position, may_stand=way == "difference"):
        return executor(x, timestep, options, *args, **kwargs)


def _no_difference(guider: Any, model_options: Mapping[str, Any]) -> str | None:
    if looks_at_uncond(guider, model_options):
        return "a node (such as Self-Attention Guidance or NAGuidance) sees its attention"
    return scheduled_hooks(guider)


def _calc_cond_batch(
    executor: Any, model: Any, conds: list, x: torch.Tensor, timestep: Any, model_options: dict, *args: Any
) -> Any:
    options = model_options.get("transformer_options", {})
    run: Run | None = state_of(options, KEY)
    if run is None or run.stepped_aside:
        return executor(model, conds, x, timestep, model_options, *args)
    out, stood = evaluate_with_difference(run.difference, executor, model, conds, x, timestep, model_options, *args)
    run.left_out = run.left_out or stood
    run.without += stood
    return out


def _way_of(run: Run, model_options: dict, timestep: Any) -> tuple[Way, Position | None]:
    """How an evaluation gets its uncond, and where it stands, if that had to be known."""
    config = run.config
    position = run.finder.locate(model_options, timestep)
    if position is not None and position.went_back and (run.converged or config.uncond_interval > 1):
        run.converged = False
        run.difference.clear()  # new noise follows, to which nothing of before belongs
        report_note(
            model_options.get("transformer_options", {}),
            "Dynamic CFG: this sampler goes back to steps that it had left, and evaluates uncond there.",
        )
    if config.mode == "adaptive" and not config.has_window and config.uncond_interval == 1:
        return "none" if run.converged else "full", None
    if position is None:
        run.step_aside(run.finder.why_not(), model_options)
        return "full", None
    run.tell_of_part(model_options)
    total, place = position.part.total, position.part.first + position.step
    # The sigma that the step begins with: of Heun's two evaluations both are guided, or neither is.
    sigma = run.finder.sigmas[position.step]
    is_over = place >= steps_before(config.stop_at, total) if config.mode == "fixed" else run.converged
    outside = sigma <= config.sigma_low > 0.0 or sigma > config.sigma_high > 0.0
    if is_over or outside or place < steps_before(config.start_at, total):
        return "none", position
    behind = place - steps_before(config.uncond_from, total)
    return "difference" if behind >= 0 and (behind + 1) % config.uncond_interval else "full", position


def _compare(run: Run, timestep: Any, predictions: Mapping[str, Any]) -> None:
    """Decides from this evaluation about the next ones. Waits for the device, once an evaluation until uncond is off.

    The noise prediction is the input minus the denoised latent, up to a factor that the cosine does not see.
    """
    if is_forecast(predictions["model_options"].get("transformer_options", {})):
        return
    noisy = predictions["input"]
    cond = (noisy - predictions["cond_denoised"]).flatten(1).float()
    uncond = (noisy - predictions["uncond_denoised"]).flatten(1).float()
    similarity = float(torch.nn.functional.cosine_similarity(cond, uncond, dim=1).min())
    if math.isnan(similarity):
        run.no_number_at = timestep
    run.converged = similarity > run.config.similarity

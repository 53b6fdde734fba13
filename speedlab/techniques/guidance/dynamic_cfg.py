"""Dynamic CFG: leave out the unconditional prediction where it changes little, and save its half of an evaluation.

`fixed` drops it after a share of the steps. `adaptive` is Adaptive Guidance (Castillo et al., 2023): it is dropped for
the rest of the run once both predictions of the noise point the same way. ComfyUI itself skips uncond at CFG 1, so the
guider's CFG is 1 for such an evaluation and only then. Where something needs uncond, the technique steps aside for the
run with a warning, and the image is the one without it.

Half the rows take more than half the time where a layer's work is to read its weights. So on a CPU convolutions with
many weights and few pixels are matrix products in an evaluation without uncond, where that was measured to be faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from ...common.errors import UnavailableError
from ...models.unet import require_unet
from ...patching.compiled import is_compiled
from ...patching.notes import report_note, report_ran, warn
from ...patching.position import StepFinder
from ...patching.schedule import steps_before
from ...patching.wrappers import Accelerator, SharedState, Site, Wrapper, attach, declare, run_state, state_of
from ..cpu.conv_as_matmul import few_pixels_as_products, may_gain
from .rows import UncondReadError, evaluate_without_uncond, is_guided, obstacle, with_observer

KEY = "speedlab.dynamic_cfg"
Mode = Literal["fixed", "adaptive"]


@dataclass(frozen=True)
class DynamicCFGConfig:
    """What the Dynamic CFG node sets.

    fixed: of the n steps of the whole schedule, step i keeps uncond when i < floor(stop_at * n).
    adaptive: uncond goes once the cosine similarity of the two noise predictions exceeds `similarity`, in every latent
    of the batch. Raises ValueError for a value out of range.
    """

    mode: Mode = "fixed"
    stop_at: float = 0.75
    similarity: float = 0.99

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        if not 0.0 <= self.stop_at <= 1.0:
            raise ValueError(f"stop_at is {self.stop_at}; it must lie between 0 and 1")
        if not -1.0 <= self.similarity <= 1.0:
            raise ValueError(f"similarity is {self.similarity}; it must lie between -1 and 1")

    @property
    def is_off(self) -> bool:
        """Whether uncond would be kept at every step of any run."""
        return self.stop_at >= 1.0 if self.mode == "fixed" else self.similarity >= 1.0


@dataclass
class Run(SharedState):
    """State of one run, reachable through `patching.state_of` until the run ends."""

    config: DynamicCFGConfig
    finder: StepFinder = field(default_factory=StepFinder)
    converged: bool = False
    stepped_aside: bool = False
    # Whether an evaluation of this run was made without uncond.
    left_out: bool = False
    guided: bool = False
    # Whether another node sets the CFG inside of this one.
    overridden: bool = False
    told_of_part: bool = False
    # Whether evaluations without uncond may compute convolutions as products; None before the first.
    may_gain: bool | None = None
    told_of_products: bool = False

    def step_aside(self, reason: str, model_options: Mapping[str, Any]) -> None:
        """Keep uncond for the rest of the run, and say why, once."""
        if not self.stepped_aside:
            told = model_options.get("transformer_options", {})
            rest = "the rest of this run" if self.left_out else "this run"
            warn(told, f"Dynamic CFG: uncond stays on in {rest}, because {reason}.")
        self.stepped_aside = True

    def tell_of_part(self, model_options: Mapping[str, Any]) -> None:
        """Say once where `stop_at` cannot count the steps of the whole schedule."""
        if self.finder.is_lost and not self.told_of_part and 0.0 < self.config.stop_at < 1.0:
            warn(model_options.get("transformer_options", {}), self.finder.lost_text("Dynamic CFG", "stop_at"))
        self.told_of_part = True


def attach_dynamic_cfg(model: Any, config: DynamicCFGConfig) -> Any:
    """A clone of MODEL `model` that leaves out uncond as `config` says; `model` itself where `config` is off.

    Raises UnavailableError for a model that is no image UNet.
    """
    if config.is_off:
        return model
    require_unet(model, "Dynamic CFG")
    clone = attach(model, KEY, _wrappers(config))
    if model.load_device.type == "cpu":
        may_gain(
            model.model.diffusion_model
        )  # measures once a process: here, and not in a step that is measured itself
    share = {"stop_at": config.stop_at} if config.mode == "fixed" else {"similarity": config.similarity}
    declare(clone, Accelerator("dynamic_cfg", {"mode": config.mode, **share}))
    return clone


def _wrappers(config: DynamicCFGConfig) -> Mapping[Site, Wrapper]:
    """The closure holds the frozen `config` alone: clones of a model share it, so state lives in the run."""

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_easy_cache(executor.class_obj.model_options)
        with run_state(executor.class_obj, KEY, Run(config, StepFinder.of_run(executor.class_obj, *args, **kwargs))):
            return executor(*args, **kwargs)

    return {
        Site.OUTER_SAMPLE: outer_sample,
        Site.SAMPLER_SAMPLE: _sampler_sample,
        Site.PREDICT_NOISE: _predict_noise,
    }


def _sampler_sample(
    executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, callback: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around the sampler: its callback counts steps, and at its end the record hears of a run that left out nothing."""
    told = extra_args.get("model_options", {}).get("transformer_options", {})
    run: Run | None = state_of(told, KEY)
    heard = callback if run is None else run.finder.listening(callback)
    result = executor(model_wrap, sigmas, extra_args, heard, *args, **kwargs)
    if run is not None and not run.left_out:
        report_ran(told, "dynamic_cfg", None)
        if not run.stepped_aside:
            report_note(told, f"Dynamic CFG: it left out nothing in this run, because {_why_not(run)}.")
    return result


_OVERRIDDEN = (
    "another node (such as CFGOverride) sets the CFG in steps whose uncond was to be left out, so that ComfyUI "
    "evaluates it there. Take one of the two out, or end its range where stop_at begins"
)


def _why_not(run: Run) -> str:
    if not run.guided:
        return "at CFG 1 ComfyUI itself evaluates no uncond"
    if run.overridden:
        return _OVERRIDDEN
    if run.config.mode == "fixed":
        return "all of its steps lie before stop_at"
    return "both predictions never agreed as much as similarity asks for"


def _refuse_easy_cache(model_options: Mapping[str, Any]) -> None:
    """ComfyUI's EasyCache starts anew when the batch loses uncond, with a rate of change of 0: it would then skip every
    evaluation to the end of its window.
    """
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    if wrappers.get(Site.DIFFUSION_MODEL.value, {}).get("easycache"):
        raise UnavailableError(
            "Dynamic CFG and EasyCache cannot work on one model: when Dynamic CFG leaves out the negative prompt, "
            "EasyCache loses its bearings and skips all that follows. Take one of the two nodes out of the graph; "
            "DeepCache and LazyCache do go with Dynamic CFG."
        )


def _predict_noise(
    executor: Any, x: Any, timestep: Any, model_options: dict | None = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    options = {} if model_options is None else model_options
    run: Run | None = state_of(options.get("transformer_options", {}), KEY)
    if run is None or run.stepped_aside or not is_guided(executor.class_obj):
        return executor(x, timestep, options, *args, **kwargs)
    run.guided = True
    reason = obstacle(executor.class_obj, options)
    if reason is not None:
        run.step_aside(reason, options)
        return executor(x, timestep, options, *args, **kwargs)
    if _keeps_uncond(run, options, timestep):
        if run.config.mode == "adaptive":
            options = with_observer(options, lambda predictions: _compare(run, predictions))
        return executor(x, timestep, options, *args, **kwargs)
    try:
        with _at_half_the_time(run, executor.class_obj, options):
            result, left_out = evaluate_without_uncond(executor, x, timestep, options, *args, **kwargs)
    except UncondReadError as read:
        run.step_aside(f"the post-CFG function {read} reads it", options)
        return executor(x, timestep, options, *args, **kwargs)
    if not left_out and not run.overridden:
        run.overridden = True
        warn(options.get("transformer_options", {}), f"Dynamic CFG: {_OVERRIDDEN}.")
    run.left_out = run.left_out or left_out
    return result


@contextmanager
def _at_half_the_time(run: Run, guider: Any, model_options: Mapping[str, Any]) -> Iterator[None]:
    """For an evaluation of half the rows: convolutions that would take as long as with all, in another way."""
    network, patcher = guider.inner_model.diffusion_model, guider.model_patcher
    if run.may_gain is None:
        # Compiled code would notice other layers than before, and be compiled anew.
        run.may_gain = patcher.load_device.type == "cpu" and not is_compiled(patcher) and may_gain(network)
    if not run.may_gain:
        yield
        return
    with few_pixels_as_products(network) as replaced:
        yield
    if replaced.calls and not run.told_of_products:
        run.told_of_products = True
        report_note(
            model_options.get("transformer_options", {}),
            f"Dynamic CFG: while uncond is off, {replaced.calls} convolutions with few pixels are matrix products, "
            "which were measured to be faster here (equal to rounding).",
        )


def _keeps_uncond(run: Run, model_options: dict, timestep: Any) -> bool:
    if run.config.mode == "adaptive":
        return not run.converged
    position = run.finder.locate(model_options, timestep)
    if position is None:
        run.step_aside(run.finder.why_not(), model_options)
        return True
    run.tell_of_part(model_options)
    return position.part.first + position.step < steps_before(run.config.stop_at, position.part.total)


def _compare(run: Run, predictions: Mapping[str, Any]) -> None:
    """Decides from this evaluation about the next ones. Waits for the device, once an evaluation until uncond is off.

    The noise prediction is the input minus the denoised latent, up to a factor that the cosine does not see.
    """
    noisy = predictions["input"]
    cond = (noisy - predictions["cond_denoised"]).flatten(1).float()
    uncond = (noisy - predictions["uncond_denoised"]).flatten(1).float()
    similarity = float(torch.nn.functional.cosine_similarity(cond, uncond, dim=1).min())
    run.converged = similarity > run.config.similarity

"""Memory Plan: how UNet, text encoders and VAE share the device, chosen by what is predicted to fit.

none: all stay where ComfyUI puts them. model: they take turns. sequential: they take turns, and weights are streamed
layer by layer, so that two layers at most are on the device. auto: the fastest of these that fits the budget.

A plan in words and numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..common.core import is_dynamic
from ..common.errors import SpeedLabError, UnavailableError
from ..patching.compiled import has_compile_wrapper, refusal_of_streaming
from ..patching.notes import report_note, report_ran
from ..patching.wrappers import Accelerator, Site, accelerators, attach, declare
from ..vae.decode import require_vae
from ..vae.variants import is_compiled_vae, refuse_decoding_by
from .out_of_memory import clip_with_advice, settling, vae_with_advice, with_advice_in_sampling
from .placement import Group, Offload, Placement, is_planned, planned, unplanned
from .predict import (
    OFFLOADS,
    ImageSize,
    Prediction,
    compiled_bytes,
    compiled_vae_bytes,
    is_measured,
    parts_of,
    predict,
)

log = logging.getLogger(__name__)

KEY = "speedlab.memory_plan"
Choice = Literal["auto", "none", "model", "sequential"]
CHOICES = get_args(Choice)
GB = 1e9


class MemoryBudgetError(SpeedLabError):
    """No plan fits the budget; the message names the smallest that would."""


@dataclass(frozen=True)
class MemoryPlanConfig:
    """What the Memory Plan node sets. `budget_gb` in GB of 10^9 bytes; 0 is what is free. Raises ValueError."""

    offload: Choice = "auto"
    budget_gb: float = 0.0

    def __post_init__(self) -> None:
        if self.offload not in CHOICES:
            raise ValueError(f"offload is {self.offload!r}; choose one of {', '.join(CHOICES)}")
        if not 0.0 <= self.budget_gb < float("inf"):
            raise ValueError(f"budget_gb is {self.budget_gb}; it must be 0 (what is free) or more")


@dataclass(frozen=True)
class Planned:
    """The models to go on with, and the plan in words."""

    model: Any
    clip: Any | None
    vae: Any | None
    text: str
    prediction: Prediction


def plan_memory(
    model: Any, clip: Any | None, vae: Any | None, config: MemoryPlanConfig, latent: Any | None = None
) -> Planned:
    """Choose a way of offloading and attach it to clones; the inputs are untouched.

    `none` gives back the very objects. `latent` (a LATENT) tells size and batch to predict for; without it that is one
    image of the model's own size. Raises MemoryBudgetError where nothing fits, UnavailableError where ComfyUI keeps
    models on the device for good.
    """
    if vae is not None:
        require_vae(vae)
        refuse_decoding_by(vae, "Memory Plan")
    size = image_size(model, latent)
    parts = parts_of(model, clip, vae, size)
    predictions = {offload: predict(parts, offload) for offload in OFFLOADS}
    budget = config.budget_gb * GB or free_bytes(model, clip, vae)
    compiled = has_compile_wrapper(getattr(model, "wrappers", {})) or (vae is not None and is_compiled_vae(vae))
    refused: tuple[Offload, ...] = ("sequential",) if compiled else ()
    chosen = _choose(config, predictions, budget, refused)
    text = plan_text(
        predictions, chosen, size, budget, config.budget_gb > 0, model.load_device.type, _paged(model, clip, vae),
        is_measured(model.load_device.type), is_attention_fused(model),
    )  # fmt: skip
    held = compiled_bytes(model) + (compiled_vae_bytes(vae) if vae is not None else 0)
    if held:
        text += (
            f"\nCompiled programs hold weights of their own, {gigabytes(held)} at most, counted above. They go when "
            "ComfyUI unloads the model, and are compiled anew after it."
        )
    log.info("SpeedLab: %s", text)
    if chosen == "none" and config.offload == "none" and not any(map(is_planned, _patchers(model, clip, vae))):
        return Planned(model, clip, vae, text, predictions[chosen])
    out = _attach(model, clip, vae, chosen, config)
    return Planned(out[0], out[1], out[2], text, predictions[chosen])


def image_size(model: Any, latent: Any | None) -> ImageSize:
    """The size that `latent` has, else the one that the model was made for. Raises UnavailableError for video."""
    if latent is not None:
        samples = latent["samples"]
        if getattr(samples, "is_nested", False) or samples.ndim != 4:
            raise UnavailableError("Memory Plan predicts for images; this latent is a video, or several in one.")
        return ImageSize(samples.shape[3] * 8, samples.shape[2] * 8, samples.shape[0])
    name = type(model.model).__name__
    side = 1024 if name.startswith("SDXL") else 768 if type(model.model.model_config).__name__ == "SD20" else 512
    return ImageSize(side, side)


def free_bytes(model: Any, clip: Any | None, vae: Any | None) -> int:
    """What is free on the UNet's device once models made room, less what ComfyUI keeps in reserve."""
    import comfy.model_management as mm

    device = model.load_device
    if device.type == "cpu":
        # The weights lie in its memory whether ComfyUI calls them loaded or not.
        loaded = sum(one.model_size() for one in _patchers(model, clip, vae) if one.load_device == device)
    else:
        # Whatever is loaded makes room for what a run needs.
        loaded = sum(
            one.model_loaded_memory() for one in mm.current_loaded_models if one.device == device and one.model
        )
    return int(mm.get_free_memory(device) + loaded - mm.extra_reserved_memory())


def is_attention_fused(model: Any) -> bool:
    """Whether attention keeps no scores in memory: a backend chosen for this model, or ComfyUI's own where it is."""
    import comfy.ldm.modules.attention as attention

    chosen = [one.options.get("backend") for one in accelerators(model) if one.name == "attention"]
    if chosen:
        return chosen[-1] not in ("sub_quadratic", "split")
    scored = [getattr(attention, name, None) for name in ("attention_basic", "attention_sub_quad", "attention_split")]
    return not any(attention.optimized_attention is function for function in scored)


def _patchers(model: Any, clip: Any | None, vae: Any | None) -> list[Any]:
    return [model, *(part.patcher for part in (clip, vae) if part is not None)]


def _paged(model: Any, clip: Any | None, vae: Any | None) -> tuple[str, ...]:
    """The models of a plan whose weights ComfyUI's dynamic VRAM moves, in words."""
    named = {"UNet": model, **{name: part.patcher for name, part in (("text encoders", clip), ("VAE", vae)) if part}}
    return tuple(name for name, patcher in named.items() if is_dynamic(patcher))


def _choose(
    config: MemoryPlanConfig, predictions: dict[Offload, Prediction], budget: float, refused: tuple[Offload, ...]
) -> Offload:
    given = config.budget_gb > 0
    if config.offload in refused:
        raise refusal_of_streaming()
    possible = {offload: one for offload, one in predictions.items() if offload not in refused}
    fits = [offload for offload in OFFLOADS if offload in possible and predictions[offload].peak <= budget]
    asked = None if config.offload == "auto" else config.offload
    if asked is None and fits:
        return fits[0]
    if asked is not None and (asked in fits or not given):
        return asked
    left_out = "".join(
        f" With {offload} offload, {gigabytes(predictions[offload].peak)} would do, but compiled code excludes it: "
        "take the compile node out."
        for offload in refused
        if predictions[offload].peak < min(one.peak for one in possible.values())
    )
    raise MemoryBudgetError(too_small(possible, budget, asked, given) + left_out)


def _attach(
    model: Any, clip: Any | None, vae: Any | None, chosen: Offload, config: MemoryPlanConfig
) -> tuple[Any, Any | None, Any | None]:
    patchers = _patchers(model, clip, vae)
    if chosen != "none":
        _refuse_resident(patchers)
    group = Group()
    for one in patchers:
        group.add(one.model)

    def place(patcher: Any) -> Any:
        if chosen == "none":
            return unplanned(patcher)
        # A text encoder that ComfyUI runs on another device needs no streaming.
        alike = patcher.load_device == model.load_device
        return planned(patcher, Placement(chosen if alike else "model", group))

    options = {"offload": chosen, **({"budget_gb": config.budget_gb} if config.budget_gb else {})}
    wrappers = {
        Site.OUTER_SAMPLE: with_advice_in_sampling(chosen, group),
        Site.SAMPLER_SAMPLE: _with_what_is_left_to_core(options),
        Site.APPLY_MODEL: settling(group),
    }
    out = attach(place(model), KEY, wrappers)
    declare(out, Accelerator("memory_plan", options))
    return (
        out,
        None if clip is None else clip_with_advice(clip, place(clip.patcher), chosen, group),
        None if vae is None else vae_with_advice(vae, place(vae.patcher), chosen, group),
    )


def _with_what_is_left_to_core(options: Mapping[str, Any]) -> Callable[..., Any]:
    """A SAMPLER_SAMPLE wrapper: the record says where a plan did nothing."""

    def sampler_sample(executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, *args: Any, **kwargs: Any) -> Any:
        transformer_options = extra_args.get("model_options", {}).get("transformer_options", {})
        if is_dynamic(model_wrap.model_patcher):
            report_note(transformer_options, "Memory Plan: ComfyUI's dynamic VRAM moved the weights, and not the plan.")
            report_ran(transformer_options, "memory_plan", {**options, "left_to": "dynamic_vram"})
        return executor(model_wrap, sigmas, extra_args, *args, **kwargs)

    return sampler_sample


def _refuse_resident(patchers: list[Any]) -> None:
    """Offloading needs somewhere to go."""
    device = patchers[0].load_device
    if device.type != "cpu" and all(one.offload_device == device for one in patchers):
        raise UnavailableError(
            "Memory Plan cannot offload: ComfyUI was started with --highvram or --gpu-only, which keeps every model on "
            f"{device}. Start it without that option, or set offload to none."
        )


_WORDS: dict[Offload, str] = {
    "none": "everything stays on the device",
    "model": "text encoders, UNet and VAE take turns on the device",
    "sequential": "weights are streamed layer by layer, two layers at most on the device",
}


def gigabytes(nbytes: float) -> str:
    """`6.91 GB`, of 10^9 bytes."""
    return f"{nbytes / 1e9:.2f} GB"


def plan_text(
    predictions: Mapping[Offload, Any], chosen: Offload, size: ImageSize, budget: float, given: bool,
    device_type: str, paged: Sequence[str], measured: bool, fused: bool,
) -> str:  # fmt: skip
    """Every phase of the chosen plan, the peaks of the others, and what the numbers leave out."""
    plan = predictions[chosen]
    images = "1 image" if size.batch == 1 else f"{size.batch} images"
    limit = f"budget {gigabytes(budget)}" if given else f"{gigabytes(budget)} free"
    lines = [f"Memory plan: {chosen} ({_WORDS[chosen]}), for {images} of {size.width}x{size.height}; {limit}"]
    lines += [
        f"  {phase.name}: {gigabytes(phase.total)} = weights {gigabytes(phase.weights)} "
        f"+ activations {gigabytes(phase.activations)}"
        for phase in plan.phases
    ]
    lines.append(f"Predicted peak: {gigabytes(plan.peak)}, while {plan.worst.name}.")
    others = [f"{name} {gigabytes(other.peak)}" for name, other in predictions.items() if name != chosen]
    lines.append(f"The other plans: {', '.join(others)}.")
    if plan.peak > budget:
        lines.append("That is more than there is: expect ComfyUI to offload more, or to run out of memory.")
    if device_type == "cpu":
        lines.append(
            "Models run on the CPU: their weights lie in its memory under every plan, and sequential adds two layers. "
            "The numbers are what another device would need."
        )
    if paged:
        lines.append(
            f"ComfyUI's dynamic VRAM moves the weights of {', '.join(paged)} itself, as it does without a plan: it "
            "keeps what fits and evicts on demand. There the plan acts only on clones that ComfyUI loads whole, as for "
            "compiled code and for prompts with hooks. Start ComfyUI with --reserve-vram to keep it below a budget."
        )
    if not measured:
        lines.append(f"Activations are counted from tensors; they were never measured on {device_type}.")
    if not fused:
        lines.append(
            "ComfyUI's attention here keeps scores beside what is predicted. Attention Backend with sdpa does not."
        )
    return "\n".join(lines)


def too_small(predictions: Mapping[Offload, Any], budget: float, asked: Offload | None, given: bool) -> str:
    """Why a budget, `given` or what is free, does not do, and the smallest that would."""
    least = min(predictions.values(), key=lambda one: one.peak)
    if asked is not None:
        peak = predictions[asked].peak
        head = f"offload {asked} needs {gigabytes(peak)} and the budget is {gigabytes(budget)}."
        if least.peak <= budget:
            return f"{head} Set offload to auto or {least.offload} ({gigabytes(least.peak)}), or the budget higher."
    else:
        head = f"No plan fits {'' if given else 'the '}{gigabytes(budget)}{'' if given else ' that are free'}."
    step = 0.01
    smallest = -(-least.peak // (step * 1e9)) * step
    raised = f"set budget_gb to {smallest:.2f} or more, make" if given else "make"
    return (
        f"{head} The smallest is {least.offload} offload with {gigabytes(least.peak)}, needed while "
        f"{least.worst.name}: {raised} the image or the batch smaller"
        f"{', or decode with Tiny VAE Decode and leave vae unconnected' if least.worst.name == 'decoding' else ''}."
    )

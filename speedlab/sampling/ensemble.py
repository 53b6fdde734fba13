"""Base and refiner as an ensemble of expert denoisers: one schedule of noise, the base down to a step, the refiner on.

Bit for bit what two chained KSamplerAdvanced give: the first adds noise and returns what is left of it, the second adds
none and goes on at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import SpeedLabError, UnavailableError
from ..measure.context import NodeContext
from ..measure.trace import SamplingTrace, traced
from ..models.loading import SOURCE
from ..patching.schedule import steps_before
from ..patching.wrappers import accelerators
from .profiled import ProfiledLatent, ProfileOptions, SamplingRequest, profile_run


@dataclass(frozen=True)
class Expert:
    """A model with the conditioning that is its own."""

    model: Any
    positive: Any
    negative: Any


@dataclass(frozen=True)
class EnsembleRequest:
    """KSampler's settings and `handoff`: of n steps, step i is the base's when i < floor(handoff * n)."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    handoff: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.handoff <= 1.0:
            raise ValueError(f"handoff is {self.handoff}; it must lie between 0 and 1")

    @property
    def base_steps(self) -> int:
        return steps_before(self.handoff, self.steps)


def sample_ensemble(
    base: Expert,
    refiner: Expert,
    latent: Mapping[str, Any],
    request: EnsembleRequest,
    options: ProfileOptions,
    context: NodeContext,
) -> ProfiledLatent:
    """Sample with both models and measure it; the models given are not changed.

    Raises SpeedLabError where the models work on different latents, UnavailableError for nested latents (video with
    sound), and whatever `profiling.runner.profile_run` raises.
    """
    _check(base, refiner, latent)
    first, second = request.base_steps, request.steps - request.base_steps
    sigmas = _sigmas(base.model if first else refiner.model, request)

    def first_part(model: Any) -> dict[str, Any]:
        if not first:
            return _part(replace(refiner, model=model), latent, request, sigmas)
        return _part(replace(base, model=model), latent, request, sigmas, last=first if second else None)

    def sample(trace: SamplingTrace) -> dict[str, Any]:
        if not first:
            trace.model_role = "refiner"
            return first_part(traced(refiner.model, trace))
        out = first_part(traced(base.model, trace))
        if second:
            following = replace(refiner, model=traced(refiner.model, trace.follow("refiner", first)))
            out = _part(following, out, request, sigmas, start=first)
        return out

    described = SamplingRequest(
        request.seed, request.steps, request.cfg, request.sampler_name, request.scheduler,
        more={"handoff": request.handoff, "base_steps": first, "refiner": _describe(refiner.model)},
        others={"refiner": refiner.model} if first and second else {},
    )  # fmt: skip
    lead = base.model if first else refiner.model
    return profile_run(lead, described, latent, options, context, sample, observe=first_part)


def _check(base: Expert, refiner: Expert, latent: Mapping[str, Any]) -> None:
    if getattr(latent["samples"], "is_nested", False):
        raise UnavailableError("Ensemble Sampler takes image latents; this one holds several in one.")
    names = [type(expert.model.get_model_object("latent_format")).__name__ for expert in (base, refiner)]
    if names[0] != names[1]:
        raise SpeedLabError(
            f"Base and refiner work on different latents ({names[0]} and {names[1]}), so one cannot go on where the "
            "other stops. Use an SDXL base with the SDXL refiner, or two models of one family."
        )
    _check_channels(base.model, latent)
    for role, expert in (("base", base), ("refiner", refiner)):
        for sign in ("positive", "negative"):
            _check_width(f"{role}_{sign}", getattr(expert, sign), expert.model, role)


def _check_channels(model: Any, latent: Mapping[str, Any]) -> None:
    """An empty latent is fitted to the model; anything else has to have its channels."""
    samples = latent["samples"]
    wanted = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != wanted and bool(samples.any()):
        raise SpeedLabError(
            f"The latents have {samples.shape[1]} channels and these models take {wanted}: they belong to another "
            "model family. Encode the image with this model's VAE."
        )


def _check_width(name: str, conditioning: Any, model: Any, role: str) -> None:
    """The width of the text encoding that a model reads."""
    wanted = model.model.model_config.unet_config.get("context_dim")
    found = {int(entry[0].shape[-1]) for entry in conditioning}
    if isinstance(wanted, int) and found - {wanted}:
        raise SpeedLabError(
            f"{name} is {min(found - {wanted})} numbers wide and the {role} model reads {wanted}: it was encoded by "
            f"another text encoder. Encode it with the CLIP of the {role}'s own checkpoint."
        )


def _sigmas(model: Any, request: EnsembleRequest) -> Any:
    """A model's noise levels for all steps: the base's, which both models follow, unless the refiner is alone."""
    import comfy.samplers

    sampler = comfy.samplers.KSampler(
        model, request.steps, model.load_device, request.sampler_name, request.scheduler, 1.0, model.model_options
    )
    return sampler.sigmas


def _part(
    expert: Expert,
    latent: Mapping[str, Any],
    request: EnsembleRequest,
    sigmas: Any,
    *,
    start: int | None = None,
    last: int | None = None,
) -> dict[str, Any]:
    """The steps from `start` up to `last` of the schedule on one model; noise is added where `start` is None.

    ComfyUI cuts the part out of `sigmas`; behind it techniques find the whole schedule and count all of its steps.
    """
    import comfy.sample
    import comfy.utils
    import latent_preview
    import torch

    model = expert.model
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    if start is None:
        noise = comfy.sample.prepare_noise(samples, request.seed, latent.get("batch_index"))
    else:
        noise = torch.zeros_like(samples, device="cpu")
    result = comfy.sample.sample(
        model, noise, request.steps, request.cfg, request.sampler_name, request.scheduler,
        expert.positive, expert.negative, samples,
        disable_noise=start is not None, start_step=start, last_step=last, force_full_denoise=last is None,
        noise_mask=latent.get("noise_mask"), sigmas=sigmas.clone(),
        callback=latent_preview.prepare_callback(model, request.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=request.seed,
    )  # fmt: skip
    return {**latent, "samples": result}


def _describe(model: Any) -> dict[str, Any]:
    source = model.get_attachment(SOURCE)
    return {
        "model": type(model.model).__name__,
        "checkpoint": None if source is None else source.name,
        "accelerators": [accelerator.describe() for accelerator in accelerators(model)],
    }

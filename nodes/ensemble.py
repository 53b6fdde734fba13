"""Two models on one schedule: base, then refiner."""

from __future__ import annotations

from typing import Any

from ..speedlab.measure import node_times, report
from ..speedlab.measure.context import NodeContext
from ..speedlab.measure.kernel_profile import DETAILS
from ..speedlab.sampling.ensemble import EnsembleRequest, Expert, sample_ensemble
from ..speedlab.sampling.profiled import ProfileOptions
from ..speedlab.web import browser
from . import names


class EnsembleSampler:
    """Base and refiner as an ensemble of expert denoisers (Balaji et al., 2022; SDXL, Podell et al., 2023)."""

    NODE_ID = "SpeedLabEnsembleSampler"
    DISPLAY_NAME = "Ensemble Sampler (SpeedLab)"
    CATEGORY = "SpeedLab/sample"
    SEARCH_ALIASES = ["refiner", "base and refiner", "ksampler advanced", "timer"]
    DESCRIPTION = (
        "Denoises with the base model down to a step and with the refiner from there on, on one noise schedule: the "
        "latent of two chained KSampler (Advanced), bit for bit, and measured. Each step of the profile says which "
        "model took it."
    )
    RETURN_TYPES = ("LATENT", "SPEEDLAB_PROFILE")
    RETURN_NAMES = ("latent", "profile")
    OUTPUT_TOOLTIPS = (
        "The denoised latent.",
        "The measurements; connect Profile Report to save them.",
    )
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base_model": ("MODEL", {"tooltip": "Denoises first, with any accelerations attached."}),
                "base_positive": ("CONDITIONING", {"tooltip": "What the image shall show, by the base's encoders."}),
                "base_negative": ("CONDITIONING", {"tooltip": "What it shall not show, by the base's encoders."}),
                "refiner_model": ("MODEL", {"tooltip": "Denoises the rest, with any accelerations attached."}),
                "refiner_positive": (
                    "CONDITIONING",
                    {"tooltip": "What the image shall show, by the refiner's own text encoder."},
                ),
                "refiner_negative": (
                    "CONDITIONING",
                    {"tooltip": "What it shall not show, by the refiner's own text encoder."},
                ),
                "latent": ("LATENT", {"tooltip": "Where to start: an empty latent of the image's size."}),
                **_settings(),
            },
            "hidden": {
                "prompt": "PROMPT",
                "extra_pnginfo": "EXTRA_PNGINFO",
                "unique_id": "UNIQUE_ID",
                "dynprompt": "DYNPROMPT",
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        """A measurement is never taken from the cache. ComfyUI asks before it runs any node: watch them from here."""
        node_times.watch()
        return float("nan")

    def sample(
        self, base_model: Any, base_positive: Any, base_negative: Any, refiner_model: Any, refiner_positive: Any,
        refiner_negative: Any, latent: dict, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
        handoff: float, detail: str = "timing", prompt: object = None, extra_pnginfo: object = None,
        unique_id: object = None, dynprompt: object = None,
    ) -> dict[str, Any]:  # fmt: skip
        context = NodeContext.of(prompt, extra_pnginfo, unique_id, dynprompt)
        result = sample_ensemble(
            Expert(base_model, base_positive, base_negative),
            Expert(refiner_model, refiner_positive, refiner_negative),
            latent,
            EnsembleRequest(seed, steps, cfg, sampler_name, scheduler, handoff),
            ProfileOptions(detail),
            context,
        )
        return {
            "ui": {
                "text": [report.summary_text(result.record)],
                "speedlab": [browser.browser_summary(result.record, context)],
            },
            "result": (result.latent, result.record),
        }


def _settings() -> dict[str, Any]:
    return {
        "seed": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 0xFFFFFFFFFFFFFFFF,
                "control_after_generate": True,
                "tooltip": "The random seed of the noise: the same seed gives the same image.",
            },
        ),
        "steps": (
            "INT",
            {"default": 30, "min": 1, "max": 10000, "tooltip": "Denoising steps of both models together."},
        ),
        "cfg": (
            "FLOAT",
            {
                "default": 5.0,
                "min": 0.0,
                "max": 100.0,
                "step": 0.1,
                "round": 0.01,
                "tooltip": "How closely both models follow their prompts.",
            },
        ),
        "sampler_name": (names.samplers(), {"tooltip": "The sampling algorithm."}),
        "scheduler": (
            names.schedulers(),
            {"tooltip": "How the noise levels are spread over the steps of both models."},
        ),
        "handoff": (
            "FLOAT",
            {
                "default": 0.9,
                "min": 0.0,
                "max": 1.0,
                "step": 0.01,
                "tooltip": "The share of the steps that the base takes. 1.0: the base alone; 0.0: the refiner alone.",
            },
        ),
        "detail": (
            list(DETAILS),
            {
                "default": "timing",
                "tooltip": "timing measures every step at next to no cost. kernels also lists which GPU "
                "kernels or CPU operators two or three of the base's steps are made of; trace saves them as a file for "
                "Perfetto as well.",
            },
        ),
    }


NODES = (EnsembleSampler,)

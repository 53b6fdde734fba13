"""Samplers that measure."""

from __future__ import annotations

from ..speedlab.measure import charts, node_times, report
from ..speedlab.measure.context import NodeContext
from ..speedlab.sampling.profiled import DETAILS, ProfileOptions, SamplingRequest, profile_sampling
from ..speedlab.web import browser
from . import names

_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID", "dynprompt": "DYNPROMPT"}


class ProfileSampler:
    """KSampler with a profile of where each millisecond and megabyte went."""

    NODE_ID = "SpeedLabProfileSampler"
    DISPLAY_NAME = "Profile Sampler (SpeedLab)"
    CATEGORY = "SpeedLab/sample"
    SEARCH_ALIASES = ["ksampler", "timer", "profile", "profiler", "speed", "fps", "it/s", "nvtx", "nsight"]
    DESCRIPTION = (
        "Makes exactly the latent that KSampler makes and measures it: every step, the first evaluation, memory "
        "peaks, and with the other SpeedLab nodes loading, text encoding and decoding too. Emits NVTX ranges for "
        "Nsight. Use it in place of KSampler."
    )
    RETURN_TYPES = ("LATENT", "SPEEDLAB_PROFILE", "STRING", "IMAGE")
    RETURN_NAMES = ("latent", "profile", "summary", "chart")
    OUTPUT_TOOLTIPS = (
        "The denoised latent, bit for bit KSampler's.",
        "The measurements; connect Profile Report to save them.",
        "Speed, spread and memory in a few lines.",
        "A chart of step times and, where they were measured, one of kernels.",
    )
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that denoises, with any accelerations attached."}),
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
                    {"default": 20, "min": 1, "max": 10000, "tooltip": "How many denoising steps to take."},
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 8.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "round": 0.01,
                        "tooltip": "How closely to follow the prompt. At 1 the negative prompt is not evaluated, "
                        "which halves the work.",
                    },
                ),
                "sampler_name": (
                    names.samplers(),
                    {"tooltip": "The sampling algorithm. Some evaluate the model twice a step."},
                ),
                "scheduler": (
                    names.schedulers(),
                    {"tooltip": "How the noise levels are spread over the steps."},
                ),
                "positive": ("CONDITIONING", {"tooltip": "What the image shall show."}),
                "negative": ("CONDITIONING", {"tooltip": "What the image shall not show."}),
                "latent_image": ("LATENT", {"tooltip": "The latent to denoise: an empty one, or an image's."}),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "How much to change: 1 starts from noise, lower values keep more of the input.",
                    },
                ),
                "detail": (
                    list(DETAILS),
                    {
                        "default": "timing",
                        "tooltip": "timing measures every step at next to no cost. kernels also lists which GPU "
                        "kernels or CPU operators two or three steps are made of, and how much they compute; trace "
                        "saves those steps as a file for Perfetto as well. Both run these steps again afterwards.",
                    },
                ),
                "warmup": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 100,
                        "tooltip": "Whole runs before measuring, so that compilation and caches do not count.",
                    },
                ),
                "repeats": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 1000,
                        "tooltip": "Measured runs on the same seed: more give a median and a spread. The latent is "
                        "the first run's.",
                    },
                ),
                "nvtx": ("BOOLEAN", {"default": True, "tooltip": "Emit NVTX ranges, which Nsight Systems shows."}),
            },
            "hidden": _HIDDEN,
        }

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        """A measurement is never taken from the cache. ComfyUI asks before it runs any node: watch them from here."""
        node_times.watch()
        return float("nan")

    def sample(
        self, model: object, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
        positive: object, negative: object, latent_image: dict, denoise: float = 1.0, detail: str = "timing",
        warmup: int = 0, repeats: int = 1, nvtx: bool = True, prompt: object = None, extra_pnginfo: object = None,
        unique_id: object = None, dynprompt: object = None,
    ) -> dict:  # fmt: skip
        context = NodeContext.of(prompt, extra_pnginfo, unique_id, dynprompt)
        result = profile_sampling(
            model,
            SamplingRequest(seed, steps, cfg, sampler_name, scheduler, denoise),
            positive,
            negative,
            latent_image,
            ProfileOptions(detail, warmup, repeats, nvtx),
            context,
        )
        summary = report.summary_text(result.record)
        # Drawing takes longer than all measuring together, so it happens only where the chart is used.
        wanted = context.is_output_used(self.RETURN_NAMES.index("chart"))
        chart = charts.chart_or_blank(result.record) if wanted else charts.blank()
        return {
            "ui": {"text": [summary], "speedlab": [browser.browser_summary(result.record, context)]},
            "result": (result.latent, result.record, summary, chart),
        }


NODES = (ProfileSampler,)

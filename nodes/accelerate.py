"""Nodes that cut the work of sampling: each returns a patched clone of the model, or the very model where it is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..speedlab.common.core import core_nodes, show_on_node
from ..speedlab.measure.context import NodeContext
from ..speedlab.plans import presets
from ..speedlab.plans.plan_text import PRESETS
from ..speedlab.plans.techniques import Parts
from ..speedlab.techniques.deepcache.attach import DeepCacheConfig, attach_deepcache
from ..speedlab.techniques.forecast.attach import ForecastConfig, attach_forecast
from ..speedlab.techniques.guidance.dynamic_cfg import DynamicCFGConfig, attach_dynamic_cfg

_CATEGORY = "SpeedLab/accelerate"
_PATCHED = "A patched clone. The input model is untouched, and comes back itself where the settings change nothing."


class DeepCache:
    """Reuse deep UNet features between steps (Ma et al., CVPR 2024)."""

    NODE_ID = "SpeedLabDeepCache"
    DISPLAY_NAME = "DeepCache (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "accelerate", "feature cache", "block cache", "teacache"]
    DESCRIPTION = (
        "Runs the whole UNet on every n-th step only; on the steps between, its outermost blocks run on top of the "
        "deep features of the last full step. Lossy: check the result with Compare Images. Not for models of 1 to 8 "
        "steps. For SD 1.x, SD 2.x and the SDXL family."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = (_PATCHED,)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "An SD 1.x, SD 2.x or SDXL-family model."}),
                "cache_interval": (
                    "INT",
                    {
                        "default": 3,
                        "min": 1,
                        "max": 100,
                        "tooltip": "One full step in this many, adaptive: in at most this many; 1 is off.",
                    },
                ),
                "cache_branch_id": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 32,
                        "tooltip": "How many more blocks run on cached steps, counted from the outside in. "
                        "0 is the fastest; a higher one is closer to the original image.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Share of the steps after which caching begins.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Share of the steps after which caching ends; the rest run in full.",
                    },
                ),
                "schedule": (
                    ["uniform", "nonuniform", "adaptive"],
                    {
                        "default": "uniform",
                        "advanced": True,
                        "tooltip": "uniform: full steps at equal distances. "
                        "nonuniform: as many, but closer together around one step. "
                        "adaptive: a step is cached while the measured error stays within tolerance.",
                    },
                ),
            },
            "optional": {
                "center": (
                    "INT",
                    {
                        "default": 15,
                        "min": 0,
                        "max": 1000,
                        "advanced": True,
                        "tooltip": "nonuniform only: the step around which full steps are closest together.",
                    },
                ),
                "power": (
                    "FLOAT",
                    {
                        "default": 1.4,
                        "min": 1.0,
                        "max": 10.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "nonuniform only: how strongly full steps gather around the center.",
                    },
                ),
                "features": (
                    ["copy", "extrapolate"],
                    {
                        "default": "copy",
                        "tooltip": "copy: deep features of the last full step. extrapolate: a line through those of "
                        "the last two, where that was closer at the last full step.",
                    },
                ),
                "tolerance": (
                    "FLOAT",
                    {
                        "default": 0.02,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.005,
                        "tooltip": "adaptive only: how much of the latent the steps cached in a row may get wrong. "
                        "0.05 is faster; 0 is off.",
                    },
                ),
            },
        }

    def apply(
        self,
        model: Any,
        cache_interval: int,
        cache_branch_id: int,
        start_percent: float,
        end_percent: float,
        schedule: Any,
        center: int = 15,
        power: float = 1.4,
        features: Any = "copy",
        tolerance: float = 0.02,
    ) -> tuple[Any]:
        config = DeepCacheConfig(
            interval=cache_interval,
            branch=cache_branch_id,
            start=start_percent,
            end=end_percent,
            schedule=schedule,
            center=center,
            power=power,
            features=features,
            tolerance=tolerance,
        )
        return (attach_deepcache(model, config),)


class DynamicCFG:
    """Leave out the unconditional prediction late in the run (Adaptive Guidance, Castillo et al., 2023)."""

    NODE_ID = "SpeedLabDynamicCFG"
    DISPLAY_NAME = "Dynamic CFG (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "accelerate", "adaptive guidance", "skip cfg", "guidance interval"]
    DESCRIPTION = (
        "Turns the negative prompt's half of each evaluation off for the last steps, where it changes the image "
        "least, or outside a window, or in every second step. Works together with DeepCache and Forecast. Where a "
        "sampler or another node needs that half, it stays on and the record says why. For SD 1.x, SD 2.x and the SDXL "
        "family."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = (_PATCHED,)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "An SD 1.x, SD 2.x or SDXL-family model."}),
                "mode": (
                    ["fixed", "adaptive"],
                    {
                        "default": "fixed",
                        "tooltip": "fixed: off after a share of the steps. "
                        "adaptive: off for the rest of the run once both predictions agree.",
                    },
                ),
                "stop_at": (
                    "FLOAT",
                    {
                        "default": 0.75,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "fixed only: share of the steps that keep the negative prompt; 1.0 is off.",
                    },
                ),
                "similarity": (
                    "FLOAT",
                    {
                        "default": 0.99,
                        "min": -1.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": "adaptive only: cosine similarity of both predictions above which they agree; "
                        "1.0 is off.",
                    },
                ),
            },
            "optional": {
                "start_at": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Share of the steps before which there is no guidance. Above 0 the composition "
                        "changes.",
                    },
                ),
                "sigma_low": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1000.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "No guidance in steps that begin at this sigma or below; 0 is no limit. 0.28 is a "
                        "known value for SDXL.",
                    },
                ),
                "sigma_high": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1000.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "No guidance in steps that begin above this sigma; 0 is no limit. 5.42 is a known "
                        "value for SDXL; it changes the composition.",
                    },
                ),
                "uncond_interval": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 10,
                        "advanced": True,
                        "tooltip": "Inside the guided steps the negative prompt is evaluated every so many steps; in "
                        "between its last difference to the prompt stands for it. 1 is every step.",
                    },
                ),
                "uncond_from": (
                    "FLOAT",
                    {
                        "default": 0.25,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Share of the steps from which uncond_interval counts.",
                    },
                ),
            },
        }

    def apply(self, model: Any, mode: Any, stop_at: float, similarity: float, **window: Any) -> tuple[Any]:
        return (attach_dynamic_cfg(model, DynamicCFGConfig(mode, stop_at, similarity, **window)),)


class Forecast:
    """Continue the denoised latent over some steps in place of evaluating the model."""

    NODE_ID = "SpeedLabForecast"
    DISPLAY_NAME = "Forecast (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "accelerate", "skip steps", "easycache", "teacache", "taylorseer"]
    DESCRIPTION = (
        "Leaves out whole steps of the model: their denoised latent is continued from the steps before, and the "
        "sampler goes on with that. Lossy: check the result with Compare Images. Does nothing at 9 steps and fewer. "
        "For any model that ComfyUI samples with a CFG guider, compiled or not; works together with Dynamic CFG."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = (_PATCHED,)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A diffusion model of any kind."}),
                "mode": (
                    ["fixed", "adaptive"],
                    {
                        "default": "adaptive",
                        "tooltip": "adaptive: a step is left out while the measured error stays within tolerance. "
                        "fixed: always the same steps, 9 of 20.",
                    },
                ),
                "tolerance": (
                    "FLOAT",
                    {
                        "default": 0.02,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.005,
                        "tooltip": "adaptive only: how much of the latent the steps left out in a row may get wrong. "
                        "0.05 is faster; 0 is off.",
                    },
                ),
                "max_skip": (
                    "INT",
                    {
                        "default": 3,
                        "min": 0,
                        "max": 10,
                        "tooltip": "The most steps left out in a row (fixed: never more than 2); 0 is off.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Share of the steps before which none is left out.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Share of the steps after which none is left out any more.",
                    },
                ),
            },
        }

    def apply(
        self, model: Any, mode: Any, tolerance: float, max_skip: int, start_percent: float, end_percent: float
    ) -> tuple[Any]:
        config = ForecastConfig(mode=mode, tolerance=tolerance, max_skip=max_skip, start=start_percent, end=end_percent)
        return (attach_forecast(model, config),)


class Accelerate:
    """A whole plan in one node."""

    NODE_ID = "SpeedLabAccelerate"
    # The nodes that plans are made of, by id: set where they are all known.
    pack_nodes: Mapping[str, type] = {}
    DISPLAY_NAME = "Accelerate (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "preset", "plan", "all in one", "optimize", "vram"]
    ESSENTIALS_CATEGORY = "Image Generation"
    DESCRIPTION = (
        "Puts a whole plan on the model: what Attention Backend, Precision, Forecast, DeepCache, Dynamic CFG, Tiny VAE "
        "Decode, Memory Plan and Compile Model do one behind the other, and nothing else. With clip and vae connected "
        "it places memory and decoder too. For SD 1.x, SD 2.x and the SDXL family."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "plan")
    OUTPUT_TOOLTIPS = (
        "The model with the plan on it. The input model is untouched.",
        "The text encoder under the plan; nothing where none was connected.",
        "A VAE that decodes as the plan says, in ComfyUI's VAE Decode too; nothing where none was connected.",
        "The plan line that was applied, as Benchmark's plan and custom take it.",
    )
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        lines = " ".join(f"{name}: {line}." for name, line in PRESETS.items())
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "An SD 1.x, SD 2.x or SDXL-family model."}),
                "preset": (
                    list(presets.CHOICES),
                    {
                        "default": "balanced",
                        "tooltip": f"{lines} tuned: what Tune found here for this model, size and sampler. "
                        "custom: the line in custom. With clip and vae, the first three place memory too.",
                    },
                ),
            },
            "optional": {
                "custom": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "For the preset custom: a plan line, such as "
                        "attention(sdpa)+deepcache(3)+dynamic_cfg(0.75)+tiny.",
                    },
                ),
                "compile": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Compile the UNet too, with the backend that was fastest when measured and runs "
                        "here. The first image takes longer.",
                    },
                ),
                "clip": ("CLIP", {"tooltip": "The text encoder, to be part of the memory plan."}),
                "vae": ("VAE", {"tooltip": "The VAE, for the plan's decoder and memory plan."}),
            },
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, preset: str = "", unique_id: Any = None, **_: Any) -> Any:
        """A plan that Tune found since is another one, and so is that for another size or sampler."""
        return presets.changed(preset, unique_id)

    def apply(
        self, model: Any, preset: str, custom: str = "", compile: bool = False, clip: Any = None, vae: Any = None,
        prompt: Any = None, unique_id: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        nodes = {**core_nodes().NODE_CLASS_MAPPINGS, **self.pack_nodes}
        done = presets.accelerate(
            Parts(model, clip, vae), preset, custom, compile, nodes, NodeContext.of(prompt, None, unique_id)
        )
        parts = done.parts
        show_on_node(done.text, unique_id)
        return {"ui": {"text": [done.text]}, "result": (parts.model, parts.clip, parts.vae, done.line)}


NODES = (DeepCache, DynamicCFG, Forecast, Accelerate)

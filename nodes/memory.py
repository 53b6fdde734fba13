"""Nodes that decide what lies in the device's memory, and when."""

from __future__ import annotations

from typing import Any

from ..speedlab.memory.plan import CHOICES, MemoryPlanConfig, plan_memory

_CATEGORY = "SpeedLab/memory"


class MemoryPlan:
    """Fit text encoders, UNet and VAE into a memory budget."""

    NODE_ID = "SpeedLabMemoryPlan"
    DISPLAY_NAME = "Memory Plan (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["vram", "low vram", "offload", "out of memory", "oom"]
    DESCRIPTION = (
        "Fits a model into the memory that you have. It predicts the peak of text encoding, sampling and decoding, "
        "picks the fastest way of offloading that fits, and reports the prediction. Images stay the same, bit for bit. "
        "It acts on the models that you connect and on nothing else."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "plan")
    OUTPUT_TOOLTIPS = (
        "The model under the plan. The input model is untouched, and comes back itself where offload is none.",
        "The text encoder under the plan; nothing where none was connected.",
        "The VAE under the plan; nothing where none was connected.",
        "The plan in words and numbers: predicted memory of each phase, and of the other plans.",
    )
    FUNCTION = "plan"
    # A plan taken from the cache holds still: newer ComfyUI tells it again.
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model."}),
                "offload": (
                    list(CHOICES),
                    {
                        "default": "auto",
                        "tooltip": "auto: the fastest that fits. none: keep all on the device. model: text encoders, "
                        "UNet and VAE take turns. sequential: stream the weights layer by layer; least memory, slower.",
                    },
                ),
                "budget_gb": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1024.0,
                        "step": 0.1,
                        "tooltip": "How much the run may take, in GB of 10^9 bytes, weights, activations and decoding "
                        "together. 0: what is free.",
                    },
                ),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoder, to be part of the plan."}),
                "vae": ("VAE", {"tooltip": "The VAE, to be part of the plan. Leave it out with Tiny VAE Decode."}),
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "Tells size and batch to predict for; without it: one image of the size that the "
                        "model was made for."
                    },
                ),
            },
        }

    def plan(
        self,
        model: Any,
        offload: Any,
        budget_gb: float,
        clip: Any | None = None,
        vae: Any | None = None,
        latent: Any | None = None,
    ) -> dict[str, Any]:
        planned = plan_memory(model, clip, vae, MemoryPlanConfig(offload, budget_gb), latent)
        return {"ui": {"text": [planned.text]}, "result": (planned.model, planned.clip, planned.vae, planned.text)}


NODES = (MemoryPlan,)

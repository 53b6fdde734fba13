"""Loaders: checkpoint, LoRA stack, VAE."""

from __future__ import annotations

import folder_paths

from ..speedlab.common.core import compute_device, core_nodes
from ..speedlab.common.dtypes import CHECKPOINT_PRECISIONS, VAE_PRECISIONS
from ..speedlab.measure.timeline import phase
from ..speedlab.models import loading, lora

_NO_LORA = "None"
_LORA_SLOTS = 4


class CheckpointLoader:
    """Load a checkpoint and report what it is and how fast it loaded."""

    NODE_ID = "SpeedLabCheckpointLoader"
    DISPLAY_NAME = "Load Checkpoint (SpeedLab)"
    CATEGORY = "SpeedLab/load"
    SEARCH_ALIASES = ["load model", "ckpt", "quantize", "quantization", "fp8", "fp16", "bf16", "half precision"]
    DESCRIPTION = (
        "Loads a Stable Diffusion 1.x, 2.x or SDXL checkpoint, in the precision you choose, and reports its family, "
        "size and loading speed. The load time appears in the profile."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "info")
    OUTPUT_TOOLTIPS = (
        "The diffusion model (UNet).",
        "The text encoder.",
        "The VAE, which turns latents into images.",
        "What was loaded: format, size, family, precision of each part, load time and speed.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "ckpt_name": (
                    folder_paths.get_filename_list("checkpoints"),
                    {"tooltip": "A file in models/checkpoints."},
                ),
                "precision": (
                    list(CHECKPOINT_PRECISIONS),
                    {
                        "default": "auto",
                        "tooltip": "How the UNet's weights are kept: auto lets ComfyUI choose; fp16 and bf16 halve "
                        "the memory of fp32; fp8 halves it again and computes in a wider type. fp32 also holds for "
                        "text encoder and VAE.",
                    },
                ),
                "memory_format": (
                    ["contiguous", "channels_last"],
                    {
                        "default": "contiguous",
                        "advanced": True,
                        "tooltip": "channels_last can speed up the convolutions of SD 1.x on recent GPUs; measure it.",
                    },
                ),
            }
        }

    def load(self, ckpt_name: str, precision: str, memory_format: str) -> tuple:
        with phase("load", compute_device()) as info:
            loaded = loading.load_checkpoint(ckpt_name, precision, memory_format)
            info["file"] = ckpt_name
        return loaded.model, loaded.clip, loaded.vae, loading.describe_checkpoint(loaded)


class LoraStack:
    """Up to four LoRAs in order."""

    NODE_ID = "SpeedLabLoraStack"
    DISPLAY_NAME = "Load LoRA Stack (SpeedLab)"
    CATEGORY = "SpeedLab/load"
    ESSENTIALS_CATEGORY = "Image Generation"
    SEARCH_ALIASES = ["lora", "load lora", "apply lora", "multi lora"]
    DESCRIPTION = (
        "Applies up to four LoRAs one after the other, each with its own strength on UNet and text encoder: the same "
        "result as a chain of Load LoRA nodes. Says when a LoRA does not fit the model."
    )
    RETURN_TYPES = ("MODEL", "CLIP")
    RETURN_NAMES = ("model", "clip")
    OUTPUT_TOOLTIPS = ("The model with the LoRAs.", "The text encoder with the LoRAs.")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        files = [_NO_LORA, *folder_paths.get_filename_list("loras")]
        required: dict = {
            "model": ("MODEL", {"tooltip": "The model to patch; the one given stays as it is."}),
            "clip": ("CLIP", {"tooltip": "The text encoder to patch; the one given stays as it is."}),
        }
        for slot in range(1, _LORA_SLOTS + 1):
            required[f"lora_{slot}"] = (
                files,
                {"default": _NO_LORA, "tooltip": f"LoRA number {slot} in models/loras, or None to leave it out."},
            )
        for slot in range(1, _LORA_SLOTS + 1):
            required[f"strength_{slot}"] = (
                "FLOAT",
                {
                    "default": 1.0,
                    "min": -100.0,
                    "max": 100.0,
                    "step": 0.01,
                    "tooltip": f"How strongly LoRA number {slot} acts; 0 leaves it out, negative values invert it.",
                },
            )
        return {"required": required}

    def apply(self, model: object, clip: object, **slots: object) -> tuple:
        choices = [
            lora.LoraChoice(str(slots[f"lora_{n}"]), float(slots[f"strength_{n}"]))  # type: ignore[arg-type]
            for n in range(1, _LORA_SLOTS + 1)
            if slots.get(f"lora_{n}", _NO_LORA) != _NO_LORA
        ]
        if not any(choice.strength for choice in choices):
            return model, clip
        with phase("load", compute_device()) as info:
            model, clip, matches = lora.apply_stack(model, clip, choices)
            info["loras"] = [f"{m.name}: {m.matched} of {m.total}" for m in matches]
        return model, clip


class VAELoader:
    """Load a VAE in a chosen precision."""

    NODE_ID = "SpeedLabVAELoader"
    DISPLAY_NAME = "Load VAE (SpeedLab)"
    CATEGORY = "SpeedLab/load"
    SEARCH_ALIASES = ["vae loader", "fp16 vae", "sdxl vae fix"]
    DESCRIPTION = "Loads a VAE from models/vae in the precision you choose, for instance the SDXL VAE FP16 fix in fp16."
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "vae_name": (
                    core_nodes().VAELoader.INPUT_TYPES()["required"]["vae_name"][0],
                    {"tooltip": "A file in models/vae, or a tiny VAE pair in models/vae_approx."},
                ),
                "precision": (
                    list(VAE_PRECISIONS),
                    {
                        "default": "auto",
                        "tooltip": "auto lets ComfyUI choose. fp16 is fastest but needs a VAE made for it (SDXL's own "
                        "VAE turns black); fp32 always works.",
                    },
                ),
            }
        }

    def load(self, vae_name: str, precision: str) -> tuple:
        with phase("load", compute_device()) as info:
            vae = loading.load_vae(vae_name, precision)
            info["file"] = vae_name
        return (vae,)


NODES = (CheckpointLoader, LoraStack, VAELoader)

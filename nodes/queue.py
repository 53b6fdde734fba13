"""Staged batches: encode all prompts, free, sample all, free, decode all."""

from __future__ import annotations

from ..speedlab.common.core import compute_device
from ..speedlab.measure.timeline import phase
from ..speedlab.memory import free
from ..speedlab.sampling import prompt_queue
from . import names


class PromptQueue:
    """Encode many prompts as one list."""

    NODE_ID = "SpeedLabPromptQueue"
    DISPLAY_NAME = "Prompt Queue (SpeedLab)"
    CATEGORY = "SpeedLab/memory"
    SEARCH_ALIASES = ["prompt list", "prompt batch", "many prompts", "staged batch"]
    DESCRIPTION = (
        "Encodes many prompts at once and returns them as a list: every node after it runs once a prompt. All "
        "prompts are encoded before the first image is sampled, so the text encoders can be freed in between."
    )
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "INT", "INT")
    RETURN_NAMES = ("positive", "negative", "seed", "count")
    OUTPUT_IS_LIST = (True, True, True, False)
    OUTPUT_TOOLTIPS = (
        "A list: each prompt as the model reads it.",
        "A list: the negative prompt of each.",
        "A list: the seed of each. Connect it to the sampler's seed.",
        "How many prompts there are.",
    )
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoder of the checkpoint."}),
                "prompts": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "One prompt on each line; empty lines do not count.",
                    },
                ),
                "negative": (
                    "STRING",
                    {
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "One negative prompt for all. Left blank it is zeroed conditioning, as "
                        "ConditioningZeroOut makes it, not an empty text.",
                    },
                ),
                "seeds": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "0",
                        "tooltip": "One seed for all prompts, or one on each line in the order of the prompts.",
                    },
                ),
            }
        }

    def encode(self, clip: object, prompts: str, negative: str, seeds: str) -> tuple:
        encoded = prompt_queue.encode_queue(clip, prompt_queue.read_queue(prompts, negative, seeds))
        return encoded.positive, encoded.negative, encoded.seeds, len(encoded.seeds)


class FreeMemory:
    """Unload one kind of model while a value passes through."""

    NODE_ID = "SpeedLabFreeMemory"
    DISPLAY_NAME = "Free Memory (SpeedLab)"
    CATEGORY = "SpeedLab/memory"
    SEARCH_ALIASES = ["vram", "free vram", "unload model", "purge vram", "clear vram"]
    DESCRIPTION = (
        "Passes a value on and, before the next node gets it, unloads the text encoders, the diffusion model or the "
        "VAE. With a list it waits for the whole list and frees once. Everything else stays loaded."
    )
    INPUT_IS_LIST = True
    RETURN_TYPES = (names.ANY,)
    RETURN_NAMES = ("value",)
    OUTPUT_IS_LIST = (True,)
    OUTPUT_TOOLTIPS = ("The value, unchanged; a list stays a list.",)
    FUNCTION = "free"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "value": (
                    names.ANY,
                    {"tooltip": "Anything: conditioning that was encoded, or latents that were sampled."},
                ),
                "what": (
                    list(free.WHAT),
                    {
                        "default": "text_encoders",
                        "tooltip": "Which models to unload; all unloads ControlNets and the rest too.",
                    },
                ),
            },
            "optional": {
                "wait_for": (
                    names.ANY,
                    {"tooltip": "Something else that must be ready before, such as the negative prompt."},
                ),
            },
        }

    def free(self, value: list, what: list, wait_for: list | None = None) -> dict:
        with phase("free", compute_device(), shared_by=len(value)):
            freed = free.free_models(what[0])
        text = free.describe(what[0], freed)
        free.log.info("SpeedLab: %s", text)
        return {"ui": {"text": [text]}, "result": (value,)}


NODES = (PromptQueue, FreeMemory)

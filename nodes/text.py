"""Text encoding."""

from __future__ import annotations

from ..speedlab.measure.timeline import phase
from ..speedlab.models import text as conditioning


class TextEncode:
    """Encode a prompt; the time appears in the profile."""

    NODE_ID = "SpeedLabTextEncode"
    DISPLAY_NAME = "Text Encode (SpeedLab)"
    CATEGORY = "SpeedLab/load"
    ESSENTIALS_CATEGORY = "Image Generation"
    SEARCH_ALIASES = ["prompt", "clip text encode", "positive prompt", "negative prompt"]
    DESCRIPTION = "Encodes a prompt exactly as CLIP Text Encode does and notes the time for the profile."
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The prompt as the model reads it.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoder of the checkpoint."}),
                "text": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "What the image shows. An empty text is allowed.",
                    },
                ),
            }
        }

    def encode(self, clip: object, text: str) -> tuple:
        conditioning.require_clip(clip)
        with phase("text_encode", conditioning.device_of(clip)):
            return (conditioning.encode(clip, text),)


NODES = (TextEncode,)

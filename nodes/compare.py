"""Compare two images or two latents."""

from __future__ import annotations

from ..speedlab.measure import compare
from ..speedlab.measure.context import NodeContext

_HIDDEN = {"extra_pnginfo": "EXTRA_PNGINFO"}


def _said(report: str, extra_pnginfo: object) -> dict:
    """The report, and the workflow whose node shows it, of those that a browser has open."""
    return {"text": [report], "speedlab_workflow": [NodeContext.of(None, extra_pnginfo, None).workflow_id()]}


class CompareImages:
    """PSNR, SSIM and difference of two images."""

    NODE_ID = "SpeedLabCompareImages"
    DISPLAY_NAME = "Compare Images (SpeedLab)"
    CATEGORY = "SpeedLab/compare"
    SEARCH_ALIASES = ["psnr", "ssim", "image difference", "image quality"]
    DESCRIPTION = "Measures how far image A is from image B, in decibels (PSNR) and structure (SSIM), and shows where."
    RETURN_TYPES = ("FLOAT", "FLOAT", "IMAGE", "STRING")
    RETURN_NAMES = ("psnr", "ssim", "diff", "report")
    OUTPUT_TOOLTIPS = (
        "Peak signal-to-noise ratio in dB: 40 and more is invisible, 30 close, infinite means identical.",
        "Structural similarity: 1 means identical.",
        "The absolute difference, brightened to the full range.",
        "The numbers in words.",
    )
    FUNCTION = "compare"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "image_a": ("IMAGE", {"tooltip": "The image to judge."}),
                "image_b": ("IMAGE", {"tooltip": "The reference, of the same size."}),
            },
            "hidden": _HIDDEN,
        }

    def compare(self, image_a: object, image_b: object, extra_pnginfo: object = None) -> dict:
        result = compare.compare_images(image_a, image_b)
        return {
            "ui": _said(result.report, extra_pnginfo),
            "result": (result.psnr, result.ssim, result.diff, result.report),
        }


class CompareLatents:
    """Relative and largest error of two latents."""

    NODE_ID = "SpeedLabCompareLatents"
    DISPLAY_NAME = "Compare Latents (SpeedLab)"
    CATEGORY = "SpeedLab/compare"
    SEARCH_ALIASES = ["latent difference", "relative error"]
    DESCRIPTION = "Measures how far latent A is from latent B before any decoding: 0 means bit for bit the same values."
    RETURN_TYPES = ("FLOAT", "FLOAT", "STRING")
    RETURN_NAMES = ("relative_error", "max_abs", "report")
    OUTPUT_TOOLTIPS = (
        "Norm of the difference over the norm of B.",
        "The largest absolute difference.",
        "The numbers in words.",
    )
    FUNCTION = "compare"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "samples_a": ("LATENT", {"tooltip": "The latent to judge."}),
                "samples_b": ("LATENT", {"tooltip": "The reference, of the same shape."}),
            },
            "hidden": _HIDDEN,
        }

    def compare(self, samples_a: dict, samples_b: dict, extra_pnginfo: object = None) -> dict:
        result = compare.compare_latents(samples_a["samples"], samples_b["samples"])
        return {
            "ui": _said(result.report, extra_pnginfo),
            "result": (result.relative_error, result.max_abs, result.report),
        }


NODES = (CompareImages, CompareLatents)

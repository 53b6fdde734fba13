"""Decoders: the full VAE and the tiny ones."""

from __future__ import annotations

from ..speedlab.common.dtypes import VAE_PRECISIONS
from ..speedlab.measure.timeline import phase
from ..speedlab.models.latent_mark import mark_of
from ..speedlab.vae import decode as decoding
from ..speedlab.vae import taesd


def _run_of(samples: dict) -> str | None:
    """The profiled run that made these very latents, if one did."""
    mark = mark_of(samples)
    return mark.run_id if mark is not None else None


class VAEDecode:
    """Full VAE decode, checked for non-finite results."""

    NODE_ID = "SpeedLabVAEDecode"
    DISPLAY_NAME = "VAE Decode (SpeedLab)"
    CATEGORY = "SpeedLab/decode"
    SEARCH_ALIASES = ["latent to image", "tiled decode", "low vram"]
    DESCRIPTION = (
        "Turns latents into images as VAE Decode does, one at a time or in tiles if you like. What does not fit "
        "into memory is decoded again in smaller pieces; black images from half precision in a safer precision."
    )
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The images.",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latents to decode."}),
                "vae": ("VAE", {"tooltip": "The VAE of the checkpoint, or a separate one."}),
                "slicing": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Decode a batch one image at a time: the memory of one image."},
                ),
                "tile_size": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 8192,
                        "step": 64,
                        "tooltip": "Decode in tiles of this many pixels, for large images on small GPUs; 0 decodes "
                        "whole images.",
                    },
                ),
                "overlap": (
                    "INT",
                    {
                        "default": 64,
                        "min": 0,
                        "max": 4096,
                        "step": 32,
                        "advanced": True,
                        "tooltip": "How many pixels neighbouring tiles share, at most a quarter tile; more hides "
                        "the seams better.",
                    },
                ),
                "precision": (
                    list(VAE_PRECISIONS),
                    {
                        "default": "auto",
                        "tooltip": "auto is fp16 on GPUs that are fast in it, unless you chose another in the loader, "
                        "else the VAE's own; and a safer one after NaN or Inf. The report says which it was.",
                    },
                ),
            }
        }

    def decode(self, samples: dict, vae: object, slicing: bool, tile_size: int, overlap: int, precision: str) -> tuple:
        decoding.require_vae(vae)
        config = decoding.DecodeConfig(slicing, tile_size, overlap, precision)
        run_id = _run_of(samples)
        with phase("decode", vae.device) as info:  # type: ignore[attr-defined]
            decoded = decoding.decode(vae, samples, config)
            info.update(decoded.info, run_id=run_id)
        return (decoded.images,)


class TinyVAEDecode:
    """Fast, small decode with TAESD."""

    NODE_ID = "SpeedLabTinyVAEDecode"
    DISPLAY_NAME = "Tiny VAE Decode (SpeedLab)"
    CATEGORY = "SpeedLab/decode"
    SEARCH_ALIASES = ["taesd", "taesdxl", "tiny autoencoder", "fast decode", "fast vae", "vram"]
    DESCRIPTION = (
        "Turns latents into images with a tiny VAE (TAESD): more than ten times faster and with a fraction of the "
        "memory at any image size, at the price of some fine detail. Needs taesd_decoder or taesdxl_decoder in "
        "models/vae_approx."
    )
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The images.",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latents to decode."}),
                "decoder": (
                    taesd.decoder_choices(),
                    {
                        "default": "auto",
                        "tooltip": "taesd is for SD 1.x and 2.x, taesdxl for SDXL. auto asks the model, or the latent "
                        "if a SpeedLab sampler made it.",
                    },
                ),
                "slice_size": (
                    "INT",
                    {
                        "default": 1,
                        "min": 0,
                        "max": 4096,
                        "advanced": True,
                        "tooltip": "How many images of a batch to decode at once; 0 decodes all of them.",
                    },
                ),
                "tile_size": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 16384,
                        "step": 64,
                        "advanced": True,
                        "tooltip": "How much to decode at once: as many pixels as a square of this size, in bands "
                        "without seams; 0 chooses what is fast. The image is the same.",
                    },
                ),
            },
            "optional": {
                "model": ("MODEL", {"tooltip": "Tells auto which latents these are; nothing is computed with it."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, decoder: str) -> bool:
        """A decoder that is not installed is an error when the node runs, with the remedy; the workflow stays valid."""
        return True

    def decode(self, samples: dict, decoder: str, slice_size: int, tile_size: int, model: object = None) -> tuple:
        config = taesd.TinyDecodeConfig(decoder, slice_size, tile_size)
        run_id = _run_of(samples)
        with phase("decode", taesd.decode_device()) as info:
            decoded = taesd.decode_tiny(samples, config, model)
            info.update(decoded.info, run_id=run_id)
        return (decoded.images,)


NODES = (VAEDecode, TinyVAEDecode)

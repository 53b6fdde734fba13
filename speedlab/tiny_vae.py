"""Tiny VAE (TAESD, madebyollin) decode: about one per cent of the full decoder's work, a small loss of detail.

Core lends a tiny VAE the full VAE's memory estimate and then evicts the UNet to make room for a network of a million
parameters; here it has an estimate of its own. Tiles carry a halo as wide as the decoder sees, so that a tiled
picture has no seams to hide.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .decoding import Decoded, check_latent, is_finite, report_bad_latents
from .errors import ModelFileError, SpeedLabError
from .loading import readable, refuse_unsafe

log = logging.getLogger(__name__)

LATENT_MARK = "speedlab"
KNOWN_STEMS = ("taesd", "taesdxl")
# The latent format of each decoder's family, by core's class names: its scale and shift are the decoder's.
_FORMATS = {"taesd": "SD15", "taesdxl": "SDXL", "taesd3": "SD3", "taef1": "Flux"}
_DECODER_FILE = re.compile(r"(?P<stem>[\w.-]+)_decoder\.(safetensors|sft|pth|pt|ckpt|bin)")
# 64 channels at full size, counted in buffers: convolution input, output, residual and the activation between.
_VALUES_PER_PIXEL = 64 * 4.4
_UPSCALE = 8
# Latent pixels that one output pixel depends on to each side: 10 convolutions at 1x, at 2x and at 4x, 5 at 8x.
_HALO = 20


@dataclass(frozen=True)
class TinyDecodeConfig:
    """`slice_size` pictures at a time (0: all); tiles of `tile_size` pixels (0: whole pictures)."""

    decoder: str = "auto"
    slice_size: int = 1
    tile_size: int = 0


def decoder_choices() -> list[str]:
    """`auto`, the two that are always listed, then what else lies in models/vae_approx."""
    found = [stem for stem in decoder_files() if stem not in KNOWN_STEMS]
    return ["auto", *KNOWN_STEMS, *sorted(found)]


def decoder_files() -> dict[str, str]:
    """Stem to file name for every tiny decoder in models/vae_approx."""
    import folder_paths

    matches = ((_DECODER_FILE.fullmatch(name), name) for name in folder_paths.get_filename_list("vae_approx"))
    return {match["stem"]: name for match, name in matches if match}


def decode_tiny(latent: Mapping[str, Any], config: TinyDecodeConfig, model: Any | None = None) -> Decoded:
    """Decode a LATENT [B, C, H/8, W/8] with a tiny decoder to pictures [B, H, W, 3] in 0..1.

    Raises SpeedLabError when `auto` cannot tell the latent's family, ModelFileError for a missing or broken file.
    """
    import torch

    samples = latent["samples"]
    stem = resolve_decoder(config.decoder, latent, model)
    vae = load_tiny_vae(stem, _latent_format(latent, model))
    check_latent(vae, samples)
    size = config.slice_size or samples.shape[0]
    parts = [samples[start : start + size] for start in range(0, samples.shape[0], size)]
    tiles = [_tile_boxes(part, config.tile_size) for part in parts]
    progress = _progress(sum(len(boxes) for boxes in tiles))
    images = torch.cat([_decode_part(vae, part, boxes, progress) for part, boxes in zip(parts, tiles, strict=True)])
    info: dict[str, Any] = {"decoder": stem, "slice_size": config.slice_size, "tile_size": config.tile_size}
    # The decoder squashes its input, so Inf in the latents can come out as finite pixels.
    if not is_finite(samples) or not is_finite(images):
        info["warning"] = report_bad_latents()
    return Decoded(images, info)


def resolve_decoder(decoder: str, latent: Mapping[str, Any], model: Any | None) -> str:
    """The stem to use: the one chosen, else the one of the latent's family. Raises SpeedLabError if that is unknown."""
    if decoder != "auto":
        return decoder
    latent_format = _latent_format(latent, model)
    if latent_format is None:
        raise SpeedLabError(
            "Tiny VAE Decode cannot tell an SD 1.x latent from an SDXL one. Connect the model, or choose taesd "
            "(SD 1.x, 2.x) or taesdxl (SDXL) as decoder."
        )
    name = getattr(latent_format, "taesd_decoder_name", None)
    if not name:
        raise SpeedLabError(
            f"There is no tiny decoder for latents of the format {type(latent_format).__name__}. Use VAE Decode."
        )
    return str(name).removesuffix("_decoder")


def decode_device() -> Any:
    """The device that decoding runs on."""
    import comfy.model_management as mm

    return mm.vae_device()


def latent_mark(model: Any) -> dict[str, str]:
    """What this pack's samplers leave in a LATENT, so that a later decode knows its family."""
    return {"latent_format": type(model.get_model_object("latent_format")).__name__}


def run_of(latent: Mapping[str, Any]) -> str | None:
    """The id of the profiled run that made a LATENT, if one did."""
    mark = latent.get(LATENT_MARK)
    run_id = mark.get("run_id") if isinstance(mark, Mapping) else None
    return run_id if isinstance(run_id, str) else None


def load_tiny_vae(stem: str, latent_format: Any | None = None) -> Any:
    """The tiny decoder as a core VAE with its own memory estimate. Raises ModelFileError if it is not there."""
    import folder_paths

    name = decoder_files().get(stem)
    if name is None:
        raise ModelFileError(
            f"The tiny decoder '{stem}' is not installed. Put {stem}_decoder.safetensors (by madebyollin) into "
            "models/vae_approx, or use VAE Decode."
        )
    path = Path(folder_paths.get_full_path_or_raise("vae_approx", name))
    scale, shift = _scale_and_shift(stem, latent_format)
    return _load(path, path.stat().st_mtime_ns, scale, shift)


@lru_cache(maxsize=4)
def _load(path: Path, mtime_ns: int, scale: float, shift: float) -> Any:
    import comfy.sd
    import comfy.taesd.taesd
    import comfy.utils
    import torch

    refuse_unsafe(path)
    with readable(path, "tiny decoder"):
        weights = comfy.utils.load_torch_file(str(path), safe_load=True)
        first = weights.get("1.weight")
        if first is None or first.ndim != 4:
            raise ModelFileError(f"{path.name} is not a TAESD decoder: its first convolution is missing.")
        # Core builds encoder and decoder together; this node only decodes, so the encoder stays zero.
        whole = comfy.taesd.taesd.TAESD(latent_channels=first.shape[1]).state_dict()
        state = {key: torch.zeros_like(value) for key, value in whole.items() if key.startswith("taesd_encoder.")}
        state.update({f"taesd_decoder.{key}": value for key, value in weights.items()})
        state.update(vae_scale=torch.tensor(scale), vae_shift=torch.tensor(shift))
        vae = comfy.sd.VAE(sd=state)
    vae.memory_used_decode = memory_used_decode
    return vae


def memory_used_decode(shape: Any, dtype: Any) -> float:
    """Bytes that decoding latents of `shape` [B, C, h, w] takes at its peak."""
    import comfy.model_management as mm

    return float(shape[0] * _VALUES_PER_PIXEL * shape[2] * shape[3] * _UPSCALE**2 * mm.dtype_size(dtype))


def _scale_and_shift(stem: str, latent_format: Any | None) -> tuple[float, float]:
    import comfy.latent_formats

    known = getattr(comfy.latent_formats, _FORMATS.get(stem, ""), None)
    chosen = known() if known is not None else latent_format
    if chosen is None:
        raise SpeedLabError(
            f"The latent scale of the decoder '{stem}' is unknown. Connect the model that made the latent."
        )
    return float(chosen.scale_factor), float(getattr(chosen, "shift_factor", 0.0))


def _latent_format(latent: Mapping[str, Any], model: Any | None) -> Any | None:
    import comfy.latent_formats

    if model is not None:
        return model.get_model_object("latent_format")
    mark = latent.get(LATENT_MARK)
    name = mark.get("latent_format", "") if isinstance(mark, Mapping) else ""
    known = getattr(comfy.latent_formats, str(name), None)
    return known() if isinstance(known, type) else None


def _tile_boxes(part: Any, tile_size: int) -> list[tuple[int, int, int, int]]:
    """Boxes (top, bottom, left, right) in latent pixels that cover the part; one box when not tiled."""
    height, width = part.shape[-2:]
    if tile_size <= 0:
        return [(0, height, 0, width)]
    tile = max(tile_size // _UPSCALE, 1)
    return [
        (top, min(top + tile, height), left, min(left + tile, width))
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]


def _decode_part(vae: Any, part: Any, boxes: list[tuple[int, int, int, int]], progress: Any) -> Any:
    import comfy.model_management as mm
    import torch

    height, width = part.shape[-2:]
    images = None
    for top, bottom, left, right in boxes:
        mm.throw_exception_if_processing_interrupted()
        y0, x0 = max(top - _HALO, 0), max(left - _HALO, 0)
        y1, x1 = min(bottom + _HALO, height), min(right + _HALO, width)
        tile = vae.decode(part[..., y0:y1, x0:x1])
        if len(boxes) == 1:
            images = tile
        else:
            if images is None:
                shape = (part.shape[0], height * _UPSCALE, width * _UPSCALE, tile.shape[-1])
                images = torch.empty(shape, dtype=tile.dtype, device=tile.device)
            images[:, top * _UPSCALE : bottom * _UPSCALE, left * _UPSCALE : right * _UPSCALE] = tile[
                :, (top - y0) * _UPSCALE : (bottom - y0) * _UPSCALE, (left - x0) * _UPSCALE : (right - x0) * _UPSCALE
            ]
        progress.update(1)
    return images


def _progress(total: int) -> Any:
    import comfy.utils

    return comfy.utils.ProgressBar(total)

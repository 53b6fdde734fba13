"""Latents to pictures through a full VAE: whole, one at a time or tiled, with a check for non-finite results.

A VAE has no clone, so another dtype is a second module with the same weights (see `loading.vae_in`), kept as long as
the first one lives.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from .accelerate.compile_vae import compiled_like
from .errors import SpeedLabError
from .loading import vae_in
from .precision import short_name, torch_dtype

log = logging.getLogger(__name__)

_SMALLEST_TILE = 64

_siblings: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
_not_finite_in: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. `tile_size` and `overlap` are pixels; a tile size of 0 decodes whole pictures."""

    slicing: bool = False
    tile_size: int = 0
    overlap: int = 64
    precision: str = "auto"


@dataclass(frozen=True)
class Decoded:
    """Pictures [B, H, W, 3] in 0..1, and what the record says of how they were made."""

    images: Any
    info: dict[str, Any] = field(default_factory=dict)


def decode(vae: Any, latent: Mapping[str, Any], config: DecodeConfig) -> Decoded:
    """Decode a LATENT [B, C, H/8, W/8].

    A result with NaN or Inf from finite latents is reported and decoded again in fp32; the VAE is remembered, so that
    `auto` starts in fp32 next time. Raises SpeedLabError for latents that this VAE cannot decode.
    """
    import torch

    samples = latent["samples"]
    check_latent(vae, samples)
    dtype = torch_dtype(config.precision) or _auto_dtype(vae)
    chosen = sibling(vae, dtype)
    images = _decode_with(chosen, samples, config)
    info: dict[str, Any] = {"decoder": _decoder_name(chosen), "precision": short_name(chosen.vae_dtype)}
    if config.slicing:
        info["slicing"] = True
    if config.tile_size:
        info["tile_size"] = config.tile_size
    if not is_finite(samples):
        return Decoded(images, {**info, "warning": report_bad_latents()})
    if is_finite(images):
        return Decoded(images, info)
    _not_finite_in.setdefault(vae.first_stage_model, set()).add(chosen.vae_dtype)
    if chosen.vae_dtype == torch.float32:
        return Decoded(
            images, {**info, "warning": _report("The VAE gives NaN or Inf in fp32 too; its weights are bad.")}
        )
    warning = _report(
        f"The VAE gives NaN or Inf in {short_name(chosen.vae_dtype)}; the latents were decoded again in fp32. "
        "A VAE made for half precision (such as the SDXL VAE FP16 fix) would be faster."
    )
    images = _decode_with(sibling(vae, torch.float32), samples, config)
    if not is_finite(images):
        warning = _report("The VAE gives NaN or Inf in fp32 too; its weights are bad.")
    return Decoded(images, {**info, "precision": "fp32", "warning": warning})


def sibling(vae: Any, dtype: Any) -> Any:
    """The VAE itself if it runs in `dtype`, else its second module in that dtype, built once."""
    if vae.vae_dtype == dtype:
        return vae
    known = _siblings.setdefault(vae.first_stage_model, {})
    if dtype not in known:
        known[dtype] = compiled_like(vae, vae_in(vae, dtype))
    return known[dtype]


def check_latent(vae: Any, samples: Any) -> None:
    """Refuse what would end in a shape error deep in the network. Raises SpeedLabError."""
    vae.throw_exception_if_invalid()
    if samples.shape[0] == 0:
        raise SpeedLabError("The latent batch is empty: there is no picture to decode.")
    channels = getattr(vae, "latent_channels", samples.shape[1])
    if samples.shape[1] != channels:
        raise SpeedLabError(
            f"The latents have {samples.shape[1]} channels and this VAE decodes {channels}: they belong to different "
            "model families. Use the VAE of the checkpoint that made the latents."
        )


def is_finite(tensor: Any) -> bool:
    """Whether a tensor has neither NaN nor Inf."""
    import torch

    return bool(torch.isfinite(tensor).all())


def report_bad_latents() -> str:
    """Say once that the sampler, not the decoder, produced NaN or Inf."""
    return _report(
        "The latents have NaN or Inf before decoding: the model did not stay finite. Load the checkpoint in bf16 or "
        "fp32, or switch attention to sdpa."
    )


def _decode_with(vae: Any, samples: Any, config: DecodeConfig) -> Any:
    if config.slicing and samples.shape[0] > 1:
        images = _sliced(vae, samples, config)
    elif config.tile_size > 0:
        scale = _compression(vae)
        if config.tile_size < _SMALLEST_TILE:
            raise SpeedLabError(
                f"tile_size is {config.tile_size}: choose {_SMALLEST_TILE} pixels or more, or 0 for whole pictures."
            )
        overlap = min(config.overlap, config.tile_size // 4)
        images = vae.decode_tiled(
            samples, tile_x=config.tile_size // scale, tile_y=config.tile_size // scale, overlap=overlap // scale
        )
    else:
        images = vae.decode(samples)
    # A video VAE keeps frames in a dimension of their own; pictures are one batch, as in core's VAE Decode.
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def _sliced(vae: Any, samples: Any, config: DecodeConfig) -> Any:
    import comfy.model_management as mm
    import comfy.utils
    import torch

    progress = comfy.utils.ProgressBar(samples.shape[0])
    one = DecodeConfig(False, config.tile_size, config.overlap, config.precision)
    images = []
    for index in range(samples.shape[0]):
        mm.throw_exception_if_processing_interrupted()
        images.append(_decode_with(vae, samples[index : index + 1], one))
        progress.update(1)
    return torch.cat(images)


def _decoder_name(vae: Any) -> str:
    """`vae`, or `taesd` where a Tiny VAE came in through a VAE input."""
    kind = type(vae.first_stage_model).__name__
    return kind.lower() if kind.startswith("TAE") else "vae"


def _compression(vae: Any) -> int:
    """Pixels to each side that one latent pixel becomes."""
    factor = getattr(vae, "spacial_compression_decode", None)
    return int(factor()) if factor is not None else 8


def _auto_dtype(vae: Any) -> Any:
    import torch

    bad = _not_finite_in.get(vae.first_stage_model, ())
    return torch.float32 if vae.vae_dtype in bad else vae.vae_dtype


def _report(message: str) -> str:
    log.warning("SpeedLab: %s", message)
    return message

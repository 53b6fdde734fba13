"""Latents to images through a full VAE: whole, one at a time or tiled, in a precision that stays finite.

What does not fit into memory is tried again in smaller pieces; what is not finite, in a safer precision. Both are
logged and written in the record.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.core import is_finite
from ..common.dtypes import short_name, torch_dtype
from ..common.errors import SpeedLabError
from ..models.latent_mark import mark_of
from ..models.loading import FAMILIES, VAE_SOURCE
from .attempts import SMALLEST_TILE, Way, decode_fitting
from .precision import abilities_for, remember_not_finite, safer, sibling, sibling_bytes, slow_choice, starting_dtype
from .variants import COMPILED, decoding_by, derivations_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. `tile_size` and `overlap` are pixels; a tile size of 0 decodes whole images."""

    slicing: bool = False
    tile_size: int = 0
    overlap: int = 64
    precision: str = "auto"


@dataclass(frozen=True)
class Decoded:
    """Images [B, H, W, 3] in 0..1, and what the record says of how they were made."""

    images: Any
    info: dict[str, Any] = field(default_factory=dict)


def decode(vae: Any, latent: Mapping[str, Any], config: DecodeConfig) -> Decoded:
    """Decode a LATENT [B, C, H/8, W/8].

    A result with NaN or Inf from finite latents is reported and decoded again in a safer precision, which `auto` then
    starts with for this VAE. Raises SpeedLabError for latents that this VAE cannot decode, and when memory is not
    enough for the smallest tile.
    """
    if 0 < config.tile_size < SMALLEST_TILE:
        raise SpeedLabError(
            f"tile_size is {config.tile_size}: choose {SMALLEST_TILE} pixels or more, or 0 for whole images."
        )
    samples = image_latents(latent)
    check_latent(vae, samples)
    check_family(vae, latent)
    warnings = [] if is_finite(samples) else [report_bad_latents()]
    sound_latents = not warnings
    dtype, way = starting_dtype(vae, config.precision), Way(config.slicing, config.tile_size, config.overlap)
    slow = slow_choice(vae, dtype)
    warnings += [report(slow)] if slow else []
    not_finite: list[Any] = []
    while True:
        chosen = sibling(vae, dtype)
        result = decode_fitting(chosen, samples, way, report)
        way = result.way
        warnings += result.retries
        if result.finite or not sound_latents:
            break
        name = str(short_name(chosen.vae_dtype))
        not_finite.append(chosen.vae_dtype)
        following = safer(name, abilities_for(vae))
        if following is None:
            warnings.append(
                report("The VAE gives NaN or Inf in fp32 too: its weights are bad, or the latents out of its range.")
            )
            break
        warnings.append(
            report(
                f"The VAE gives NaN or Inf in {name}; the latents were decoded again in {following}. "
                "A VAE made for half precision (such as the SDXL VAE FP16 fix) would be faster."
            )
        )
        dtype = torch_dtype(following)
    if result.finite:  # only then was it the precision
        for bad in not_finite:
            remember_not_finite(vae, bad)
    return Decoded(result.images, _info(vae, chosen, way, config, warnings))


def vae_of(vae: Any, config: DecodeConfig, words: str) -> Any:
    """A VAE that decodes as `decode` does with `config`, for nodes that have no such settings."""
    require_vae(vae)
    return decoding_by(vae, words, lambda samples: decode(vae, {"samples": samples}, config).images, vae)


def _info(vae: Any, chosen: Any, way: Way, config: DecodeConfig, warnings: list[str]) -> dict[str, Any]:
    info: dict[str, Any] = {"decoder": _decoder_name(chosen), "precision": short_name(chosen.vae_dtype)}
    if config.precision == "auto":
        info["precision_asked"] = "auto"
    if way.slicing:
        info["slicing"] = True
    if way.tile_size:
        info.update(tile_size=way.tile_size, overlap=way.overlap)
    compiled = derivations_of(chosen).get(COMPILED)
    if compiled is not None:
        info["compiled"] = compiled.described
    if chosen is not vae:
        info["second_modules_gb"] = round(sibling_bytes(vae) / 1e9, 4)
    if warnings:
        info["warning"] = " ".join(warnings)
    return info


def image_latents(latent: Mapping[str, Any]) -> Any:
    """The latents [B, C, h, w] (or [B, C, t, h, w]) of a LATENT. Raises SpeedLabError for a mixture of sizes."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or isinstance(samples, (list, tuple)):
        parts = samples.unbind() if hasattr(samples, "unbind") else samples
        sizes = ", ".join("x".join(str(n) for n in part.shape) for part in parts)
        raise SpeedLabError(
            f"The batch mixes latents of different sizes ({sizes}). Decode them one by one: use a list of latents "
            "(as Prompt Queue makes) instead of one batch."
        )
    if samples.ndim not in (4, 5):
        raise SpeedLabError(
            f"The latents have the shape {tuple(samples.shape)}; an image's are [batch, channels, height, width]."
        )
    return samples


def require_vae(vae: Any) -> None:
    """Refuse what stands for a VAE where a checkpoint holds none. Raises SpeedLabError."""
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        raise SpeedLabError("There is no VAE: the checkpoint file holds none. Load one with Load VAE.")


def check_latent(vae: Any, samples: Any) -> None:
    """Refuse what would end in a shape error deep in the network. Raises SpeedLabError."""
    vae.throw_exception_if_invalid()
    if samples.shape[0] == 0:
        raise SpeedLabError("The latent batch is empty: there is no image to decode.")
    if samples.ndim == 5 and getattr(vae, "latent_dim", 2) == 2:
        raise SpeedLabError(
            f"The latents are {samples.shape[2]} frames of a video, and this VAE decodes still images: they belong "
            "to different model families. Use the VAE of the model that made the latents."
        )
    if samples.ndim == 4 and getattr(vae, "latent_dim", 2) == 3:
        raise SpeedLabError(
            "The latents are of still images, and this VAE decodes videos: they belong to different model families. "
            "Use the VAE of the model that made the latents."
        )
    channels = getattr(vae, "latent_channels", samples.shape[1])
    if samples.shape[1] != channels:
        raise SpeedLabError(
            f"The latents have {samples.shape[1]} channels and this VAE decodes {channels}: they belong to different "
            "model families. Use the VAE of the checkpoint that made the latents."
        )


def check_family(vae: Any, latent: Mapping[str, Any]) -> None:
    """Refuse SDXL latents on an SD 1.x VAE and the reverse, where both are known: the image would be garbage."""
    patcher = getattr(vae, "patcher", None)
    source = None if patcher is None else patcher.get_attachment(VAE_SOURCE)
    decodes = FAMILIES.get(str(getattr(source, "latent_format", None)))
    mark = mark_of(latent) if decodes is not None else None
    made_by = FAMILIES.get(str(mark.latent_format)) if mark is not None else None
    if source is not None and made_by is not None and decodes is not None and made_by != decodes:
        raise SpeedLabError(
            f"These latents were made by an {made_by} model and this VAE comes from an {decodes} checkpoint "
            f"({source.path.name}). Use the VAE of the checkpoint that made the latents."
        )


def report_bad_latents() -> str:
    """Say once that the sampler, not the decoder, produced NaN or Inf."""
    return report(
        "The latents have NaN or Inf before decoding: the model did not stay finite. Load the checkpoint in bf16 or "
        "fp32, or switch attention to sdpa."
    )


def report(message: str) -> str:
    """Log a warning for the user and hand it back for the record."""
    log.warning("SpeedLab: %s", message)
    return message


def _decoder_name(vae: Any) -> str:
    """`vae`, or `taesd` where a Tiny VAE came in through a VAE input."""
    kind = type(vae.first_stage_model).__name__
    return kind.lower() if kind.startswith("TAE") else "vae"

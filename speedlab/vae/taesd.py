"""Tiny VAE (TAESD, madebyollin) decode: about one per cent of the full decoder's work, a small loss of detail.

Core lends a tiny VAE the full VAE's memory estimate and then evicts the UNet to make room for a network of a million
parameters; here it has an estimate of its own. The decoder runs in bands of rows (see below), so that its
memory does not grow with the image and there are no seams to hide.

TAESD's decoder in bands of rows: the whole image's result, bit for bit the same mathematics, in a band's memory.

Every layer of that decoder looks at most one row up and down. A convolution therefore keeps the last two rows that it
was given and holds back the one row whose lower neighbour is still to come; a skip connection keeps its rows until
the branch beside it has caught up. Nothing is computed twice but two rows a band, and what is worked on stays in the
CPU's cache.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.core import is_finite, out_of_memory_advice, progress_bar
from ..common.errors import ModelFileError, SpeedLabError
from ..models.latent_mark import mark_of
from ..models.loading import FAMILIES, readable, refuse_unsafe
from .attempts import until_it_fits
from .decode import Decoded, check_latent, image_latents, report, report_bad_latents
from .variants import decoding_by

log = logging.getLogger(__name__)

KNOWN_STEMS = ("taesd", "taesdxl")
# The latent format of each decoder's family, by core's class names: its scale and shift are the decoder's.
_FORMATS = {"taesd": "SD15", "taesdxl": "SDXL", "taesd3": "SD3", "taef1": "Flux"}
# Which endings are model files is core's to say: its list holds no others.
_DECODER_FILE = re.compile(r"(?P<stem>.+)_decoder\.\w+", re.DOTALL)
_UPSCALE = 8
# What a band holds where no size is given, in pixels to each side of a square: what a CPU's cache takes, and
# what fills a GPU.
_BAND_ON_CPU, _BAND_ELSEWHERE = 256, 1024
# A small image has this many bands on a CPU.
_BANDS_ON_CPU = 5
_SMALLEST_BAND = 64
_ROWS_AT_LEAST = 2


@dataclass(frozen=True)
class TinyDecodeConfig:
    """`slice_size` images at a time (0: all), in bands that hold `tile_size` squared pixels (0: what suits best)."""

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
    """Decode a LATENT [B, C, H/8, W/8] with a tiny decoder to images [B, H, W, 3] in 0..1.

    Raises SpeedLabError when `auto` cannot tell the latent's family, ModelFileError for a missing or broken file.
    """
    samples = image_latents(latent)
    latent_format = _latent_format(latent, model)
    stem = resolve_decoder(config.decoder, latent_format)
    vae = load_tiny_vae(stem, latent_format)
    check_latent(vae, samples)
    if samples.ndim != 4:
        raise SpeedLabError("Tiny VAE Decode takes latents of still images, and these are of a video. Use VAE Decode.")
    decode_slices = _decode_slices if can_stream(vae.first_stage_model.taesd_decoder) else _decode_whole_slices
    images, fitted, warnings = until_it_fits(
        lambda tried: decode_slices(vae, samples, tried), config, lambda tried: _smaller(tried, samples, vae.device),
        _say_retry,
    )  # fmt: skip
    if decode_slices is _decode_whole_slices:
        warnings.append(report(f"The tiny decoder '{stem}' cannot run in bands; it decoded whole images."))
    foreign = _foreign(stem, latent_format)
    if foreign:
        warnings.append(report(foreign))
    info: dict[str, Any] = {"decoder": stem, "slice_size": fitted.slice_size, "tile_size": fitted.tile_size}
    # The decoder squashes its input, so Inf in the latents can come out as finite pixels.
    if not is_finite(samples) or not is_finite(images):
        warnings.append(report_bad_latents())
    if warnings:
        info["warning"] = " ".join(warnings)
    return Decoded(images, info)


def tiny_vae(vae: Any, config: TinyDecodeConfig, model: Any) -> Any:
    """A VAE that decodes as `decode_tiny` does with this model's latents, and encodes as `vae`.

    Raises SpeedLabError for latents without a tiny decoder, ModelFileError where its file is missing or broken.
    """
    latent_format = _latent_format({}, model)
    chosen = replace(config, decoder=resolve_decoder(config.decoder, latent_format))
    tiny = load_tiny_vae(chosen.decoder, latent_format)
    return decoding_by(
        tiny, f"tiny({chosen.decoder})", lambda samples: decode_tiny({"samples": samples}, chosen, model).images, vae
    )


def resolve_decoder(decoder: str, latent_format: Any | None) -> str:
    """The stem to use: the one chosen, else the one of the latent's family. Raises SpeedLabError if that is unknown."""
    if decoder != "auto":
        return decoder
    if latent_format is None:
        raise SpeedLabError(
            "Tiny VAE Decode cannot tell an SD 1.x latent from an SDXL one, unless a SpeedLab sampler made it and no "
            "other node has changed it since. Connect the model, or choose taesd (SD 1.x, 2.x) or taesdxl (SDXL) as "
            "decoder."
        )
    name = getattr(latent_format, "taesd_decoder_name", None)
    if not name:
        raise SpeedLabError(
            f"There is no tiny decoder for latents of the format {type(latent_format).__name__}. Use VAE Decode."
        )
    return str(name).removesuffix("_decoder")


def _foreign(stem: str, latent_format: Any | None) -> str | None:
    """What to say where the decoder that was chosen is for another family than the latents are of."""
    made_by = FAMILIES.get(type(latent_format).__name__)
    decodes = FAMILIES.get(_format_of(stem) or "")
    if made_by is None or decodes is None or made_by == decodes:
        return None
    return (
        f"These latents were made by an {made_by} model and the decoder '{stem}' is for {decodes}, so the colours will "
        "be off. Set decoder to auto."
    )


def _format_of(stem: str) -> str | None:
    """The latent format of a decoder that is known by its file's name, in whatever folder it lies."""
    return _FORMATS.get(re.split(r"[\\/]", stem)[-1])


def decode_device() -> Any:
    """The device that decoding runs on."""
    import comfy.model_management as mm

    return mm.vae_device()


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
    """Bytes that decoding latents of `shape` [B, C, h, w] in one band takes at its peak."""
    import comfy.model_management as mm

    return float(shape[0] * VALUES_PER_PIXEL * shape[2] * shape[3] * _UPSCALE**2 * mm.dtype_size(dtype))


def _scale_and_shift(stem: str, latent_format: Any | None) -> tuple[float, float]:
    import comfy.latent_formats

    known = getattr(comfy.latent_formats, _format_of(stem) or "", None)
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
    mark = mark_of(latent)
    known = getattr(comfy.latent_formats, (mark and mark.latent_format) or "", None)
    return known() if isinstance(known, type) else None


def _say_retry(tried: TinyDecodeConfig, smaller: TinyDecodeConfig | None, problem: str) -> str:
    if smaller is None:
        return f"Tiny VAE Decode ran out of memory ({problem}). {out_of_memory_advice()}"
    return report(
        f"Tiny VAE Decode ran out of memory; decoding again {smaller.slice_size} image(s) at a time in bands of "
        f"{smaller.tile_size}x{smaller.tile_size} pixels."
    )


def _smaller(config: TinyDecodeConfig, samples: Any, device: Any) -> TinyDecodeConfig | None:
    at_once = min(config.slice_size or samples.shape[0], samples.shape[0])
    tile = _band_side(config.tile_size, samples, device)
    if at_once > 1:
        return replace(config, slice_size=1, tile_size=tile)
    return replace(config, slice_size=1, tile_size=max(tile // 2, _SMALLEST_BAND)) if tile > _SMALLEST_BAND else None


def _band_side(tile_size: int, samples: Any, device: Any) -> int:
    """Side of the square that has as many pixels as a band, never more than the image's longer side."""
    height, width = (pixels * _UPSCALE for pixels in samples.shape[-2:])
    if device.type == "cpu":
        # Small images in several bands too, so that each takes far less memory than in one piece.
        side = min(max(math.isqrt(height * width // _BANDS_ON_CPU), _BAND_ON_CPU // 2), _BAND_ON_CPU)
    else:
        side = _BAND_ELSEWHERE
    return int(min(tile_size or side, max(height, width)))


def _decode_slices(vae: Any, samples: Any, config: TinyDecodeConfig) -> Any:
    """Images [B, H, W, 3] in 0..1; `slice_size` of them at once, band by band."""
    import torch

    count, _, height, width = samples.shape
    at_once = config.slice_size or count
    side = _band_side(config.tile_size, samples, vae.device)
    # Two rows a band are computed twice: where no size is given, bands are high enough for that not to matter.
    least = 1 if config.tile_size else _ROWS_AT_LEAST
    rows = min(max(side * side // (width * _UPSCALE) // _UPSCALE, least), height)
    _load_for(vae, (min(at_once, count), samples.shape[1], rows, width))
    progress = progress_bar(-(-count // at_once) * height * _UPSCALE)
    images = torch.empty((count, 3, height * _UPSCALE, width * _UPSCALE), device=vae.output_device)
    for start in range(0, count, at_once):
        _decode_bands(vae, samples[start : start + at_once], rows, progress, images[start : start + at_once])
    return images.movedim(1, -1)


def _decode_whole_slices(vae: Any, samples: Any, config: TinyDecodeConfig) -> Any:
    """Images [B, H, W, 3] in 0..1 by a decoder that is built otherwise than TAESD's; `slice_size` at once."""
    import comfy.model_management as mm
    import torch

    parts = samples.split(config.slice_size or samples.shape[0])
    _load_for(vae, parts[0].shape)
    progress = progress_bar(len(parts))
    images = []
    for part in parts:
        mm.throw_exception_if_processing_interrupted()
        raw = vae.first_stage_model.decode(part.to(vae.vae_dtype).to(vae.device))
        images.append(vae.process_output(raw.to(device=vae.output_device, dtype=torch.float32)))
        progress.update(1)
    return torch.cat(images).movedim(1, -1)


def _load_for(vae: Any, shape: tuple[int, ...]) -> None:
    """Bring the decoder to its device and make room for one band of `shape`, for no more than that."""
    import comfy.model_management as mm

    mm.load_models_gpu([vae.patcher], memory_required=memory_used_decode(shape, vae.vae_dtype))


def _decode_bands(vae: Any, part: Any, rows: int, progress: Any, images: Any) -> None:
    """Fill `images` [b, 3, H, W] from top to bottom; stops within one band when cancelled."""
    import comfy.model_management as mm

    model = vae.first_stage_model
    latents = (part.to(vae.vae_dtype).to(vae.device) - model.vae_shift) * model.vae_scale
    top = 0
    stop = mm.throw_exception_if_processing_interrupted
    for band in decode_rows(model.taesd_decoder, _fast_layout(latents), rows, stop):
        # The decoder's pixels are 0..1; core's wrapper spreads them to -1..1 and its VAE brings them back.
        pixels = band.to(device=images.device, dtype=images.dtype).clamp_(0.0, 1.0)
        images[:, :, top : top + pixels.shape[2]] = pixels
        top += pixels.shape[2]
        progress.update(pixels.shape[2])


def _fast_layout(latents: Any) -> Any:
    """Channels-last where convolutions are faster in it; it is the input's layout alone, no weight is touched."""
    import torch

    return latents.contiguous(memory_format=torch.channels_last) if latents.device.type in ("cpu", "cuda") else latents


# Values held at once per pixel of a band at full size: 64 channels in a convolution's input, output, its copy with
# the rows kept, and the residual.
VALUES_PER_PIXEL = 64 * 4.4


class UnknownLayerError(TypeError):
    """A decoder with a layer that is not known to be local to rows."""


def decode_rows(decoder: Any, latents: Any, rows: int, before_band: Callable[[], None]) -> Iterator[Any]:
    """Yield the decoded rows of latents [B, C, h, w] from top to bottom as [B, 3, n, w*8], `rows` latent rows at once.

    `decoder` is the TAESD decoder module; its weights are used as they lie. Raises UnknownLayerError before anything
    is computed where it is built otherwise. `before_band` is called once a band.
    """
    layers = [_stream(layer) for layer in decoder]
    height = latents.shape[2]
    for top in range(0, height, rows):
        before_band()
        yield from _through(layers, latents[:, :, top : top + rows], top + rows >= height, rows, before_band)


def _through(layers: list[Any], band: Any, is_last: bool, limit: int, before_band: Callable[[], None]) -> Iterator[Any]:
    """Yield what `layers` give for a band, of which each takes at most `limit` rows of the first one's size at once.

    With the last band every layer releases the rows that it held back, which adds up to far more rows than a band has.
    """
    for place, layer in enumerate(layers):
        if band.shape[2] == 0 and not is_last:
            return
        if band.shape[2] > limit:
            pieces = band.split(limit, dim=2)
            del band
            for number, piece in enumerate(pieces, start=1):
                before_band()
                yield from _through(layers[place:], piece, is_last and number == len(pieces), limit, before_band)
            return
        band = layer(band, is_last)
        if layer is _doubled:
            limit *= 2
    if band.shape[2]:
        yield band


def can_stream(decoder: Any) -> bool:
    """Whether every layer of a decoder is known to be local to rows."""
    import torch

    if not isinstance(decoder, torch.nn.Sequential):
        return False
    try:
        for layer in decoder:
            _stream(layer)
    except UnknownLayerError:
        return False
    return True


def _stream(layer: Any) -> Any:
    import torch
    from comfy.taesd.taesd import Block, Clamp

    if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) and layer.padding == (1, 1):
        return _Convolution(layer)
    if isinstance(layer, Block) and getattr(layer, "pool", None) is None:  # a pool looks at the whole image
        return _Residual(layer)
    if isinstance(layer, torch.nn.Upsample) and layer.mode == "nearest" and layer.scale_factor == 2:
        return _doubled
    if isinstance(layer, torch.nn.ReLU):
        return lambda band, _is_last: torch.relu_(band)
    if isinstance(layer, (Clamp, torch.nn.Identity)):
        return lambda band, _is_last: layer(band)
    raise UnknownLayerError(type(layer).__name__)


def _doubled(band: Any, _is_last: bool) -> Any:
    import torch

    if band.shape[2] == 0:
        return band.new_empty((*band.shape[:2], 0, 2 * band.shape[3]))
    return torch.nn.functional.interpolate(band, scale_factor=2, mode="nearest")


def _held(buffer: Any | None, rows: Any) -> Any:
    """Keep rows for the next band, in the same memory where they fit: small pieces that outlive large ones, band after
    band, would leave the heap in holes, and the peak would grow with the image."""
    if buffer is None or buffer.shape != rows.shape:
        return rows.clone()
    return buffer.copy_(rows)


class _Convolution:
    """A 3x3 convolution with one pixel of zeros around the image, fed with rows from top to bottom."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._kept: Any | None = None
        self._at_top = True

    def __call__(self, band: Any, is_last: bool) -> Any:
        import torch

        rows = band if self._kept is None else torch.cat((self._kept, band), dim=2)
        # The layer pads each band with zeros. Inside the image the rows beside that padding are wrong: the upper
        # one was given out with the band before, the lower one comes with the next.
        first = 0 if self._at_top else 1
        last = rows.shape[2] if is_last else rows.shape[2] - 1
        if last <= first:
            self._kept = rows.clone()
            return band.new_empty((band.shape[0], self._layer.out_channels, 0, band.shape[3]))
        self._at_top = False
        self._kept = _held(self._kept, rows[:, :, -2:])
        return self._layer(rows)[:, :, first:last]


class _Residual:
    """TAESD's block: three convolutions beside a skip connection, then ReLU."""

    def __init__(self, block: Any) -> None:
        self._branch = [_stream(layer) for layer in block.conv]
        self._skip = _stream(block.skip)
        self._waiting: Any | None = None

    def __call__(self, band: Any, is_last: bool) -> Any:
        import torch

        skipped = self._skip(band, is_last)
        waiting = skipped if self._waiting is None else torch.cat((self._waiting, skipped), dim=2)
        # The branch begins with a convolution, which never writes into what it is given.
        for layer in self._branch:
            band = layer(band, is_last)
        done = band.shape[2]
        self._waiting = _held(self._waiting, waiting[:, :, done:])
        return torch.relu_(band.add_(waiting[:, :, :done]))

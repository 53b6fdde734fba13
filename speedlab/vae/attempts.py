"""Decode with a VAE in the way asked for, and where memory runs out in smaller and smaller pieces.

Core's own decode does the same without a report, with tiles of one size; here every retry is reported, and the
pieces shrink until they fit.

Tiles of an image: where they lie and how their overlaps blend into each other without an edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..common.core import is_finite, is_out_of_memory, out_of_memory_advice, progress_bar, release_unused_memory
from ..common.errors import SpeedLabError, first_line
from .variants import placement_of

SMALLEST_TILE = 64
_PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Way:
    """Images one at a time or as many as fit; whole, or in tiles of `tile_size` pixels."""

    slicing: bool
    tile_size: int
    overlap: int

    def __str__(self) -> str:
        if self.tile_size:
            return f"in tiles of {self.tile_size} pixels"
        return "one image at a time" if self.slicing else "whole"


@dataclass(frozen=True)
class Result:
    """Images [B, H, W, 3], whether the decoder stayed finite, the way that fitted, and what did not."""

    images: Any
    finite: bool
    way: Way
    retries: tuple[str, ...] = ()


W = TypeVar("W")
T = TypeVar("T")


def until_it_fits(
    attempt: Callable[[W], T], way: W, smaller: Callable[[W], W | None], say: Callable[[W, W | None, str], str]
) -> tuple[T, W, list[str]]:
    """What `attempt` gives, in the first of ever `smaller` ways that fits; that way; a sentence for each that did not.

    `say(way, next, problem)` makes and reports the sentence; where nothing is smaller (`next` is None) its text is the
    message of the SpeedLabError that ends this.
    """
    retries: list[str] = []
    while True:
        problem = None
        try:
            result = attempt(way)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Its traceback keeps every tensor of the attempt alive, so nothing is retried before it is gone.
            problem = first_line(error)
        if problem is None:
            return result, way, retries
        release_unused_memory()
        following = smaller(way)
        text = say(way, following, problem)
        if following is None:
            raise SpeedLabError(text)
        retries.append(text)
        way = following


def decode_fitting(vae: Any, samples: Any, way: Way, report: Callable[[str], str]) -> Result:
    """Decode latents [B, C, h, w]; out of memory, decode again in smaller pieces. Each retry goes through `report`.

    Raises SpeedLabError when the smallest tiles do not fit either.
    """

    def say(tried: Way, smaller: Way | None, problem: str) -> str:
        if smaller is None:
            return f"VAE Decode ran out of memory even {tried} ({problem}). {out_of_memory_advice()}"
        return report(f"Decoding {tried} ran out of memory; decoding again {smaller}.")

    scale = pixels_per_latent(vae)
    (images, finite), fitted, retries = until_it_fits(
        lambda tried: _decode(vae, samples, tried), way, lambda tried: smaller_way(tried, samples, scale), say
    )
    return Result(images, finite, fitted, tuple(retries))


def smaller_way(way: Way, samples: Any, scale: int = _PIXELS_PER_LATENT) -> Way | None:
    """The next smaller way for latents [B, C, h, w], or None when the tiles are as small as they may be."""
    if not is_image(samples):
        return None
    if samples.shape[0] > 1 and not way.slicing and not way.tile_size:
        return replace(way, slicing=True)
    largest = max(samples.shape[-2:]) * scale
    present = min(way.tile_size or largest, largest)
    tile = max(present // 2 // SMALLEST_TILE * SMALLEST_TILE, SMALLEST_TILE)
    return replace(way, tile_size=tile) if tile < present else None


def is_image(samples: Any) -> bool:
    """Whether latents are of still images; video and sound have decoders of their own shape."""
    return bool(samples.ndim == 4)


def pixels_per_latent(vae: Any) -> int:
    """Pixels to each side that one latent pixel becomes."""
    factor = getattr(vae, "spacial_compression_decode", None)
    return int(factor()) if factor is not None else _PIXELS_PER_LATENT


def _decode(vae: Any, samples: Any, way: Way) -> tuple[Any, bool]:
    if not is_image(samples) or getattr(vae, "latent_dim", 2) != 2 or getattr(vae, "extra_1d_channel", None):
        return _decode_by_core(vae, samples, way)
    if way.tile_size:
        tiles = grid(samples.shape[-2], samples.shape[-1], way.tile_size, way.overlap, pixels_per_latent(vae))
        if tiles.count > 1:
            return _tiled(vae, samples, tiles)
    return _whole(vae, samples, one_at_a_time=way.slicing or way.tile_size > 0)


def _decode_by_core(vae: Any, samples: Any, way: Way) -> tuple[Any, bool]:
    """Video, audio and whatever else core decodes; frames have a dimension of their own there and are a batch here."""
    import torch

    parts = samples.split(1) if way.slicing else (samples,)
    if way.tile_size:
        scale = pixels_per_latent(vae)
        overlap = min(way.overlap, way.tile_size // 4)
        size = {"tile_x": way.tile_size // scale, "tile_y": way.tile_size // scale, "overlap": overlap // scale}
        images = torch.cat([vae.decode_tiled(part, **size) for part in parts])
    else:
        images = torch.cat([vae.decode(part) for part in parts])
    images = images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images
    return images, is_finite(images)


def _whole(vae: Any, samples: Any, one_at_a_time: bool) -> tuple[Any, bool]:
    import torch

    count = samples.shape[0]
    first = samples[:1] if one_at_a_time else samples
    needed = vae.memory_used_decode(first.shape, vae.vae_dtype)
    decoder = _Decoder(vae, needed)
    # As core does: as many images at once as the free memory is estimated to hold.
    at_once = 1 if one_at_a_time else max(1, int(_free_memory(vae) / needed))
    progress = progress_bar(-(-count // at_once))
    images = None
    for start in range(0, count, at_once):
        part = decoder(samples[start : start + at_once])
        if images is None:
            images = torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device)
        images[start : start + at_once] = part
        progress.update(1)
    assert images is not None
    return images.movedim(1, -1), decoder.finite


def _free_memory(vae: Any) -> float:
    """What is free for decoding; under dynamic VRAM the patcher knows what could be evicted besides."""
    import comfy.model_management as mm

    return float(getattr(vae.patcher, "get_free_memory", mm.get_free_memory)(vae.device))


def _tiled(vae: Any, samples: Any, tiles: Grid) -> tuple[Any, bool]:
    import torch

    decoder = _Decoder(vae, vae.memory_used_decode((1, samples.shape[1], *tiles.tile), vae.vae_dtype))
    progress = progress_bar(samples.shape[0] * tiles.count)
    images = None
    for index in range(samples.shape[0]):
        image = blend(samples[index : index + 1], tiles, decoder, lambda: progress.update(1))
        if samples.shape[0] == 1:
            images = image
            break
        if images is None:
            images = torch.empty((samples.shape[0], *image.shape[1:]), dtype=image.dtype, device=image.device)
        images[index] = image[0]
    assert images is not None
    return images.movedim(1, -1), decoder.finite


class _Decoder:
    """Latents [b, C, h, w] to pixels [b, 3, H, W] in 0..1 on the output device, as core's decode makes them.

    `finite` turns False with the first NaN or Inf, looked for before clamping hides an Inf. Cancels between calls.
    """

    def __init__(self, vae: Any, memory_needed: float) -> None:
        import comfy.model_management as mm
        import torch

        self._vae = vae
        self._output_dtype = vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
        self.finite = True
        mm.load_models_gpu(
            [vae.patcher], memory_required=memory_needed, force_full_load=getattr(vae, "disable_offload", False)
        )

    def __call__(self, samples: Any) -> Any:
        import comfy.model_management as mm

        mm.throw_exception_if_processing_interrupted()
        vae = self._vae
        try:
            raw = vae.first_stage_model.decode(samples.to(vae.vae_dtype).to(vae.device))
        finally:
            if (placement := placement_of(vae)) is not None:
                placement.settle()
        # A copy: the output is scaled in place, and there are decoders that hand back what they were given.
        pixels = raw.to(device=vae.output_device, dtype=self._output_dtype, copy=True)
        del raw
        self.finite = self.finite and is_finite(pixels)
        return vae.process_output(pixels)


Span = tuple[int, int]
Decoder = Callable[[Any], Any]


@dataclass(frozen=True)
class Grid:
    """Tiles over a latent of `height` x `width`: every row span meets every column span; `scale` pixels a latent."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    scale: int

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return len(self.rows) * len(self.columns)

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of the largest tile, in latent pixels."""
        return self.rows[0][1] - self.rows[0][0], self.columns[0][1] - self.columns[0][0]


def grid(height: int, width: int, tile_size: int, overlap: int, scale: int) -> Grid:
    """Tiles of `tile_size` pixels that share at least `overlap` pixels (at most a quarter tile)."""
    tile = max(tile_size // scale, 1)
    shared = min(overlap // scale, tile // 4)
    return Grid(spans(height, tile, shared), spans(width, tile, shared), scale)


def spans(length: int, tile: int, overlap: int) -> tuple[Span, ...]:
    """The fewest spans of `tile` that cover `length` with `overlap` between neighbours, evenly spread.

    All are equally long, so that no sliver at the end is decoded with too little around it.
    """
    if tile >= length:
        return ((0, length),)
    last = length - tile
    count = 1 + math.ceil(last / (tile - overlap))
    starts = [round(index * last / (count - 1)) for index in range(count)]
    return tuple((start, start + tile) for start in starts)


def feather(parts: Sequence[Span], scale: int) -> list[Any]:
    """One weight vector a span, in pixels: raised-cosine ramps over the overlaps, which sum to 1 everywhere.

    A raised cosine starts and ends with slope zero; a straight ramp would leave an edge in the gradient.
    """
    import torch

    raw = [_window(parts, index, scale) for index in range(len(parts))]
    total = torch.zeros(parts[-1][1] * scale)
    for (start, stop), weights in zip(parts, raw, strict=True):
        total[start * scale : stop * scale] += weights
    return [w / total[start * scale : stop * scale] for (start, stop), w in zip(parts, raw, strict=True)]


def blend(samples: Any, tiles: Grid, decoder: Decoder, after_tile: Callable[[], None]) -> Any:
    """Decode latents [1, C, h, w] tile by tile to pixels [1, 3, h*scale, w*scale].

    Beside the image itself only one tile is held. `after_tile` is called once a tile.
    """
    import torch

    height, width = samples.shape[-2] * tiles.scale, samples.shape[-1] * tiles.scale
    across, down = feather(tiles.columns, tiles.scale), feather(tiles.rows, tiles.scale)
    image = None
    for (top, bottom), row_weights in zip(tiles.rows, down, strict=True):
        for (left, right), column_weights in zip(tiles.columns, across, strict=True):
            pixels = decoder(samples[..., top:bottom, left:right])
            if image is None:
                image = torch.zeros((*pixels.shape[:2], height, width), dtype=pixels.dtype, device=pixels.device)
            weights = row_weights[:, None] * column_weights
            y, x = top * tiles.scale, left * tiles.scale
            place = image[..., y : y + pixels.shape[-2], x : x + pixels.shape[-1]]
            place += pixels * weights.to(pixels)
            after_tile()
    return image


def _window(parts: Sequence[Span], index: int, scale: int) -> Any:
    import torch

    start, stop = parts[index]
    weights = torch.ones((stop - start) * scale)
    if index > 0 and (shared := (parts[index - 1][1] - start) * scale) > 0:
        weights[:shared] *= _ramp(shared)
    if index + 1 < len(parts) and (shared := (stop - parts[index + 1][0]) * scale) > 0:
        weights[-shared:] *= _ramp(shared).flip(0)
    return weights


def _ramp(length: int) -> Any:
    import torch

    return torch.sin((torch.arange(length) + 0.5) * (math.pi / 2 / length)) ** 2

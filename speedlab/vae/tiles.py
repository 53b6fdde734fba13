"""Tiles of a picture: where they lie and how their overlaps blend into each other without an edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

    Beside the picture itself only one tile is held. `after_tile` is called once a tile.
    """
    import torch

    height, width = samples.shape[-2] * tiles.scale, samples.shape[-1] * tiles.scale
    across, down = feather(tiles.columns, tiles.scale), feather(tiles.rows, tiles.scale)
    picture = None
    for (top, bottom), row_weights in zip(tiles.rows, down, strict=True):
        for (left, right), column_weights in zip(tiles.columns, across, strict=True):
            pixels = decoder(samples[..., top:bottom, left:right])
            if picture is None:
                picture = torch.zeros((*pixels.shape[:2], height, width), dtype=pixels.dtype, device=pixels.device)
            weights = row_weights[:, None] * column_weights
            y, x = top * tiles.scale, left * tiles.scale
            place = picture[..., y : y + pixels.shape[-2], x : x + pixels.shape[-1]]
            place += pixels * weights.to(pixels)
            after_tile()
    return picture


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

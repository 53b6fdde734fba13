"""TAESD's decoder in bands of rows: the whole picture's result, bit for bit the same mathematics, in a band's memory.

Every layer of that decoder looks at most one row up and down. A convolution therefore keeps the last two rows that it
was given and holds back the one row whose lower neighbour is still to come; a skip connection keeps its rows until
the branch beside it has caught up. Nothing is computed twice but two rows a band, and what is worked on stays in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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

    With the last band every layer lets go of what it held back, which adds up to far more rows than a band has.
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
    if isinstance(layer, Block) and getattr(layer, "pool", None) is None:  # a pool looks at the whole picture
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
    band, would leave the heap in holes, and the peak would grow with the picture."""
    if buffer is None or buffer.shape != rows.shape:
        return rows.clone()
    return buffer.copy_(rows)


class _Convolution:
    """A 3x3 convolution with one pixel of zeros around the picture, fed with rows from top to bottom."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._kept: Any | None = None
        self._at_top = True

    def __call__(self, band: Any, is_last: bool) -> Any:
        import torch

        rows = band if self._kept is None else torch.cat((self._kept, band), dim=2)
        # The layer pads each band with zeros. Inside the picture the rows beside that padding are wrong: the upper
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

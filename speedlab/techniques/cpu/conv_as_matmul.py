"""Convolutions with many weights and few pixels as one matrix product, on a CPU.

For a convolution oneDNN first puts the weights in an order of its own, in each call. In the inner levels of a UNet, 4
or 8 pixels a side with 1280 channels, that takes longer than the sums, and as long for one latent as for two. A matrix
product reads the weights as they lie, once; what it wants in order are the few pixels. The sums are the same, in
another order: equal to fp32 rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch

from ...common.measured import measured_once
from ...common.timing import MARGIN, apart, least_seconds
from ...common.torch_private import has_plain_convolution
from ...patching.layer_forwards import (
    Replaced,
    casts,
    computes_as,
    forwards_replaced,
    is_fp32_on_cpu,
)
from .onednn import linear, why_not

log = logging.getLogger(__name__)

# With fewer weights their order hardly costs time.
_FEWEST_WEIGHTS = 1 << 20
# Inputs and outputs of convolutions in the inner levels of SD 1.x, and the rows and pixels a side at which products are
# tried, the fewest pixels first.
_CHANNELS = 1280
_SIZES = ((1, 4), (1, 8), (2, 8))
_MOST_PIXELS = 128
_ROUNDS = 3


@cache
def most_pixels_here() -> int:
    """Up to how many pixels, over all rows, a product is clearly faster at 1280 channels; 0 where it never is.

    Measured once a machine, in a quarter of a second.
    """
    pixels = [rows * side * side for rows, side in _SIZES]
    return 0 if why_not() else measured_once("most pixels of a convolution as a product", _most_pixels, [0, *pixels])


@apart("Timing ways to compute")
def _most_pixels() -> int:
    most, times = 0, []
    with torch.inference_mode():
        layer = torch.nn.utils.skip_init(torch.nn.Conv2d, _CHANNELS, _CHANNELS, 3, padding=1)
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        for rows, side in _SIZES:
            x = torch.ones(rows, _CHANNELS, side, side)
            ways = {"convolution": partial(layer, x), "product": partial(convolve, layer, x)}
            seconds = least_seconds(ways, rounds=(_ROUNDS, _ROUNDS))
            pixels = rows * side * side
            times.append(f"{pixels} pixels {1e3 * seconds['convolution']:.1f} and {1e3 * seconds['product']:.1f} ms")
            if seconds["product"] > MARGIN * seconds["convolution"]:
                break
            most = pixels
    log.info("Convolutions of %d channels on this CPU, as they are and as products: %s.", _CHANNELS, ", ".join(times))
    return most


def most_pixels() -> int:
    """Up to how many pixels at 1280 channels products are taken; also where they were slower and are asked for."""
    return most_pixels_here() or _MOST_PIXELS


def layers_with_many_weights(network: torch.nn.Module) -> Iterator[Any]:
    """The 2-D convolutions of `network` that a product may compute faster, whatever the type of their weights."""
    layers: Iterator[Any] = filter(_is_plain, network.modules())
    for layer in layers:
        if layer.weight.numel() >= _FEWEST_WEIGHTS and math.prod(layer.kernel_size) > 1:
            yield layer


def may_gain(network: torch.nn.Module) -> bool:
    """Whether a product may compute any layer of `network` faster here, at some size of the image."""
    fp32 = (
        layer for layer in layers_with_many_weights(network) if layer.weight.dtype == torch.float32 and not casts(layer)
    )
    return next(fp32, None) is not None and most_pixels_here() > 0


def few_pixels_as_products(network: torch.nn.Module) -> AbstractContextManager[Replaced]:
    """While entered, the fp32 2-D convolutions of `network` on the CPU are matrix products where they have many weights
    and few pixels."""
    return forwards_replaced(layers_with_many_weights(network), convolve, _suits)


def convolve(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the 2-D convolution `layer` computes of `x`, [rows, channels, height, width]."""
    columns = torch.nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    rows, _, pixels = columns.shape
    products = linear(columns.transpose(1, 2).flatten(0, 1), layer.weight.flatten(1), layer.bias)
    result = products.view(rows, pixels, -1).transpose(1, 2).contiguous()
    return result.view(rows, layer.out_channels, *_size_of_result(layer, x))


def _size_of_result(layer: Any, x: torch.Tensor) -> list[int]:
    sizes = zip(x.shape[-2:], layer.kernel_size, layer.dilation, layer.padding, layer.stride, strict=True)
    return [(size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, dilation, padding, stride in sizes]  # fmt: skip


def _is_plain(part: Any) -> bool:
    return computes_as(part, torch.nn.Conv2d) and has_plain_convolution(part)


def _suits(layer: Any, x: Any) -> bool:
    """Whether a product computes this as PyTorch would, and has few enough pixels to be faster."""
    weight = layer.weight
    if not is_fp32_on_cpu(x, weight, layer.bias) or x.ndim != 4 or x.numel() == 0 or _products_are_less_exact():
        return False
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    # PyTorch's own error names the sizes that do not fit.
    if not weight.is_contiguous() or x.shape[1] != weight.shape[1]:
        return False
    pixels = x.shape[0] * math.prod(_size_of_result(layer, x))
    most = most_pixels()
    return pixels > 0 and pixels * _CHANNELS <= most * weight.shape[0]


def _products_are_less_exact() -> bool:
    """PyTorch lets a program ask for bf16 or TF32 inside of fp32 products, and asks about convolutions apart."""
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "") in ("bf16", "tf32")

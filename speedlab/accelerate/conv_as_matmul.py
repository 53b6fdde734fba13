"""Convolutions with many weights and few pixels as one matrix product, on a CPU.

For a convolution oneDNN first puts the weights in an order of its own, in each call. In the inner levels of a UNet, 4
or 8 pixels a side with 1280 channels, that takes longer than the sums, and as long for one latent as for two. A matrix
product reads the weights as they lie, once; what it wants in order are the few pixels. The sums are the same, in
another order: equal to fp32 rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from .layer_forwards import MARGIN, casts, forwards_replaced, is_fp32_on_cpu, is_traced, least_seconds
from .onednn_linear import linear, why_not

log = logging.getLogger(__name__)

# With fewer weights their order costs nothing to speak of.
_FEWEST_WEIGHTS = 1 << 20
# Pixels, over all rows, for each of which a layer must have so many output channels: with more of them the weights no
# longer outweigh the pixels.
_CHANNELS_A_PIXEL = 4
# Inputs, outputs and pixels a side of a convolution in the inner levels of SD 1.x.
_SHAPE = (1280, 1280, 4)
# That many weights in turn: one alone could stay in the cache.
_WEIGHTS = 2


@cache
def is_faster_here() -> bool:
    """Whether products are clearly faster for such convolutions: measured once a process, in a fifth of a second."""
    if why_not():
        return False
    inputs, outputs, side = _SHAPE
    with torch.inference_mode():
        x = torch.ones(1, inputs, side, side)
        layers = [torch.nn.utils.skip_init(torch.nn.Conv2d, inputs, outputs, 3, padding=1) for _ in range(_WEIGHTS)]
        for layer in layers:
            for parameter in layer.parameters():
                parameter.fill_(1.0)
        seconds = least_seconds({
            "convolution": lambda: [layer(x) for layer in layers],
            "product": lambda: [convolve(layer, x) for layer in layers],
        })  # fmt: skip
    faster = seconds["product"] <= MARGIN * seconds["convolution"]
    told = ", ".join(f"{name} {1e3 * best:.1f} ms" for name, best in seconds.items())
    log.info("Convolutions of few pixels are computed as %s (%s).", "products" if faster else "they are", told)
    return faster


def layers_with_many_weights(network: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The 2-D convolutions of `network` that a product may compute faster."""
    parts: Iterator[Any] = network.modules()
    for part in parts:
        if _is_plain(part) and part.weight.numel() >= _FEWEST_WEIGHTS and math.prod(part.kernel_size) > 1:
            yield part


def few_pixels_as_products(network: torch.nn.Module) -> AbstractContextManager[int]:
    """While entered, the fp32 2-D convolutions of `network` on the CPU are matrix products where they have many weights
    and few pixels; yields how many layers may be.

    Layers whose weights ComfyUI casts or patches in use, and code that a compiler traces, are left as they are.
    """
    return forwards_replaced(layers_with_many_weights(network), _forward_of)


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
    """Whether a layer computes what PyTorch's does: PyTorch's own, or ComfyUI's with its ways of casting."""
    if not isinstance(part, torch.nn.Conv2d) or "_conv_forward" in part.__dict__:
        return False
    if type(part)._conv_forward is not torch.nn.Conv2d._conv_forward:
        return False
    return type(part).forward is torch.nn.Conv2d.forward or hasattr(part, "comfy_cast_weights")


def _forward_of(layer: Any) -> Callable[..., Any]:
    plain = layer.forward

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced() or args or kwargs or casts(layer) or not _suits(layer, x):
            return plain(x, *args, **kwargs)
        return convolve(layer, x)

    return forward


def _suits(layer: Any, x: Any) -> bool:
    """Whether a product computes this as PyTorch would, and has few enough pixels to be faster."""
    weight = layer.weight
    if not is_fp32_on_cpu(x, weight, layer.bias) or x.ndim != 4 or x.numel() == 0:
        return False
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    # PyTorch's own error names the sizes that do not fit.
    if not weight.is_contiguous() or x.shape[1] != weight.shape[1]:
        return False
    pixels = x.shape[0] * math.prod(_size_of_result(layer, x))
    return pixels > 0 and pixels * _CHANNELS_A_PIXEL <= weight.shape[0]

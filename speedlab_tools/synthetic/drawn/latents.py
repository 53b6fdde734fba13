"""What a latent of the drawn world is: an encoder that is arithmetic, in TAESD's layout, and where its decoder begins.

A block of 8x8 pixels becomes four numbers: brightness, two differences of colour, and how the brightness rises towards
the lower right. They are sums of pixels, so TAESD's convolutions can hold them exactly, and the UNet's training does
not wait for an encoder. Only the decoder is trained: it finds the edges again.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ..files import Adjust, Layout, Weight, draw
from ..taesd import decoder_layout, encoder_layout

Array = NDArray[np.float32]

SIDE = 8
# Rows: what each number of the latent takes of red, green, blue; the last takes its share of the slope instead.
_MIX = np.array([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.0, -0.5], [-0.25, 0.5, -0.25]], dtype=np.float64)
# Mean and standard deviation of the four over the drawn world; the last is mostly 0 and at edges large, and is damped.
MEAN = np.array([0.51, 0.075, -0.005, 0.0])
STD = np.array([0.24, 0.24, 0.12, 0.2])


def encode(pictures: NDArray[np.uint8]) -> Array:
    """Latents (n, 4, height / 8, width / 8) of pictures (n, height, width, 3)."""
    pixels = pictures.astype(np.float32) / 255.0
    n, height, width, _ = pixels.shape
    blocks = pixels.reshape(n, height // SIDE, SIDE, width // SIDE, SIDE, 3)
    means = blocks.mean(axis=(2, 4)) @ _MIX.T.astype(np.float32)
    steps = np.arange(SIDE, dtype=np.float32)
    ramp = steps[:, None] + steps[None, :] - (SIDE - 1)
    slope = np.einsum("nyaxbc,ab->nyx", blocks, ramp) / (3 * SIDE * SIDE)
    raw = np.concatenate([means, slope[..., None]], axis=-1)
    return ((raw - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2).copy()


def encoder() -> Layout:
    """TAESD's encoder with the weights of `encode`: nothing in it is random and nothing is trained."""
    layout = encoder_layout()
    edits: dict[str, Adjust] = {"0.weight": _copy_colours}
    for index, size in ((2, 1), (6, 2), (10, 4)):
        edits[f"{index}.weight"] = partial(_halve, step=float(size))
    edits["14.weight"], edits["14.bias"] = _mix, _shift
    return Layout({name: Weight(weight.shape, adjust=edits.get(name)) for name, weight in layout.items()})


# Channels: red, green, blue, and the slope as two numbers of which one is zero, since a ReLU follows.
_UP, _DOWN = 3, 4


def _copy_colours(weight: torch.Tensor) -> None:
    for colour in range(3):
        weight[colour, colour, 1, 1] = 1.0


def _halve(weight: torch.Tensor, step: float) -> None:
    """Means of 2x2, and the slope over twice the distance; the taps of stride 2 that lie on the four are 1 and 2."""
    for y in (1, 2):
        for x in (1, 2):
            for colour in range(3):
                weight[colour, colour, y, x] = 0.25
                rise = (y + x - 3) * step * 0.25 / 3
                weight[_UP, colour, y, x] = rise
                weight[_DOWN, colour, y, x] = -rise
            weight[_UP, _UP, y, x] = weight[_DOWN, _DOWN, y, x] = 0.25
            weight[_UP, _DOWN, y, x] = weight[_DOWN, _UP, y, x] = -0.25


def _mix(weight: torch.Tensor) -> None:
    for number in range(3):
        for colour in range(3):
            weight[number, colour, 1, 1] = float(_MIX[number, colour] / STD[number])
    weight[3, _UP, 1, 1], weight[3, _DOWN, 1, 1] = float(1 / STD[3]), float(-1 / STD[3])


def _shift(bias: torch.Tensor) -> None:
    bias.copy_(torch.from_numpy(-MEAN / STD))


def decoder_start(seed: int = 0) -> dict[str, torch.Tensor]:
    """TAESD's decoder before training: random, with a way for the mean colour of each block straight to the picture."""
    tensors = {name: draw(name, weight, seed, torch.float32, "cpu") for name, weight in decoder_layout().items()}
    inverse = np.linalg.inv(_MIX)
    for name, tensor in tensors.items():
        if name == "1.weight":
            tensor[:3] = 0.0
            tensor[:3, :3, 1, 1] = torch.from_numpy(inverse * STD[None, :3]).float()
        elif name == "1.bias":
            tensor[:3] = torch.from_numpy(inverse @ MEAN[:3]).float()
        elif ".conv.4." in name:
            tensor[:3] = 0.0
        elif tensor.dim() == 4 and tensor.shape[:2] == (64, 64) and ".conv." not in name:
            tensor[:3] = 0.0
            for colour in range(3):
                tensor[colour, colour, 1, 1] = 1.0
        elif tensor.shape[0] == 3 and tensor.dim() == 4:
            tensor.mul_(0.1)
            tensor[:, :3] = 0.0
            for colour in range(3):
                tensor[colour, colour, 1, 1] = 1.0
        elif tensor.shape[0] == 3:
            tensor.zero_()
    return tensors

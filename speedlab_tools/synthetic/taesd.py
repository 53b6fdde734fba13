"""Tiny autoencoders (TAESD) with random weights, in the layout of the published files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch

from .files import AFTER_RELU, RESIDUAL, Layout, Weight, describe, draw, write_weights

TaesdName = Literal["taesd", "taesdxl"]

_WIDTH = 64
_BLOCKS_A_LEVEL = 3
# Bring random images and random latents to about the contrast of real ones.
_IMAGE_GAIN, _LATENT_GAIN = 0.6, 10.0


def write_taesd(folder: str | Path, name: TaesdName = "taesd", seed: int = 0) -> tuple[Path, Path]:
    """Writes `<name>_encoder.safetensors` and `<name>_decoder.safetensors` (fp32) and returns both paths.

    Raises ValueError for another name and OSError when a file cannot be written.
    """
    paths = {}
    for part, layout in _parts(name):
        path = Path(folder) / f"{name}_{part}.safetensors"
        metadata = describe(f"demo {name} {part}", seed=seed)
        paths[part] = write_weights(path, layout, _seed(name, part, seed), torch.float32, metadata)
    return paths["encoder"], paths["decoder"]


def taesd_state_dicts(name: TaesdName = "taesd", seed: int = 0) -> tuple[dict[str, torch.Tensor], ...]:
    """Encoder and decoder as `write_taesd` writes them."""
    return tuple(
        {key: draw(key, weight, _seed(name, part, seed), torch.float32, "cpu") for key, weight in layout.items()}
        for part, layout in _parts(name)
    )


def _seed(name: str, part: str, seed: int) -> int:
    """One stream of numbers a file: encoder and decoder share layer names."""
    return 4 * seed + 2 * get_args(TaesdName).index(name) + (part == "decoder")


def _parts(name: str) -> Iterator[tuple[str, Layout]]:
    if name not in get_args(TaesdName):
        raise ValueError(f"tiny autoencoder {name!r} is unknown; choose one of {', '.join(get_args(TaesdName))}")
    yield "encoder", encoder_layout()
    yield "decoder", decoder_layout()


def encoder_layout() -> Layout:
    """Every parameter of the encoder."""
    layout = Layout()
    layout.conv("0", 3, _WIDTH)
    _block(layout, "1")
    index = 2
    for _ in range(3):
        layout.conv(str(index), _WIDTH, _WIDTH, bias=False)
        for block in range(1, _BLOCKS_A_LEVEL + 1):
            _block(layout, str(index + block))
        index += 1 + _BLOCKS_A_LEVEL
    layout.conv(str(index), _WIDTH, 4, gain=_LATENT_GAIN)
    return layout


def decoder_layout() -> Layout:
    """Every parameter of the decoder."""
    layout = Layout()
    layout.conv("1", 4, _WIDTH, gain=AFTER_RELU)  # 0 is a clamp, 2 a ReLU
    index = 3
    for _ in range(3):
        for block in range(_BLOCKS_A_LEVEL):
            _block(layout, str(index + block))
        index += _BLOCKS_A_LEVEL + 1  # an upsampling without parameters
        layout.conv(str(index), _WIDTH, _WIDTH, bias=False)
        index += 1
    _block(layout, str(index))
    layout.conv(str(index + 1), _WIDTH, 3, gain=_IMAGE_GAIN)
    layout[f"{index + 1}.bias"] = Weight((3,), std=0.02, mean=0.5)  # images lie in 0..1
    return layout


def _block(layout: Layout, name: str) -> None:
    layout.conv(f"{name}.conv.0", _WIDTH, _WIDTH)
    layout.conv(f"{name}.conv.2", _WIDTH, _WIDTH, gain=AFTER_RELU)
    layout.conv(f"{name}.conv.4", _WIDTH, _WIDTH, gain=RESIDUAL * AFTER_RELU)

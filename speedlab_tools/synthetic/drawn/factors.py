"""The model's weights as factors: which layers have how many, and the checkpoint that is built from them.

A large layer is the product of two thin matrices; the text encoder is the demo checkpoint's random one and costs
nothing. The first convolution, the last and the way between them begin as the random UNet's, which hands the noise on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..files import Layout
from ..spec import DRAWN
from ..unet import unet_layout

UNET = DRAWN
LAST_BLOCK = 5
# Dense, because the noise goes through them from the start.
DENSE = ("input_blocks.0.0", f"output_blocks.{LAST_BLOCK}.0.skip_connection", "out.2")
Tensors = dict[str, torch.Tensor]


def unet() -> Layout:
    """Every parameter of the UNet by its name."""
    return unet_layout(UNET)


def rank_of(layer: str, shape: tuple[int, ...]) -> int | None:
    """How many factors a layer has; None for one that is kept whole: norms, biases, and what is small anyway."""
    if len(shape) < 2 or layer in DENSE:
        return None
    if "emb_layers" in layer:
        return 16
    return 64 if (len(shape) == 4 and shape[2] == 3) or "attn2.to_" in layer else 48


def multiply(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The weight of a layer whose input goes through `first` (rank x inputs) and then `second` (outputs x rank)."""
    return (second.flatten(1) @ first.flatten(1)).reshape(second.shape[0], *first.shape[1:])


def merged(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Factors `<layer>.first` and `<layer>.second` made into `<layer>.weight`; everything else as it is."""
    whole: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".first"):
            layer = name.removesuffix(".first")
            whole[f"{layer}.weight"] = multiply(tensor, tensors[f"{layer}.second"])
        elif not name.endswith(".second"):
            whole[name] = tensor
    return whole

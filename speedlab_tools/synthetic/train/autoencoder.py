"""TAESD's decoder, trained to find the edges of drawn scenes in latents that are arithmetic and a little noisy."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from speedlab.measure.drawn import world

from ..drawn import latents

_WIDTH, _BLOCKS = 64, 3
_DECODER = 5
# The UNet's latents are not exact: the decoder learns to clean them.
NOISE = 0.2
CROP = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convs = [nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def decoder(seed: int = 0) -> nn.Sequential:
    """The decoder before training, under the names of the published files."""
    parts: list[nn.Module] = [_Clamp(), nn.Conv2d(4, _WIDTH, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        parts += [Block() for _ in range(_BLOCKS)]
        parts += [nn.Upsample(scale_factor=2), nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False)]
    parts += [Block(), nn.Conv2d(_WIDTH, 3, 3, padding=1)]
    net = nn.Sequential(OrderedDict((str(index), part) for index, part in enumerate(parts)))
    net.load_state_dict(latents.decoder_start(seed))
    return net


def batch(seed: int, step: int, count: int, side: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and pictures (in 0..1) of parts of drawn scenes."""
    rng = world.generator(seed, _DECODER, step)
    crops = []
    for _ in range(count):
        picture = world.draw(world.random_scene(rng), rng, side)
        y, x = (int(n) * latents.SIDE for n in rng.integers(side // latents.SIDE - CROP + 1, size=2))
        crops.append(picture[y : y + CROP * latents.SIDE, x : x + CROP * latents.SIDE])
    pictures = np.stack(crops)
    exact = latents.encode(pictures)
    strength = rng.random((count, 1, 1, 1)) * NOISE
    noisy = exact + (strength * rng.standard_normal(exact.shape)).astype(np.float32)
    return torch.from_numpy(noisy).float(), torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0


def loss(net: nn.Module, noisy: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Absolute error of the pictures and, once more, of their differences between neighbours: edges stay sharp."""
    error = net(noisy).float() - pictures
    across, down = error.diff(dim=3), error.diff(dim=2)
    return error.abs().mean() + across.abs().mean() + down.abs().mean()

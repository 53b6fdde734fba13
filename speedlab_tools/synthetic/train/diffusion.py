"""Noise and its removal: Stable Diffusion 1.x's schedule, how timesteps are drawn, and a plain sampler for sheets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

STEPS = 1000
MIN_SNR = 5.0
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def signal_shares() -> np.ndarray:
    """alpha-bar of each of the 1000 timesteps."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2
    return np.cumprod(1.0 - betas)


def draw_timesteps(count: int, rng: np.random.Generator, gamma: float = MIN_SNR) -> np.ndarray:
    """Timesteps for a batch, spread evenly over the weight of min-SNR.

    A loss on the noise is weighted by min(SNR, gamma) / SNR. Drawing timesteps as often as that says, and weighting
    none, has the same mean and a smaller variance.
    """
    share = signal_shares()
    snr = share / (1 - share)
    weight = np.cumsum(np.minimum(snr, gamma) / snr)
    at = (rng.permutation(count) + rng.random(count)) / count
    return np.searchsorted(weight / weight[-1], at).clip(0, STEPS - 1)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, t: np.ndarray) -> torch.Tensor:
    """What a timestep leaves of the latents, with a variance of about 1."""
    share = torch.from_numpy(signal_shares()[t]).float()[:, None, None, None]
    return share.sqrt() * latents + (1 - share).sqrt() * noise


def without_signal(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Noise that takes away what the schedule leaves of the latents at its last timestep.

    Stable Diffusion's schedule ends at 7 % of the signal, and a network learns to read an image's mean from it; a
    sampler begins with noise alone, of mean zero, so backgrounds turn grey (Lin et al. 2023, arXiv:2305.08891). With
    k the last ratio of signal to noise, x = clean + sigma * (noise - k * clean) is noise alone at the last sigma and
    lies on the straight path that a sampler follows from there; what is predicted still gives `clean` the usual way.
    """
    share = float(signal_shares()[-1])
    return noise - (share / (1 - share)) ** 0.5 * latents


@torch.no_grad()
def sample(
    net: Predict, context: torch.Tensor, empty: torch.Tensor, side: int, steps: int, cfg: float, seed: int
) -> torch.Tensor:
    """DDIM with guidance: latents (n, 4, side, side)."""
    share = torch.from_numpy(signal_shares()).float()
    times = np.linspace(STEPS - 1, 0, steps).round().astype(int)
    count = len(context)
    x = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([context, empty.expand_as(context)])
    for index, t in enumerate(times):
        predicted = net(torch.cat([x, x]), torch.full((2 * count,), float(t)), both).float()
        with_text, without = predicted.chunk(2)
        noise = without + cfg * (with_text - without)
        clean = (x - (1 - share[t]).sqrt() * noise) / share[t].sqrt()
        before = share[times[index + 1]] if index + 1 < steps else torch.tensor(1.0)
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    return x

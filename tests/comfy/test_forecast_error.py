"""What Forecast's error control is worth, on models whose exact answers are known.

The error is the distance from the run with all steps, relative to its latent; the rival is the same sampler with as
many plain steps as were evaluated.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from . import mixture

SEEDS = range(16)


@pytest.fixture(scope="module")
def clear(comfy: ModuleType) -> mixture.Oracle:
    """Components that lie well apart."""
    return mixture.build()


@pytest.fixture(scope="module")
def crowded(comfy: ModuleType) -> mixture.Oracle:
    """Components that overlap, so that the denoised latent goes on changing at all noise levels."""
    return mixture.build(spread=0.3, width=0.9)


@pytest.fixture(scope="module")
def compare(pack: ModuleType) -> Callable[..., Any]:
    module = importlib.import_module("speedlab.techniques.forecast.attach")

    def measured(oracle: mixture.Oracle, plain_steps: int | None = None, **how: Any) -> Any:
        """Full steps, errors of Forecast at its defaults, and errors of `plain_steps` plain steps, a number a seed."""
        model = module.attach_forecast(oracle.model, module.ForecastConfig())
        full, errors, plain = [], [], []
        for seed in SEEDS:
            reference = oracle.sample(seed=seed, **how)
            oracle.denoiser.calls = 0
            errors.append(mixture.error(oracle.sample(model, seed=seed, **how), reference))
            full.append(oracle.denoiser.calls // 2)
            steps = plain_steps or full[-1]
            plain.append(mixture.error(oracle.sample(seed=seed, **{**how, "steps": steps}), reference))
        return full, errors, plain

    return measured


def test_the_denoiser_is_exact(clear: mixture.Oracle) -> None:
    """Against the mean of many images that were drawn from the mixture, weighted by how likely each gives `noisy`."""
    denoiser = mixture.Denoiser(0, 1.0, 0.5)
    generator = torch.Generator().manual_seed(1)
    denoiser.means, denoiser.variances = denoiser.means[:5, :2], denoiser.variances[:5]
    chosen = torch.randint(5, (400_000,), generator=generator)
    noise = torch.randn(400_000, 2, generator=generator).double()
    images = denoiser.means[chosen] + denoiser.variances[chosen, None].sqrt() * noise
    noisy, sigma = torch.tensor([[0.7, -0.4]]).double(), torch.tensor([[0.8]]).double()
    likely = (-(noisy - images).square().sum(1) / (2 * sigma[0] ** 2)).softmax(0)
    expected = denoiser.expected(noisy, sigma, torch.zeros(1, 5).double())
    assert torch.allclose(expected, (likely[:, None] * images).sum(0)[None], atol=5e-3)


def test_comfyui_gets_the_exact_answer(clear: mixture.Oracle) -> None:
    model, denoiser = clear.model.model, clear.denoiser
    x, sigma = torch.randn(3, *mixture.SIZE) * 4, torch.tensor([3.0, 1.0, 0.2])
    context = torch.zeros(3, 1, mixture.COMPONENTS)
    made = model.apply_model(x, sigma, c_crossattn=context, transformer_options={"sigmas": sigma})
    expected = denoiser.expected(x.double().flatten(1), sigma.double()[:, None], context[:, 0].double())
    assert torch.allclose(made.flatten(1).double(), expected, atol=1e-4)


def test_euler_karras(clear: mixture.Oracle, compare: Any) -> None:
    full, errors, plain = compare(clear, 13, steps=20, sampler="euler", scheduler="karras")
    assert statistics.mean(full) <= 13
    assert statistics.median(errors) <= statistics.median(plain) / 3


@pytest.mark.parametrize(("sampler", "share"), [("euler", 8), ("dpmpp_2m", 4)])
def test_normal_schedule(clear: mixture.Oracle, compare: Any, sampler: str, share: int) -> None:
    full, errors, plain = compare(clear, 15, steps=30, sampler=sampler, scheduler="normal")
    assert statistics.mean(full) <= 15
    assert statistics.median(errors) <= statistics.median(plain) / share


@pytest.mark.parametrize(
    ("sampler", "scheduler", "gains"),
    [("euler", "karras", True), ("euler", "normal", True), ("dpmpp_2m", "normal", True), ("dpmpp_2m", "karras", False)],
)
def test_where_the_image_goes_on_changing_more_steps_are_evaluated(
    clear: mixture.Oracle, crowded: mixture.Oracle, compare: Any, sampler: str, scheduler: str, gains: bool
) -> None:
    """The error stays within the tolerance. DPM++ 2M on Karras sigmas does as well with fewer plain steps."""
    how = {"steps": 20, "sampler": sampler, "scheduler": scheduler}
    full, errors, plain = compare(crowded, **how)
    assert statistics.mean(full) > statistics.mean(compare(clear, **how)[0])
    assert statistics.median(errors) <= 0.02
    assert (statistics.median(errors) < 0.6 * statistics.median(plain)) is gains


@pytest.mark.parametrize(
    "sampler",
    ["euler_ancestral", "lcm",
     *(pytest.param(name, marks=pytest.mark.full) for name in ("dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde"))],
)  # fmt: skip
def test_ancestral_samplers(clear: mixture.Oracle, crowded: mixture.Oracle, compare: Any, sampler: str) -> None:
    """New noise at each step: nothing is left out, but where the image hardly depends on it any more."""
    how = {"steps": 20, "sampler": sampler, "scheduler": "karras"}
    _, errors, _ = compare(crowded, **how)
    assert max(errors) == 0.0
    _, errors, _ = compare(clear, **how)
    assert statistics.median(errors) <= 0.02 and max(errors) <= 0.05

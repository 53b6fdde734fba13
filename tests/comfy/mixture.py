"""A model whose answers are exact: the denoiser of a Gaussian mixture, behind ComfyUI's model interface.

Given x = image + sigma * noise with an image from the mixture, the mean of the image is known in closed form. ComfyUI
samples with it as with any SD 1.x model: the text tells which components the prompt means, and guidance pushes away
from the mixture of all. What a technique does to the latent is then known, without a trained network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

COMPONENTS, SIZE = 48, (4, 8, 8)
# What a component outside of a prompt weighs in it: its text is not heard there at all.
_UNHEARD = -60.0


class Denoiser(torch.nn.Module):
    """In the place of the UNet: predicts the noise of x / sqrt(sigma^2 + 1), for the sigma that ComfyUI names.

    Components have random means and one standard deviation each; the context [rows, 1, COMPONENTS] holds the logarithm
    of their weights.
    """

    def __init__(self, seed: int, spread: float, width: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        pixels = SIZE[0] * SIZE[1] * SIZE[2]
        self.dtype = torch.float32
        self.register_buffer("means", spread * torch.randn(COMPONENTS, pixels, generator=generator).double())
        scale = torch.rand(COMPONENTS, generator=generator).double()
        self.register_buffer("variances", (width * (0.5 + scale)) ** 2)
        self.calls = 0

    def forward(
        self, x: Any, timesteps: Any, context: Any = None, control: Any = None, transformer_options: Any = None
    ) -> torch.Tensor:
        """Inside the wrappers of the diffusion model, as ComfyUI's own networks are."""
        from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self.noise, self, wrappers)
        return executor.execute(x, timesteps, context, transformer_options)

    def noise(self, x: torch.Tensor, timesteps: Any, context: Any, transformer_options: Any) -> torch.Tensor:
        self.calls += len(x)
        sigmas = transformer_options["sigmas"].double()
        sigma = sigmas.repeat(len(x) // len(sigmas))[:, None]
        noisy = x.double().flatten(1) * (sigma**2 + 1.0).sqrt()
        weights = context[:, 0, :COMPONENTS].double()
        clean = self.expected(noisy, sigma, weights)
        return ((noisy - clean) / sigma).to(x.dtype).reshape(x.shape)

    def expected(self, noisy: torch.Tensor, sigma: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The mean [B, P] of the image behind `noisy` [B, P] at `sigma` [B, 1], by Bayes' rule."""
        variances = self.variances + sigma**2  # [B, K]
        gaps = noisy[:, None] - self.means  # [B, K, P]
        log = weights - gaps.square().sum(2) / (2 * variances) - gaps.shape[2] / 2 * variances.log()
        shares = log.softmax(1)
        shrunk = self.means + (self.variances / variances)[..., None] * gaps
        return (shares[..., None] * shrunk).sum(1)


@dataclass
class Oracle:
    """A ModelPatcher on a Denoiser, and the prompts that it understands."""

    model: Any

    @property
    def denoiser(self) -> Denoiser:
        return self.model.model.diffusion_model

    def cond(self, seed: int | None) -> list:
        """A prompt that means six components; None means all of them."""
        weights = torch.full((1, 1, COMPONENTS), _UNHEARD if seed is not None else 0.0)
        if seed is not None:
            meant = torch.randperm(COMPONENTS, generator=torch.Generator().manual_seed(seed))[:6]
            weights[..., meant] = 0.0
        return [[weights, {}]]

    def sample(
        self, model: Any = None, *, steps: int, seed: int = 0, sampler: str = "euler", scheduler: str = "karras",
        cfg: float = 7.0, batch: int = 1, sigmas: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The latent of one seed, which chooses prompt and noise."""
        import comfy.sample
        import comfy.samplers

        model = self.model if model is None else model
        latent = torch.zeros(batch, *SIZE)
        noise = comfy.sample.prepare_noise(latent, seed)
        if sigmas is None:
            sigmas = comfy.samplers.KSampler(model, steps, "cpu", sampler, scheduler).sigmas
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.cond(seed), self.cond(None))
        guider.set_cfg(cfg)
        with torch.inference_mode():
            return guider.sample(
                noise, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=seed
            )


def build(seed: int = 0, spread: float = 1.0, width: float = 0.5) -> Oracle:
    """An oracle; equal arguments give equal mixtures."""
    import comfy.model_patcher
    import comfy.supported_models

    cpu = torch.device("cpu")
    config = comfy.supported_models.SD15({"image_size": 8, "in_channels": 4, "context_dim": COMPONENTS})
    config.unet_config["disable_unet_model_creation"] = True
    model = config.get_model({}, "", device=cpu)
    model.diffusion_model = Denoiser(seed, spread, width)
    return Oracle(comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu))


def error(latent: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative distance of two latents."""
    return float((latent - reference).norm() / reference.norm())

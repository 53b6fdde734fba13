"""The jobs of `accelerate.py`: full-size SD 1.5, stock ComfyUI, this pack's nodes, and the rivals beside them."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

CHECKPOINT = "speedlab_full_sd15_fp32.safetensors"
PROMPT, NEGATIVE = "a lighthouse on a rocky coast at dawn, photograph", "text, watermark, blurry"
SEED, CFG, SAMPLER, SCHEDULER = 20230711, 7.0, "euler", "normal"


@dataclass(frozen=True)
class Plan:
    """What of this pack is on the model. `interval` 1 is no DeepCache, `stop_at` 1 no Dynamic CFG."""

    attention: str | None = "sdpa"
    interval: int = 1
    stop_at: float = 1.0
    linear: str = "keep"
    memory: str = "keep"
    convolution: str = "keep"


@dataclass
class Bench:
    """Models and conditioning, each made on first use."""

    pack: Any
    base: Path
    _latents: dict[tuple, Any] = field(default_factory=dict)

    @cached_property
    def core(self) -> Any:
        return importlib.import_module("nodes")

    def node(self, node_id: str) -> Any:
        return self.pack.NODE_CLASS_MAPPINGS[node_id]()

    @cached_property
    def stock(self) -> tuple[Any, Any, Any]:
        """Model, CLIP and VAE as ComfyUI's own loader gives them."""
        return tuple(self.core.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT))  # type: ignore[return-value]

    @cached_property
    def bf16(self) -> Any:
        return self.node("SpeedLabCheckpointLoader").load(CHECKPOINT, "bf16", "contiguous")[0]

    @cached_property
    def conds(self) -> tuple[Any, Any]:
        return self.encode()

    def encode(self) -> tuple[Any, Any]:
        encoder = self.core.CLIPTextEncode()
        return tuple(encoder.encode(self.stock[1], text)[0] for text in (PROMPT, NEGATIVE))  # type: ignore[return-value]

    def patched(self, plan: Plan, model: Any = None) -> Any:
        """The plan's nodes on a model, stock ComfyUI's where none is given."""
        model = self.stock[0] if model is None else model
        if plan.attention is not None:
            (model,) = self.node("SpeedLabAttention").apply(model, plan.attention)
        precision = self.node("SpeedLabPrecision")
        flags = ("keep", "keep", "keep", "keep", "keep", "off")
        (model,) = precision.apply(model, *flags, plan.linear, plan.memory, plan.convolution)
        (model,) = self.node("SpeedLabDeepCache").apply(model, plan.interval, 0, 0.0, 1.0, "uniform")
        (model,) = self.node("SpeedLabDynamicCFG").apply(model, "fixed", plan.stop_at, 0.99)
        return model

    def sample(self, model: Any, size: int, steps: int, conds: Any = None) -> Any:
        """ComfyUI's KSampler on an empty latent; returns the latent [1, 4, size/8, size/8]."""
        import torch

        positive, negative = conds or self.conds
        latent = {"samples": torch.zeros(1, 4, size // 8, size // 8)}
        sampler = self.core.KSampler()
        (result,) = sampler.sample(model, SEED, steps, CFG, SAMPLER, SCHEDULER, positive, negative, latent)
        return result["samples"]

    def sampling(self, plan: Plan, size: int, steps: int) -> Callable[[], Any]:
        return lambda: self.sample(self.patched(plan), size, steps)

    def stock_picture(self, size: int, steps: int, model: Any = None) -> Any:
        """Stock ComfyUI from text to picture; returns the latent."""
        conds = self.encode()
        latent = self.sample(self.stock[0] if model is None else model, size, steps, conds)
        self.core.VAEDecode().decode(self.stock[2], {"samples": latent})
        return latent

    def our_picture(self, plan: Plan, size: int, steps: int, bf16: bool = False) -> Any:
        """The same with a plan of this pack and the Tiny VAE; returns the latent."""
        encoder = self.node("SpeedLabTextEncode")
        conds = tuple(encoder.encode(self.stock[1], text)[0] for text in (PROMPT, NEGATIVE))
        model = self.patched(plan, self.bf16 if bf16 else None)
        latent = self.sample(model, size, steps, conds)
        self.node("SpeedLabTinyVAEDecode").decode({"samples": latent}, "taesd", 1, 0, model)
        return latent

    def easy_cache(self, threshold: float) -> Any:
        """Stock ComfyUI's model with core's EasyCache in its default window."""
        node = importlib.import_module("comfy_extras.nodes_easycache").EasyCacheNode
        return node.execute(self.stock[0], threshold, 0.15, 0.95, False).args[0]

    @cached_property
    def diffusers_unet(self) -> Any:
        """The stock model's weights in diffusers' UNet of SD 1.5."""
        import comfy.utils
        import torch
        from diffusers import UNet2DConditionModel

        config = self.stock[0].model.model_config.unet_config
        channels = tuple(config["model_channels"] * times for times in config["channel_mult"])
        layers = config["num_res_blocks"][0]
        down, up = config["transformer_depth"][::layers], config["transformer_depth_output"][:: -layers - 1]
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=channels, layers_per_block=layers, attention_head_dim=8,
                cross_attention_dim=config["context_dim"],
                down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in down],
                up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up],
            )  # fmt: skip
        ours = self.stock[0].model.diffusion_model.state_dict()
        names = comfy.utils.unet_to_diffusers(config)
        needed = unet.state_dict()
        unet.load_state_dict({theirs: ours[name] for theirs, name in names.items() if theirs in needed}, assign=True)
        return unet.eval()

    def diffusers_picture(self, interval: int, size: int, steps: int) -> Any:
        """The same job in diffusers: its UNet, Euler, the same full VAE, with DeepCache but for `interval` 1."""
        import comfy.sample
        import comfy.samplers
        import torch

        conds = self.encode()
        sampling = self.stock[0].get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, steps)
        timesteps = sampling.timestep(sigmas[:-1]).float()
        unet = self.diffusers_unet
        helper = None
        if interval > 1:
            from DeepCache import DeepCacheSDHelper

            helper = DeepCacheSDHelper(pipe=_Pipe(unet, _Timesteps(timesteps)))
            helper.set_params(cache_interval=interval, cache_branch_id=0)
            helper.enable()
        try:
            context = torch.cat([conds[1][0][0], conds[0][0][0]])
            x = comfy.sample.prepare_noise(torch.zeros(1, 4, size // 8, size // 8), SEED)
            x = sampling.noise_scaling(sigmas[0], x, torch.zeros_like(x), True)
            for sigma, following, timestep in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
                scaled = x / (sigma**2 + 1) ** 0.5
                uncond, cond = unet(torch.cat([scaled] * 2), timestep, encoder_hidden_states=context).sample.chunk(2)
                x = x + (uncond + CFG * (cond - uncond)) * (following - sigma)
        finally:
            if helper is not None:
                helper.disable()
        latent = self.stock[0].model.process_latent_out(x)
        self.core.VAEDecode().decode(self.stock[2], {"samples": latent})
        return latent

    def make(self, *names: str) -> None:
        """Have ready what the next jobs use, so that none of them times it."""
        for name in names:
            getattr(self, name)

    def forget(self, *names: str) -> None:
        """Release what the next jobs do not need."""
        for name in names:
            self.__dict__.pop(name, None)
        gc.collect()


@dataclass
class _Timesteps:
    timesteps: Any


@dataclass
class _Pipe:
    unet: Any
    scheduler: _Timesteps


def prepare(base: Path, small: bool = False) -> None:
    """Write the full-size checkpoint and a Tiny VAE, both with random weights, where they are not there yet."""
    from speedlab_tools import synthetic

    checkpoint, size = base / "models" / "checkpoints" / CHECKPOINT, "small" if small else "full"
    if not checkpoint.exists():
        synthetic.write_checkpoint(checkpoint, synthetic.CheckpointSpec(family="sd15", size=size, dtype="fp32"))
    prepare_tiny(base)


def prepare_tiny(base: Path) -> None:
    """Write a Tiny VAE with random weights where there is none yet."""
    from speedlab_tools import synthetic

    if not (base / "models" / "vae_approx" / "taesd_decoder.safetensors").exists():
        synthetic.write_taesd(base / "models" / "vae_approx", "taesd")

"""Real ComfyUI models with a few million random parameters, made in memory, and one call that samples with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

CONTEXT, TOKENS, POOLED = 64, 7, 1280
# Four levels with attention on three of them, two residual blocks a level: SD 1.5's block structure, 12 + 1 + 12.
_SD = {
    "model_channels": 32,
    "channel_mult": [1, 2, 2, 2],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
# Three levels, none with attention on the first: 9 + 1 + 9.
_XL = {
    "model_channels": 64,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
# Two levels, one residual block a level: what is compiled many times should be small.
_MINI = {
    **_SD,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
}
# Attention on the lower level alone: half the work of a compiler, and still a block of each kind on both sides.
_SLIM = {**_MINI, "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}
# Three levels, attention on two of them, one residual block a level.
_DEEP = {
    **_MINI,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
}
# Both levels of one width: one kind of transformer, so one piece of generated code.
_FLAT = {**_MINI, "channel_mult": [1, 1]}
_LEVEL = {
    **_MINI,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("SD15", _SD),
    "mini": ("SD15", _MINI),
    "slim": ("SD15", _SLIM),
    "deep": ("SD15", _DEEP),
    "flat": ("SD15", _FLAT),
    "level": ("SD15", _LEVEL),
    "inpaint": ("SD15", {**_SD, "in_channels": 9}),
    "sd2": ("SD20", {**_SD, "model_channels": 64, "use_linear_in_transformer": True}),
    "sdxl": ("SDXL", _XL),
    "ssd1b": ("SSD1B", {**_XL, "transformer_depth_middle": -1}),
    "vega": ("Segmind_Vega", {**_XL, "transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": -1}),
    "koala": ("KOALA_700M", {**_XL, "transformer_depth_middle": -2}),
    "refiner": ("SDXLRefiner", {**_XL, "adm_in_channels": 2560}),
}


@dataclass
class TinyUNet:
    """A ModelPatcher on a tiny model, and what is needed to sample with it."""

    model: Any

    @property
    def unet(self) -> Any:
        return self.model.model.diffusion_model

    def cond(self, seed: int) -> list:
        """Conditioning of random numbers, with a pooled output for the models that take one."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return [
            [
                torch.randn(1, TOKENS, CONTEXT, generator=generator),
                {"pooled_output": torch.randn(1, POOLED, generator=generator)},
            ]
        ]

    def sample(
        self,
        model: Any = None,
        *,
        steps: int = 8,
        sampler: str = "euler",
        scheduler: str = "normal",
        cfg: float = 5.0,
        seed: int = 0,
        size: tuple[int, int] = (8, 8),
        batch: int = 1,
        positive: list | None = None,
        negative: list | None = None,
        latent: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The latent [batch, 4, *size] that `comfy.sample.sample` makes; `options` go to it as they are."""
        import comfy.sample

        latent = torch.zeros(batch, 4, *size) if latent is None else latent
        with torch.inference_mode():  # as ComfyUI runs its nodes
            return comfy.sample.sample(
                self.model if model is None else model,
                comfy.sample.prepare_noise(latent, seed),
                steps,
                cfg,
                sampler,
                scheduler,
                self.cond(1) if positive is None else positive,
                self.cond(2) if negative is None else negative,
                latent,
                disable_pbar=True,
                seed=seed,
                **options,
            )

    @contextmanager
    def split(self) -> Iterator[None]:
        """Make ComfyUI believe that only one cond fits in memory at a time."""
        factor, self.model.model.memory_usage_factor = self.model.model.memory_usage_factor, 1e12
        try:
            yield
        finally:
            self.model.model.memory_usage_factor = factor

    @contextmanager
    def counted(self) -> Iterator[list[tuple[int, bool]]]:
        """For each forward of the UNet that runs inside: its rows, and whether the deepest blocks ran."""
        calls: list[tuple[int, bool]] = []

        def enter(_module: Any, inputs: tuple) -> None:
            calls.append((inputs[0].shape[0], False))

        def deep(_module: Any, _inputs: tuple) -> None:
            calls[-1] = (calls[-1][0], True)

        handles = [
            self.unet.time_embed.register_forward_pre_hook(enter),
            self.unet.input_blocks[-1][0].register_forward_pre_hook(deep),
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def build(layout: str = "sd15", seed: int = 0) -> TinyUNet:
    """A tiny model of one of LAYOUTS; equal arguments give equal weights."""
    import comfy.model_patcher
    import comfy.supported_models

    class_name, changes = LAYOUTS[layout]
    shape = {"image_size": 32, "in_channels": 4, "out_channels": 4, "legacy": False, "use_spatial_transformer": True}
    lists = {key: list(value) if isinstance(value, list) else value for key, value in changes.items()}
    config = getattr(comfy.supported_models, class_name)({**shape, "context_dim": CONTEXT, **lists})
    model = config.get_model({}, "", device=torch.device("cpu"))
    fill(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return TinyUNet(comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu))


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights whose outputs stay near their inputs in size; norms near identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def watched(model: Any, look: Callable[[], Any], seen: list[Any]) -> Any:
    """A clone that looks at each forward, inside everything else."""

    def forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(look())
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key("diffusion_model", "watch", forward)
    return clone

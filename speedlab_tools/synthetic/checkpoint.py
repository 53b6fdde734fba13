"""Whole checkpoints: UNet, VAE and text encoders in the original key layout."""

from __future__ import annotations

from pathlib import Path

import torch

from .files import Progress, describe, write_weights
from .spec import CheckpointSpec, architecture
from .text import text_layout
from .unet import unet_layout
from .vae import vae_layout
from .weights import Layout, draw

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."


def checkpoint_layout(spec: CheckpointSpec) -> Layout:
    """Every parameter of the checkpoint by its name in the file."""
    design = architecture(spec)
    layout = Layout()
    layout.add(UNET_PREFIX, unet_layout(design.unet))
    layout.add(VAE_PREFIX, vae_layout())
    for text in design.text:
        layout.update(text_layout(text))
    return layout


def shapes(spec: CheckpointSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes, without making a tensor."""
    return {name: weight.shape for name, weight in checkpoint_layout(spec).items()}


def build_state_dict(spec: CheckpointSpec, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint on `device`, drawn there.

    On the CPU they equal what `write_checkpoint` writes; another kind of device has a generator of its own, and
    gives the same tensors only on its kind.
    """
    return {
        name: draw(name, weight, spec.seed, spec.torch_dtype, device)
        for name, weight in checkpoint_layout(spec).items()
    }


def write_vae(path: str | Path, seed: int = 0) -> Path:
    """Writes a VAE file of its own (fp16, finite in it) to `path`, unless a complete one lies there already."""
    return write_weights(Path(path), vae_layout(), seed, torch.float16, describe("demo VAE", seed=seed))


def write_checkpoint(path: str | Path, spec: CheckpointSpec, progress: Progress | None = None) -> Path:
    """Writes the safetensors file of `spec` to `path`, unless a complete one lies there already.

    Memory stays at a few times the largest tensor. Raises OSError when the file cannot be written.
    """
    metadata = describe("demo checkpoint", **spec.as_dict())
    return write_weights(Path(path), checkpoint_layout(spec), spec.seed, spec.torch_dtype, metadata, progress)

"""Whole checkpoints: UNet, VAE and text encoders in the original key layout.

Layouts of the CLIP text encoders, in the names of transformers (CLIP-L) and of OpenCLIP (CLIP-H, CLIP-G).

Layout of the Stable Diffusion autoencoder, in the names of the original checkpoints.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from .files import AFTER_GELU, AFTER_SILU, RESIDUAL, SHARP, Layout, Progress, Weight, describe, draw, write_weights
from .spec import CheckpointSpec, TextConfig, architecture
from .unet import unet_layout

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


# The stream starts at 0.67 and ends near 1 after any number of layers. Attention gets the larger part of what is
# added, so that every position, the padding included, learns of the whole prompt.
_TOKEN_STD, _POSITION_STD = 0.6, 0.3
_ATTENTION_TOTAL, _MLP_TOTAL = 0.8, 0.5
_LOGIT_SCALE = 4.6


def text_layout(config: TextConfig) -> Layout:
    """Every parameter of one text encoder, with its prefix in the checkpoint."""
    layout = Layout()
    layout.add(config.prefix, _open_clip(config) if config.open_clip else _transformers(config))
    return layout


def _gains(config: TextConfig) -> tuple[float, float]:
    share = 1.0 / math.sqrt(config.layers)
    return _ATTENTION_TOTAL * share, _MLP_TOTAL * share * AFTER_GELU


def _transformers(config: TextConfig) -> Layout:
    layout, width = Layout(), config.width
    attention_gain, mlp_gain = _gains(config)
    base = "transformer.text_model"
    layout[f"{base}.embeddings.position_ids"] = Weight((1, config.positions), integer=True)
    layout[f"{base}.embeddings.token_embedding.weight"] = Weight((config.vocabulary, width), _TOKEN_STD)
    layout[f"{base}.embeddings.position_embedding.weight"] = Weight((config.positions, width), _POSITION_STD)
    for index in range(config.layers):
        layer = f"{base}.encoder.layers.{index}"
        layout.linear(f"{layer}.self_attn.q_proj", width, width, SHARP)
        layout.linear(f"{layer}.self_attn.k_proj", width, width, SHARP)
        layout.linear(f"{layer}.self_attn.v_proj", width, width)
        layout.linear(f"{layer}.self_attn.out_proj", width, width, attention_gain)
        layout.norm(f"{layer}.layer_norm1", width)
        layout.linear(f"{layer}.mlp.fc1", width, 4 * width)
        layout.linear(f"{layer}.mlp.fc2", 4 * width, width, mlp_gain)
        layout.norm(f"{layer}.layer_norm2", width)
    layout.norm(f"{base}.final_layer_norm", width)
    return layout


def _open_clip(config: TextConfig) -> Layout:
    layout, width = Layout(), config.width
    attention_gain, mlp_gain = _gains(config)
    layout["model.positional_embedding"] = Weight((config.positions, width), _POSITION_STD)
    layout["model.text_projection"] = Weight((width, width), 1.0 / math.sqrt(width))
    layout["model.logit_scale"] = Weight((), mean=_LOGIT_SCALE)
    layout["model.token_embedding.weight"] = Weight((config.vocabulary, width), _TOKEN_STD)
    for index in range(config.layers):
        layer = f"model.transformer.resblocks.{index}"
        # Query, key and value lie in one matrix here and share one gain.
        layout[f"{layer}.attn.in_proj_weight"] = Weight((3 * width, width), SHARP / math.sqrt(width))
        layout[f"{layer}.attn.in_proj_bias"] = Weight((3 * width,), 0.02)
        layout.linear(f"{layer}.attn.out_proj", width, width, attention_gain / SHARP)
        layout.norm(f"{layer}.ln_1", width)
        layout.linear(f"{layer}.mlp.c_fc", width, 4 * width)
        layout.linear(f"{layer}.mlp.c_proj", 4 * width, width, mlp_gain)
        layout.norm(f"{layer}.ln_2", width)
    layout.norm("model.ln_final", width)
    return layout


_BASE, _MULT, _RES_BLOCKS, _LATENT = 128, (1, 2, 4, 4), 2, 4
# Raw latents have a standard deviation of about 5.5 (SD 1.x) to 7.7 (SDXL).
_LATENT_STD = 5.5
# Of a decoded image in -1..1: enough contrast to see, little enough to clip rarely.
_IMAGE_STD = 0.35


def vae_layout() -> Layout:
    """Every parameter of encoder and decoder, without prefix."""
    layout = Layout()
    _encoder(layout)
    _decoder(layout)
    layout.conv("quant_conv", 2 * _LATENT, 2 * _LATENT, kernel=1, gain=_LATENT_STD)
    layout.conv("post_quant_conv", _LATENT, _LATENT, kernel=1)
    return layout


def _encoder(layout: Layout) -> None:
    channels = _BASE
    layout.conv("encoder.conv_in", 3, channels, gain=2.0)
    for level, mult in enumerate(_MULT):
        for index in range(_RES_BLOCKS):
            _res_block(layout, f"encoder.down.{level}.block.{index}", channels, mult * _BASE)
            channels = mult * _BASE
        if level + 1 < len(_MULT):
            layout.conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    _middle(layout, "encoder.mid", channels)
    layout.norm("encoder.norm_out", channels)
    layout.conv("encoder.conv_out", channels, 2 * _LATENT, gain=AFTER_SILU)


def _decoder(layout: Layout) -> None:
    channels = _MULT[-1] * _BASE
    layout.conv("decoder.conv_in", _LATENT, channels, gain=1.0 / _LATENT_STD)
    _middle(layout, "decoder.mid", channels)
    for level, mult in reversed(list(enumerate(_MULT))):
        for index in range(_RES_BLOCKS + 1):
            _res_block(layout, f"decoder.up.{level}.block.{index}", channels, mult * _BASE)
            channels = mult * _BASE
        if level > 0:
            layout.conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    layout.norm("decoder.norm_out", channels)
    layout.conv("decoder.conv_out", channels, 3, gain=_IMAGE_STD * AFTER_SILU)


def _middle(layout: Layout, name: str, channels: int) -> None:
    _res_block(layout, f"{name}.block_1", channels, channels)
    layout.norm(f"{name}.attn_1.norm", channels)
    for projection in ("q", "k", "v"):
        layout.conv(f"{name}.attn_1.{projection}", channels, channels, kernel=1)
    layout.conv(f"{name}.attn_1.proj_out", channels, channels, kernel=1, gain=RESIDUAL)
    _res_block(layout, f"{name}.block_2", channels, channels)


def _res_block(layout: Layout, name: str, channels: int, width: int) -> None:
    layout.norm(f"{name}.norm1", channels)
    layout.conv(f"{name}.conv1", channels, width, gain=AFTER_SILU)
    layout.norm(f"{name}.norm2", width)
    layout.conv(f"{name}.conv2", width, width, gain=RESIDUAL * AFTER_SILU)
    if channels != width:
        layout.conv(f"{name}.nin_shortcut", channels, width, kernel=1)

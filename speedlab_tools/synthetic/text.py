"""Layouts of the CLIP text encoders, in the names of transformers (CLIP-L) and of OpenCLIP (CLIP-H, CLIP-G)."""

from __future__ import annotations

import math

from .spec import TextConfig
from .weights import AFTER_GELU, SHARP, Layout, Weight

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

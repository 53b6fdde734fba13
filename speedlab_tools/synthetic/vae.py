"""Layout of the Stable Diffusion autoencoder, in the names of the original checkpoints."""

from __future__ import annotations

from .weights import AFTER_SILU, RESIDUAL, Layout

_BASE, _MULT, _RES_BLOCKS, _LATENT = 128, (1, 2, 4, 4), 2, 4
# Raw latents have a standard deviation of about 5.5 (SD 1.x) to 7.7 (SDXL).
_LATENT_STD = 5.5
# Of a decoded picture in -1..1: enough contrast to see, little enough to clip rarely.
_PICTURE_STD = 0.35


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
    layout.conv("decoder.conv_out", channels, 3, gain=_PICTURE_STD * AFTER_SILU)


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

"""What UNet, text encoders and VAE take beside their weights, by counting; see `live_bytes` for what that means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import UnavailableError
from ..models.unet import require_unet
from .layers import networks, weight_bytes
from .live_bytes import fused_attention, on_meta, peak_bytes

_TOKENS = 77
_PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class PictureSize:
    """Pixels of one picture, and how many are made at once."""

    width: int
    height: int
    batch: int = 1

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.height // _PIXELS_PER_LATENT, self.width // _PIXELS_PER_LATENT


def sampling_bytes(model: Any, size: PictureSize) -> int:
    """Bytes of one evaluation of a MODEL with guidance: cond and uncond of all pictures in one forward.

    Networks other than image UNets are not counted; for them it is ComfyUI's own estimate.
    """
    rows = 2 * size.batch
    try:
        require_unet(model, "Memory Plan")
    except UnavailableError:
        channels = getattr(model.model.latent_format, "latent_channels", 4)
        return int(model.model.memory_required([rows, channels, *size.latent]))
    return unet_bytes(model.model, size, rows)


def unet_bytes(base: Any, size: PictureSize, rows: int) -> int:
    """Bytes of one forward of a diffusion model (ComfyUI's BaseModel) on `rows` latents, cond and uncond counted."""
    network = on_meta(base.diffusion_model)
    dtype = base.manual_cast_dtype or base.get_dtype()
    height, width = size.latent
    config = base.model_config.unet_config

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    latent = meta(rows, config.get("in_channels", 4), height, width)
    context = meta(rows, _TOKENS, config.get("context_dim") or 768)
    adm = config.get("adm_in_channels")
    label = meta(rows, adm) if adm and network.num_classes is not None else None
    options = {"optimized_attention_override": fused_attention}
    timestep = meta(rows, dtype=torch.float32)
    forward = peak_bytes(
        lambda: network(latent, timestep, context=context, y=label, control=None, transformer_options=options)
    )
    # The sampler holds the noisy latent, the noise, the denoised one and copies of them, in fp32, for each picture.
    return forward + latent.nbytes + context.nbytes + 6 * size.batch * 4 * height * width * 4


def decode_bytes(vae: Any, size: PictureSize, dtype: torch.dtype | None = None) -> int:
    """Bytes of decoding `size.batch` pictures in one piece with a ComfyUI VAE, in `dtype` or its own.

    A VAE for video or sound is not counted; for that it is ComfyUI's own estimate.
    """
    dtype = dtype or vae.vae_dtype
    # A compiled VAE is counted as the network that was compiled.
    stage = getattr(vae.first_stage_model, "speedlab_original", vae.first_stage_model)
    if getattr(vae, "latent_dim", 2) != 2:
        return int(vae.memory_used_decode((size.batch, vae.latent_channels, 1, *size.latent), dtype))
    decoder: Any = on_meta(stage).to(dtype)
    for part in decoder.modules():
        if hasattr(part, "optimized_attention"):
            part.optimized_attention = _attended
    latent = torch.empty((size.batch, vae.latent_channels, *size.latent), dtype=dtype, device="meta")
    picture = size.batch * 3 * size.width * size.height * 4
    # The picture is scaled and clamped in fp32 after it was made: two copies beside the decoder's own output.
    return max(peak_bytes(lambda: decoder.decode(latent)), 2 * picture)


def text_bytes(clip: Any) -> int:
    """Bytes of encoding one prompt of 77 tokens with the largest of a CLIP's text encoders; they compute in fp32."""
    largest = 0
    for transformer in networks(clip.cond_stage_model):
        largest = max(largest, _encoder_bytes(transformer))
    return largest


def _encoder_bytes(transformer: Any) -> int:
    if type(transformer).__name__ not in ("CLIPTextModel", "T5"):
        return weight_bytes(transformer) // 10  # language models as text encoders: an allowance
    width = transformer.get_input_embeddings().weight.shape[1]
    embeds = torch.empty((1, _TOKENS, width), dtype=torch.float32, device="meta")
    network = on_meta(transformer)
    return peak_bytes(lambda: network(None, None, embeds=embeds, num_tokens=[_TOKENS], intermediate_output=-2))


def _attended(query: torch.Tensor, *_: Any) -> torch.Tensor:
    """In place of a VAE's attention, which takes its function from its module."""
    return torch.empty_like(query)

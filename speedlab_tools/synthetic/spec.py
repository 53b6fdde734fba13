"""What a synthetic checkpoint is: family, size, dtype, seed, and the architecture tables behind them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import torch

Family = Literal["sd15", "sd21", "sdxl", "ssd1b", "vega", "sdxl_refiner"]
Size = Literal["small", "full", "drawn"]
DtypeName = Literal["fp32", "fp16", "bf16"]

FAMILY_NAMES: tuple[Family, ...] = get_args(Family)
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CheckpointSpec:
    """One synthetic checkpoint. Equal specs give equal files.

    `full` has the exact layout of the published model. `small` keeps its text encoders, its VAE and the block
    structure that decides the family, and makes the UNet as narrow and shallow as that permits. `drawn` is the UNet of
    the model that draws, which is there for two families.
    Raises ValueError for a family, size or dtype that does not exist.
    """

    family: Family
    size: Size = "small"
    dtype: DtypeName = "fp16"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in (("family", get_args(Family)), ("size", get_args(Size)), ("dtype", tuple(DTYPES))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.size == "drawn" and self.family not in _DRAWN:
            raise ValueError(f"size drawn is there for the families {' and '.join(_DRAWN)} alone")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def as_dict(self) -> dict[str, str | int]:
        """The fields as plain values, for metadata."""
        return asdict(self)


@dataclass(frozen=True)
class UNetConfig:
    """A UNet of the Stable Diffusion kind, one entry a level from the outside in.

    depth_in and depth_out give the transformer blocks of every residual block in the order they run;
    depth_middle -1 is a middle of one residual block without attention.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    depth_in: tuple[int, ...]
    depth_out: tuple[int, ...]
    depth_middle: int
    context_dim: int
    linear_projection: bool
    adm_channels: int | None = None


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text tower. `open_clip` selects that project's names and fused projections instead of transformers'."""

    prefix: str
    width: int
    layers: int
    open_clip: bool
    vocabulary: int = 49408
    positions: int = 77


@dataclass(frozen=True)
class Architecture:
    """UNet and text encoders of a family. The VAE is the same in all of them."""

    unet: UNetConfig
    text: tuple[TextConfig, ...]


_SD15 = UNetConfig(
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    depth_in=(1, 1, 1, 1, 1, 1, 0, 0),
    depth_out=(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    depth_middle=1,
    context_dim=768,
    linear_projection=False,
)
# Detection reads multipliers, depths and block counts from the weights, so these two may be as small as they like. One
# transformer at full resolution keeps attention's share of the time near that of the real model.
_SD15_SMALL = replace(
    _SD15,
    channel_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    depth_in=(1, 1, 1, 0),
    depth_out=(0, 0, 1, 1, 1, 1, 0, 0),
)
# The models that draw. ComfyUI knows SD 1.x by 320 channels and a context of 768, and Vega by its
# depths of the input half.
_DRAWN_SD15 = replace(
    _SD15,
    channel_mult=(1, 1, 1),
    num_res_blocks=1,
    depth_in=(0, 1, 0),
    depth_out=(0, 0, 1, 1, 0, 0),
)
_SDXL = UNetConfig(
    model_channels=320,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    depth_in=(0, 0, 2, 2, 10, 10),
    depth_out=(10, 10, 10, 2, 2, 2, 0, 0, 0),
    depth_middle=10,
    context_dim=2048,
    linear_projection=True,
    adm_channels=2816,
)
_SSD1B = replace(_SDXL, depth_in=(0, 0, 2, 2, 4, 4), depth_out=(4, 4, 10, 2, 1, 1, 0, 0, 0), depth_middle=-1)
_VEGA = replace(_SDXL, depth_in=(0, 0, 1, 1, 2, 2), depth_out=(2, 2, 2, 1, 1, 1, 0, 0, 0), depth_middle=-1)
_DRAWN_VEGA = replace(_VEGA, channel_mult=(1, 1, 1), depth_out=(0, 0, 0, 1, 0, 1, 0, 0, 0))
_REFINER = UNetConfig(
    model_channels=384,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    depth_in=(0, 0, 4, 4, 4, 4, 0, 0),
    depth_out=(0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0),
    depth_middle=4,
    context_dim=1280,
    linear_projection=True,
    adm_channels=2560,
)

_CLIP_L_SD = TextConfig("cond_stage_model.", 768, 12, open_clip=False)
_CLIP_H_SD = TextConfig("cond_stage_model.", 1024, 24, open_clip=True)
_CLIP_L_SDXL = TextConfig("conditioner.embedders.0.", 768, 12, open_clip=False)
_CLIP_G_SDXL = TextConfig("conditioner.embedders.1.", 1280, 32, open_clip=True)
_CLIP_G_REFINER = replace(_CLIP_G_SDXL, prefix="conditioner.embedders.0.")

_TEXT: dict[Family, tuple[TextConfig, ...]] = {
    "sd15": (_CLIP_L_SD,),
    "sd21": (_CLIP_H_SD,),
    "sdxl": (_CLIP_L_SDXL, _CLIP_G_SDXL),
    "ssd1b": (_CLIP_L_SDXL, _CLIP_G_SDXL),
    "vega": (_CLIP_L_SDXL, _CLIP_G_SDXL),
    "sdxl_refiner": (_CLIP_G_REFINER,),
}
_FULL: dict[Family, UNetConfig] = {
    "sd15": _SD15,
    "sd21": replace(_SD15, context_dim=1024, linear_projection=True),
    "sdxl": _SDXL,
    "ssd1b": _SSD1B,
    "vega": _VEGA,
    "sdxl_refiner": _REFINER,
}
_DRAWN: dict[Family, UNetConfig] = {"sd15": _DRAWN_SD15, "vega": _DRAWN_VEGA}


def architecture(spec: CheckpointSpec) -> Architecture:
    """UNet and text encoder configurations of `spec`."""
    unet = (_DRAWN if spec.size == "drawn" else _FULL)[spec.family]
    if spec.size == "small":
        unet = _shrink(spec.family, unet)
    return Architecture(unet, _TEXT[spec.family])


def _shrink(family: Family, unet: UNetConfig) -> UNetConfig:
    if family in ("sd15", "sd21"):
        return replace(_SD15_SMALL, context_dim=unet.context_dim, linear_projection=unet.linear_projection)
    # The SDXL families are told apart by the transformer depths of the input half, which therefore stay.
    return replace(
        unet,
        channel_mult=(1,) * len(unet.channel_mult),
        depth_out=tuple(min(depth, 1) for depth in unet.depth_out),
        depth_middle=min(unet.depth_middle, 1),
    )

"""The models' weights as factors: which layers have how many, and the checkpoint that is built from them.

A large layer is the product of two thin matrices; the text encoder is the demo checkpoint's random one and costs
nothing. The first convolution, the last and the way between them begin as the random UNet's, which hands the noise on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...drawn_files import CHECKPOINTS, FACTORS, TINY_VAES
from ..files import Layout
from ..spec import CheckpointSpec, Family, UNetConfig, architecture
from ..unet import unet_layout

Tensors = dict[str, torch.Tensor]
TOKENS, POOLED = 77, 1280


@dataclass(frozen=True)
class Model:
    """A model that draws: its layout, and the names of its files.

    One with a `base` takes the other's blocks by the names in `taken`. Their matrices are neither trained nor stored
    again, except those of attention, whose heads and texts are others. Norms and biases, which are small, are its own.
    Blocks that are not taken hand on what comes in until they have learnt something.
    """

    family: Family  # of the demo checkpoint whose random text encoders it has
    packed: Path
    checkpoint: str
    tiny: str
    latent_scale: float  # ComfyUI divides latents by this before they are decoded
    heads: int
    base: Model | None = None
    taken: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def unet(self) -> UNetConfig:
        return architecture(CheckpointSpec(self.family, "drawn")).unet

    @property
    def last_block(self) -> int:
        return len(self.unet.depth_out) - 1

    @property
    def dense(self) -> tuple[str, ...]:
        """Layers that are kept whole, because the noise goes through them from the start."""
        return ("input_blocks.0.0", f"output_blocks.{self.last_block}.0.skip_connection", "out.2")

    @property
    def numbers(self) -> int:
        """How many numbers an encoded caption has: of all tokens, and with size embeddings of the whole text too."""
        return TOKENS * self.unet.context_dim + (POOLED if self.unet.adm_channels else 0)

    def source(self, name: str) -> str | None:
        """The base's name for a parameter of a block that is taken."""
        for mine, theirs in self.taken.items():
            if name.startswith(f"{mine}."):
                return theirs + name.removeprefix(mine)
        return None

    def shares(self, name: str) -> bool:
        """Whether a parameter is the base's own, and so is neither trained nor stored."""
        is_matrix = name.endswith((".first", ".second", ".rows")) or name.removesuffix(".weight") in self.dense
        return is_matrix and ".attn" not in name and self.source(name) is not None

    def hands_on(self, layer: str) -> bool:
        """Whether a layer leaves out the skip and hands on the rest: in output blocks that are not taken."""
        return self.base is not None and layer.endswith(".skip_connection") and self.source(f"{layer}.weight") is None


SD15 = Model("sd15", FACTORS["sd15"], CHECKPOINTS["sd15"], TINY_VAES["sd15"], latent_scale=0.18215, heads=8)
SDXL = Model(
    "vega",
    FACTORS["sdxl"],
    CHECKPOINTS["sdxl"],
    TINY_VAES["sdxl"],
    latent_scale=0.13025,
    heads=5,
    base=SD15,
    taken={
        "time_embed": "time_embed", "out": "out",
        "input_blocks.0": "input_blocks.0", "input_blocks.1.0": "input_blocks.1.0", "input_blocks.3": "input_blocks.2",
        "input_blocks.4": "input_blocks.3", "input_blocks.6": "input_blocks.4", "input_blocks.7.0": "input_blocks.5.0",
        "input_blocks.8.0": "middle_block.0", "middle_block.0": "middle_block.2",
        # Its transformer is of depth 2 where the base has one of 1.
        **{f"input_blocks.8.1.{part}": f"middle_block.1.{part}"
           for part in ("norm", "proj_in", "transformer_blocks.0", "proj_out")},
        **{f"output_blocks.{mine}": f"output_blocks.{theirs}" for theirs, mine in enumerate((1, 2, 3, 5, 6, 8))},
    },
)  # fmt: skip
FAMILIES: dict[str, Model] = {"sd15": SD15, "sdxl": SDXL}


def unet(model: Model = SD15) -> Layout:
    """Every parameter of the UNet by its name."""
    return unet_layout(model.unet)


def rank_of(layer: str, shape: tuple[int, ...], model: Model = SD15) -> int | None:
    """How many factors a layer has; None for one that is kept whole: norms, biases, and what is small anyway."""
    if len(shape) < 2 or layer in model.dense:
        return None
    if "emb_layers" in layer:
        return 16
    if model.base is not None and model.source(f"{layer}.weight") is None:
        return 32  # what is added to a trained model may be thinner
    return 64 if (len(shape) == 4 and shape[2] == 3) or "attn2.to_" in layer else 48


def handed_on(shape: tuple[int, ...]) -> torch.Tensor:
    """Weight or bias of a skip connection that hands on the first of its channels."""
    return torch.eye(*shape[:2]).reshape(shape) if len(shape) > 1 else torch.zeros(shape)


def multiply(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The weight of a layer whose input goes through `first` (rank x inputs) and then `second` (outputs x rank)."""
    return (second.flatten(1) @ first.flatten(1)).reshape(second.shape[0], *first.shape[1:])


def merged(tensors: Mapping[str, torch.Tensor], model: Model = SD15) -> Tensors:
    """Factors `<layer>.first` and `<layer>.second` made into `<layer>.weight`; everything else as it is."""
    whole: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".first"):
            layer = name.removesuffix(".first")
            whole[f"{layer}.weight"] = multiply(tensor, tensors[f"{layer}.second"])
        elif not name.endswith(".second"):
            whole[name] = tensor
    for name, weight in unet(model).items():
        if model.hands_on(name.rpartition(".")[0]):
            whole[name] = handed_on(weight.shape)
    return whole


def with_base(tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], model: Model) -> Tensors:
    """A model's own tensors and, under its names, those that it takes of its base, both packed or both not."""
    layout, whole = unet(model), dict(tensors)
    for mine, theirs in model.taken.items():
        for name, tensor in base.items():
            if name.startswith(f"{theirs}.") and model.shares(own := mine + name.removeprefix(theirs)):
                weight = layout[f"{own.rpartition('.')[0]}.weight"]
                # A projection of 1x1 is a linear layer in some families.
                whole[own] = tensor.flatten(1) if own.endswith(".first") and len(weight.shape) == 2 else tensor
    return whole

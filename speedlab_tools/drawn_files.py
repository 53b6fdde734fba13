"""The files of the models that draw, by family: named here, where no PyTorch is needed to know them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

_WEIGHTS = Path(__file__).parent / "synthetic" / "drawn"
# The trained weights in the repository, and what is built from them: the checkpoint, and its decoder as a Tiny VAE.
FACTORS: Mapping[str, Path] = MappingProxyType(
    {"sd15": _WEIGHTS / "factors.safetensors", "sdxl": _WEIGHTS / "factors_sdxl.safetensors"}
)
CHECKPOINTS: Mapping[str, str] = MappingProxyType(
    {"sd15": "speedlab_demo_drawn.safetensors", "sdxl": "speedlab_demo_drawn_sdxl.safetensors"}
)
TINY_VAES: Mapping[str, str] = MappingProxyType({"sd15": "taesd", "sdxl": "taesdxl"})


def beside(checkpoint: str, what: str) -> str:
    """The name of a demo file that goes with one of the checkpoints: a LoRA, a ControlNet, a refiner, a VAE."""
    return f"{Path(checkpoint).stem}_{what}.safetensors"

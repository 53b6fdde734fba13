"""ComfyUI's own text encoder with the demo checkpoint's random weights."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from speedlab.common.errors import SpeedLabError

from ...host.inprocess import enter
from .. import CheckpointSpec, write_checkpoint
from .data import TOKENS, WIDTH, Encode


def comfyui(folder: Path) -> None:
    """Import ComfyUI into this process, with its base folder below `folder`. Needs COMFYUI_PATH."""
    if "nodes" in sys.modules:
        return
    path = os.environ.get("SPEEDLAB_COMFYUI") or os.environ.get("COMFYUI_PATH")
    if not path:
        raise SpeedLabError("No ComfyUI to work with: set COMFYUI_PATH to its folder.")
    base = folder / "comfyui"
    base.mkdir(parents=True, exist_ok=True)
    enter(Path(path), base, on_cpu=True)


def encoder(folder: Path) -> Encode:
    """The encoder; the demo checkpoint is written to `folder` where it is not there."""
    checkpoint = write_checkpoint(folder / "models" / "demo.safetensors", CheckpointSpec("sd15"))
    comfyui(folder)
    sd = importlib.import_module("comfy.sd")
    clip = sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False, output_model=False)[1]

    def encode(texts: Sequence[str]) -> torch.Tensor:
        sections = [section for text in texts for section in clip.tokenize(text)["l"]]
        # A prompt of many sections is encoded as a batch, and its sections come back one behind the other.
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return clip.encode_from_tokens({"l": sections}).reshape(-1, TOKENS, WIDTH).float()

    return encode

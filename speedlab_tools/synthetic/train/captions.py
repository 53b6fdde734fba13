"""ComfyUI's own text encoder with the demo checkpoint's random weights."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speedlab.common.errors import SpeedLabError

from ...host.inprocess import enter
from .. import CheckpointSpec, write_checkpoint
from ..drawn.factors import SD15, Model
from .data import Encode


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


def encoder(folder: Path, model: Model = SD15) -> Encode:
    """The model's encoder; its demo checkpoint is written to `folder` where it is not there."""

    @functools.cache
    def loaded() -> Any:
        path = write_checkpoint(folder / "models" / f"demo_{model.family}.safetensors", CheckpointSpec(model.family))
        comfyui(folder)
        sd = importlib.import_module("comfy.sd")
        return sd.load_checkpoint_guess_config(str(path), output_vae=False, output_model=False)[1]

    def encode(texts: Sequence[str]) -> torch.Tensor:
        clip = loaded()
        clip.load_model()
        tokens = [clip.tokenize(text) for text in texts]
        towers = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            clip.cond_stage_model.reset_clip_options()
            for key in [key for key in ("l", "g") if key in tokens[0]]:
                # ComfyUI takes a list of prompts for sections of one; each of its towers takes them for a batch.
                batch = [[token for token, _ in each[key][0]] for each in tokens]
                towers.append(getattr(clip.cond_stage_model, f"clip_{key}").encode(batch))
        rows = [torch.cat([tower[0].float() for tower in towers], dim=2).flatten(1)]
        rows += [towers[-1][1].float()] if model.unet.adm_channels else []
        return torch.cat(rows, dim=1)

    return encode

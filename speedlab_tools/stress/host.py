"""ComfyUI in this process, on the processor, with a base folder of its own."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from speedlab.common.errors import SpeedLabError

_FOLDERS = ("checkpoints", "loras", "vae", "vae_approx", "controlnet", "embeddings")


def enter_comfyui(base: Path) -> Path:
    """Import ComfyUI with `base` as its base directory; returns the models folder. Raises SpeedLabError without one."""
    root = os.environ.get("SPEEDLAB_COMFYUI")
    if not root:
        raise SpeedLabError("No ComfyUI was chosen for this command. Start it through `python run.py stress`.")
    for kind in _FOLDERS:
        (base / "models" / kind).mkdir(parents=True, exist_ok=True)
    for name in ("input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(exist_ok=True)
    # Before this pack's root, whose `nodes` would stand for ComfyUI's module.
    sys.path.insert(0, root)
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = True
    cli_args.args.base_directory = str(base)
    for name in ("comfy.sd", "comfy.utils", "folder_paths", "nodes"):
        importlib.import_module(name)
    return base / "models"

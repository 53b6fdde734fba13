"""Model files with deterministic random weights in real layouts: for demos, tests and benchmarks.

Times and memory measured on them are those of a real model of that layout; the images are noise.
"""

from __future__ import annotations

from .adapters import controlnet_layout, lora_state_dict, write_controlnet, write_lora
from .checkpoint import build_state_dict, shapes, write_checkpoint, write_vae
from .spec import FAMILY_NAMES, CheckpointSpec
from .taesd import taesd_state_dicts, write_taesd

__all__ = [
    "FAMILY_NAMES",
    "CheckpointSpec",
    "build_state_dict",
    "controlnet_layout",
    "lora_state_dict",
    "shapes",
    "taesd_state_dicts",
    "write_checkpoint",
    "write_controlnet",
    "write_lora",
    "write_taesd",
    "write_vae",
]

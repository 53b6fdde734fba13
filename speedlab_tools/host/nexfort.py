"""OneDiff with nexfort in a virtual environment of its own, for it takes no PyTorch but one, and ComfyUI has another.

The packages are what ComfyUI needs to sample, and no more: no server runs there. PyTorch 2.4.0 brings CUDA's libraries
along and does not load without them, on a CPU as little as elsewhere: 3.0 GB to fetch, 5.7 GB unpacked.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from .base import CACHE_VARIABLE, pack_root
from .progress import Reporter
from .staged import Stage, StagedEnvironment

_LOCK = pack_root() / "locks" / "onediff.txt"
_PYTHONS = ((3, 10), (3, 11))  # nexfort is built for 3.8 to 3.11, this pack for 3.10 and newer
_DISK_GB = 9.0  # while pip unpacks


def not_built_for() -> str:
    """Why nexfort cannot be installed on this machine, "" where it can."""
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    fits = sys.version_info[:2] in _PYTHONS and (platform.system(), platform.machine()) == ("Linux", "x86_64")
    return "" if fits else f"nexfort is built for Python 3.8 to 3.11 on Linux x86_64, and this is {here}"


class NexfortEnvironment(StagedEnvironment):
    """The environment under `root`. `prepare()` makes it, mends it, or finds it ready."""

    def __init__(self, root: Path, *, lock: Path = _LOCK, reporter: Reporter | None = None) -> None:
        super().__init__(root, reporter)
        self.lock = lock

    def stages(self) -> list[Stage]:
        # They are used in this one place: a copy in pip's cache would be 3 GB more.
        options = ["--no-cache-dir", "--no-compile"]
        return [self.environment_stage(), self.lock_stage("packages", "OneDiff and nexfort", self.lock, options)]

    def announcement(self) -> str:
        return (
            f"Setting up OneDiff and nexfort with PyTorch 2.4.0 in {self.root} ({CACHE_VARIABLE} moves it): "
            "3.0 GB to fetch once, 5.7 GB on disk."
        )

    def space(self) -> tuple[str, float]:
        return "packages", _DISK_GB

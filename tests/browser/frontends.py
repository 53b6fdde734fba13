"""The frontends to test with: the one ComfyUI pins, and the newest on PyPI that this ComfyUI serves."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

NEWEST = "1.58.1"
NEWEST_SHA256 = "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"
PACKAGE = "comfyui-frontend-package"
_STATIC = "comfyui_frontend_package/static/"


def newest_static(cache: Path) -> Path:
    """The static folder of the newest frontend, fetched with pip once and checked by its sha256."""
    folder = cache / "frontends" / NEWEST
    done = folder / "whole"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        wheel = _download(folder)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(_STATIC) and ".." not in name]
            archive.extractall(folder, names)
        wheel.unlink()
        done.touch()
    return folder / _STATIC.rstrip("/")


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder)]
    subprocess.run([*command, f"{PACKAGE}=={NEWEST}"], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != NEWEST_SHA256:
        wheel.unlink()
        raise RuntimeError(f"{wheel.name} has sha256 {digest} instead of {NEWEST_SHA256}; it was deleted.")
    return wheel

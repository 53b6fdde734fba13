"""Where compiled code is kept for the next start: a folder of this pack among ComfyUI's user files."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import first_line

log = logging.getLogger(__name__)


def cache_folder(backend: str, device: torch.device) -> Path | None:
    """A folder for `backend`, this PyTorch and this kind of device; None, with a warning, where none can be made.

    Type, shapes and code are in the names that the backends give their files in it.
    """
    import folder_paths

    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{backend}-torch{torch.__version__}-{_device_name(device)}")
    folder = Path(folder_paths.get_user_directory()) / "speedlab" / "compiled" / name.lower()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("SpeedLab: compiled code is not kept, for %s cannot be made: %s", folder, first_line(error))
        return None
    return folder


def _device_name(device: Any) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)

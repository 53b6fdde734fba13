"""ComfyUI and the pack in this process, for benchmarks that need no server."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def start(base: Path) -> ModuleType:
    """Import ComfyUI with `base` as base directory and return the pack. Needs COMFYUI_PATH or SPEEDLAB_COMFYUI."""
    comfyui = os.environ.get("SPEEDLAB_COMFYUI") or os.environ.get("COMFYUI_PATH")
    if not comfyui:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder, or run this through `python run.py`.")
    base.mkdir(parents=True, exist_ok=True)
    # A script of this folder (`accelerate.py`) must not stand for a package of the same name.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, Path(__file__).resolve().parent)]
    from speedlab_tools.host import inprocess

    return inprocess.start(Path(comfyui), base)


# The engine, without the pack's `nodes` beside it, which would stand for ComfyUI's.
sys.path.insert(0, str(ROOT))
for _name in ("speedlab", "speedlab_tools"):
    importlib.import_module(_name)
sys.path.remove(str(ROOT))
from speedlab.measure.environment import result_stem  # noqa: E402


def result_name(what: str, device: str, torch_version: str, date: str) -> str:
    """`<device>_torch<version>_<date>_<what>.csv` in letters that every file system takes."""
    return f"{result_stem(device, torch_version)}{date}_{what}.csv"

"""ComfyUI's dynamic VRAM, switched on as its `main.py` does it (0.33), for a ComfyUI that is imported and not started.

Two halves, as there: the library before PyTorch, its devices once ComfyUI's modules are there.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any

log = logging.getLogger(__name__)
_GIB = 1024**3


def begin() -> bool:
    """What comes before PyTorch. Whether this ComfyUI, with the arguments that it has, goes on with `finish`."""
    cli = importlib.import_module("comfy.cli_args")
    wanted = getattr(cli, "enables_dynamic_vram", None)
    if wanted is None or not wanted():
        return False
    reserve = getattr(cli.args, "reserve_vram", None)
    offered = {
        "simple_vram_headroom": None if reserve is None else int(reserve * _GIB),
        "nvml_pressure": not getattr(cli.args, "disable_nvml_pressure", False),
    }
    start = _control().init
    known = inspect.signature(start).parameters  # those of older comfy-aimdo take less
    start(**{name: value for name, value in offered.items() if name in known})
    return True


def finish() -> bool:
    """What comes behind ComfyUI's modules. Whether dynamic VRAM is on; where it is not, the log says why."""
    args, mm = importlib.import_module("comfy.cli_args").args, importlib.import_module("comfy.model_management")
    if not (args.enable_dynamic_vram or _has_device(mm)):
        log.info("dynamic VRAM is off: ComfyUI has it on NVIDIA's GPUs, and on AMD's from ROCm 7.14")
        return False
    if not args.enable_dynamic_vram and mm.torch_version_numeric < (2, 8):
        log.warning("dynamic VRAM is off: ComfyUI has it from PyTorch 2.8")
        return False
    devices, headroom = mm.get_all_torch_devices(), int(getattr(args, "vram_headroom", 0) * _GIB)
    try:
        is_on = _control().init_devices((device.index, headroom) for device in devices)
    except TypeError:  # comfy-aimdo 0.4.9 takes numbers alone
        is_on = _control().init_devices(device.index for device in devices)
    if not is_on:
        log.warning("dynamic VRAM is off: comfy-aimdo does not work here")
        return False
    patchers: Any = importlib.import_module("comfy.model_patcher")
    patchers.CoreModelPatcher = patchers.ModelPatcherDynamic
    management: Any = importlib.import_module("comfy.memory_management")
    management.aimdo_enabled = True
    return True


def _control() -> Any:
    return importlib.import_module("comfy_aimdo.control")


def _has_device(mm: Any) -> bool:
    return bool(mm.is_nvidia() or (mm.is_amd() and mm.rocm_version >= (7, 14)))

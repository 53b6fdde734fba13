"""The GPU of this machine, as drivers name it without PyTorch, so that no CPU is measured in its place."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .base import HostError

CPU_VARIABLE = "SPEEDLAB_CPU"
_DRM = Path("/sys/class/drm")
_AMD = "0x1002"
# What a CPU's own graphics take of the memory is less.
_LEAST_VRAM = 4 << 30
_INDEX = {"NVIDIA": "https://download.pytorch.org/whl/cu130", "AMD": "https://download.pytorch.org/whl/rocm6.4"}


def maker_of_gpu() -> str:
    """`NVIDIA` or `AMD` for a GPU whose driver is there, "" where none is known."""
    if _has_nvidia():
        return "NVIDIA"
    return "AMD" if _has_amd() else ""


def _has_nvidia() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU " in answer.stdout


def _has_amd() -> bool:
    for memory in _DRM.glob("card*/device/mem_info_vram_total"):
        try:
            vendor = memory.with_name("vendor").read_text(encoding="ascii").strip()
            if vendor == _AMD and int(memory.read_text(encoding="ascii")) >= _LEAST_VRAM:
                return True
        except (OSError, ValueError):
            continue
    return False


def cpu_is_wanted(env: Mapping[str, str] | None = None) -> bool:
    """Whether the user has said that the CPU is meant, or has hidden the GPUs from PyTorch."""
    source = os.environ if env is None else env
    hidden = any(source.get(f"{kind}_VISIBLE_DEVICES") in ("", "-1") for kind in ("CUDA", "HIP"))
    return hidden or source.get(CPU_VARIABLE, "").strip() not in ("", "0")


def require_fitting_wheels() -> None:
    """Raise HostError where PyPI's PyTorch, which a managed host gets, computes beside the GPU that is there."""
    if cpu_is_wanted():
        return
    found, system = maker_of_gpu(), platform.system()
    if found == "NVIDIA" and system == "Windows":
        why = "the PyTorch that PyPI has for Windows computes on the CPU alone"
    elif found == "AMD":
        why = "the PyTorch that PyPI has is not built for AMD's"
    else:
        return
    raise HostError(
        f"This machine has an {found} GPU, and {why}, so a ComfyUI set up here would not use it. {remedy(found)}"
    )


def remedy(found: str) -> str:
    """What brings a PyTorch for that GPU, and what to say where the CPU is meant."""
    return (
        f"Use a ComfyUI whose PyTorch is for that GPU (pip install torch torchvision torchaudio --index-url "
        f"{_INDEX[found]}, with a driver as new as that asks for) and name it with --comfyui PATH. To use the CPU on "
        f"purpose, set {CPU_VARIABLE}=1."
    )

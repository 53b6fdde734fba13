"""The machine and the software that a measurement was made on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import __version__
from ..common.cpu import cpu_name
from ..common.torch_private import cuda_of_driver


@dataclass(frozen=True)
class Conditions:
    """What holds inside a run alone, since techniques set it for the run: PyTorch's flags, and autocast's dtype."""

    flags: dict[str, Any]
    autocast: Any | None = None


def conditions_now(device_type: str) -> Conditions:
    """The conditions at this moment; to be read inside of a forward."""
    import torch

    try:
        # PyTorch before 2.4 does not tell it of any device.
        is_on = hasattr(torch, "get_autocast_dtype") and torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a device that PyTorch's autocast does not know
        is_on = False
    return Conditions(speed_flags(), torch.get_autocast_dtype(device_type) if is_on else None)


def environment(device: Any) -> dict[str, Any]:
    """Facts about device, driver, libraries and flags, as the record's `env`. Unknown facts are None.

    The flags are those of this moment. A record has those of its run instead, and as `env_hash` the hash with the
    flags outside of it: what a technique switches for its run makes no other environment.
    """
    import torch

    cuda = getattr(device, "type", str(device)) == "cuda"
    return {
        "device": device_name(device),
        "device_type": getattr(device, "type", str(device)),
        "device_memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 2) if cuda else None,
        "driver": _driver_version() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "hip": getattr(torch.version, "hip", None) if cuda else None,
        "comfyui": comfyui_version(),
        "speedlab": __version__,
        "python": platform.python_version(),
        "platform": _platform_name(),
        "attention": _attention_name(),
        "allocator": torch.cuda.get_allocator_backend() if cuda else None,
        "dynamic_vram": dynamic_vram(),
        "flags": speed_flags(),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpus": _cpus(),
        "ram_gb": _ram_gb(),
    }


def environment_hash(env: dict[str, Any]) -> str:
    """Twelve hex digits that are equal for equal environments."""
    text = json.dumps(env, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def result_stem(device: str, torch_version: str | None) -> str:
    """`<device>_torch<version>_`, in letters that every file system takes: how a file of figures is named."""
    words = "-".join("".join(c if c.isalnum() or c == "." else " " for c in device).split()).lower()
    return f"{words}_" if torch_version is None else f"{words}_torch{torch_version.split('+')[0]}_"


def device_name(device: Any) -> str:
    """The GPU's marketing name, else the CPU's."""
    import torch

    kind = getattr(device, "type", str(device))
    if kind == "cuda":
        return str(torch.cuda.get_device_name(device))
    if kind == "cpu":
        return cpu_name()
    backend = getattr(torch, kind, None)
    if backend is not None and hasattr(backend, "get_device_name"):
        return str(backend.get_device_name(device))
    return f"{kind} ({cpu_name()})"


@lru_cache(maxsize=1)
def comfyui_version() -> str | None:
    """ComfyUI's own version string, if it tells one."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        return None
    return str(version)


def _cpus() -> str | None:
    """The CPUs that this process may run on, such as `0-15`."""
    may_run_on = getattr(os, "sched_getaffinity", None)
    if may_run_on is None:
        return None
    ranges: list[list[int]] = []
    for cpu in sorted(may_run_on(0)):
        if ranges and cpu == ranges[-1][-1] + 1:
            ranges[-1][1:] = [cpu]
        else:
            ranges.append([cpu])
    return ",".join("-".join(map(str, part)) for part in ranges)


# Where Linux's kernel module names itself: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ...".
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@lru_cache(maxsize=1)
def _driver_version() -> str | None:
    """The NVIDIA driver's version on Linux; elsewhere the newest CUDA that it runs, which needs no other program."""
    try:
        named = re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", _KERNEL_MODULE.read_text(encoding="utf-8"))
    except OSError:
        named = None
    if named is not None:
        return named.group(1)
    cuda = cuda_of_driver()
    return f"for CUDA {cuda}" if cuda else None


@lru_cache(maxsize=1)
def _platform_name() -> str:
    return platform.platform()


def _attention_name() -> str | None:
    try:
        from comfy.ldm.modules.attention import optimized_attention
    except ImportError:
        return None
    return getattr(optimized_attention, "__name__", str(optimized_attention))


def dynamic_vram() -> bool | None:
    """Whether ComfyUI pages weights into memory of its own (dynamic VRAM); None for a ComfyUI that cannot."""
    try:
        import comfy.memory_management as management
    except ImportError:
        return None
    is_on = getattr(management, "aimdo_enabled", None)
    return None if is_on is None else bool(is_on)


def speed_flags() -> dict[str, Any]:
    """PyTorch's process-wide flags that change speed, as they are now; None where PyTorch refuses to answer."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "tf32_matmul": _tf32(lambda: matmul.allow_tf32, matmul),
        "tf32_cudnn": _tf32(lambda: cudnn.allow_tf32, getattr(cudnn, "conv", None)),
        "fp32_matmul": _answer(torch.get_float32_matmul_precision),
        "cudnn_benchmark": bool(cudnn.benchmark),
        "fp16_accumulation": bool(getattr(matmul, "allow_fp16_accumulation", False)),
        "deterministic": bool(torch.are_deterministic_algorithms_enabled()),
    }


def _answer(read: Callable[[], Any]) -> Any | None:
    """None where PyTorch refuses its older interface, as it does once a program has used the newer one."""
    try:
        return read()
    except RuntimeError:
        return None


def _tf32(read: Callable[[], Any], owner: Any) -> bool | None:
    answer = _answer(read)
    if answer is None and not hasattr(owner, "fp32_precision"):
        return None
    return bool(owner.fp32_precision == "tf32" if answer is None else answer)


@lru_cache(maxsize=1)
def _ram_gb() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    return round(psutil.virtual_memory().total / 1e9, 1)

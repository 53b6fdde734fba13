"""Nodes that tell what the server's process holds, and what a result is, bit for bit."""

import ctypes
import gc
import hashlib
import json
import sys
import threading
from typing import Any

import psutil
import torch

_PROGRAMS = ".speedlab.techniques.compile.program"


class StressMeasures:
    """Counts what only leaks make grow, after everything that is no longer needed was freed."""

    RETURN_TYPES = ()
    FUNCTION = "measure"
    OUTPUT_NODE = True
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return float("nan")

    def measure(self) -> dict[str, Any]:
        programs = _release_programs()
        gc.collect()
        gc.collect()
        _return_free_heap()
        process = psutil.Process()
        # Without the objects of the process itself that a count makes.
        kinds = [type(thing) for thing in gc.get_objects()]
        seen = {
            "rss_mb": process.memory_info().rss / 1e6,
            "open_files": process.num_handles() if sys.platform == "win32" else process.num_fds(),
            "threads": process.num_threads(),
            "python_threads": sum("asyncio_" not in thread.name for thread in threading.enumerate()),
            "device_mb": _device_bytes() / 1e6,
            "dynamo_graphs": _dynamo_graphs(),
            "compiled_networks": programs,
            "modules": sum(issubclass(kind, torch.nn.Module) for kind in kinds),
            "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
            "objects": len(kinds),
        }
        return {"ui": {"text": [json.dumps(seen)]}}


def _return_free_heap() -> None:
    """What malloc keeps for later is no growth."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # which not every C library has
        if trim is not None:
            trim(0)


def _device_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _release_programs() -> int:
    """The networks whose compiled programs are kept on purpose; how many there are follows from the last prompts, so
    they are released before the rest is counted."""
    kept = [vars(module)["_programs"] for name, module in sys.modules.items() if name.endswith(_PROGRAMS)]
    count = sum(map(len, kept))
    for programs in kept:
        programs.clear()
    return count


def _dynamo_graphs() -> int:
    """Graphs that torch.compile made in this process; dynamo keeps them until the process ends."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return 0 if counters is None else int(counters["stats"]["unique_graphs"])


class StressDigest:
    """SHA-256 of latents and of images: shape, type and every bit."""

    RETURN_TYPES = ()
    FUNCTION = "digest"
    OUTPUT_NODE = True
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {"samples": ("LATENT",), "images": ("IMAGE",)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")

    def digest(self, samples: Any = None, images: Any = None) -> dict[str, Any]:
        tensors = [] if samples is None else [samples["samples"]]
        tensors += [] if images is None else [images]
        return {"ui": {"text": [" ".join(_digest(tensor) for tensor in tensors)]}}


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(flat.shape)} {flat.dtype}".encode())
    digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

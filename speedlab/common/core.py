"""ComfyUI's own top-level modules, reached by name: inside this pack `nodes` would be read as ours by type checkers."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from typing import Any


def core_nodes() -> Any:
    """ComfyUI's `nodes` module."""
    return importlib.import_module("nodes")


def output_directory() -> Path:
    """ComfyUI's output folder, as the server was started with."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def compute_device() -> Any:
    """The torch device that ComfyUI runs models on."""
    import comfy.model_management as mm

    return mm.get_torch_device()


def show_on_node(text: str, node_id: str | None) -> None:
    """Show a text on a node in the browser. Newer servers can; without one, in tests say, nothing happens."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)


def tell_browser(event: str, data: dict[str, Any]) -> None:
    """Send an event to the browser that queued the executing prompt; without one, in tests say, nothing happens."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    client = getattr(server, "client_id", None)
    if server is not None and client is not None:
        server.send_sync(event, data, client)


def prompt_that_runs() -> Any | None:
    """The prompt that the server is executing, as it was queued; None where nothing tells it.

    ComfyUI asks a node whether it has changed without handing that over.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    running = getattr(getattr(server, "prompt_queue", None), "currently_running", None) or {}
    known = {item[1]: item[2] for item in list(running.values())}
    return known.get(getattr(server, "last_prompt_id", None))


def missing_input(message: str) -> Any:
    """A value for an output that has nothing to pass on: nodes behind it stop with `message`."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(message)


def is_dynamic(patcher: Any) -> bool:
    """Whether ComfyUI itself pages the weights of a patcher's model in and out (its dynamic VRAM)."""
    probe = getattr(patcher, "is_dynamic", None)
    return bool(probe()) if callable(probe) else False


def progress_bar(total: int) -> Any:
    """ComfyUI's progress bar of the executing node."""
    import comfy.utils

    return comfy.utils.ProgressBar(total)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: the device's own kind, Python's, or the CPU allocator's words."""
    import comfy.model_management as mm

    # Where torch has no such type, core's name for it is Exception itself, which would match anything.
    kinds = (MemoryError,) if mm.OOM_EXCEPTION is Exception else (MemoryError, mm.OOM_EXCEPTION)
    text = str(error).lower()
    return isinstance(error, kinds) or "out of memory" in text or "defaultcpuallocator" in text


def release_unused_memory() -> None:
    """Give cached device memory back, after the tensors of a failed attempt are gone."""
    import comfy.model_management as mm

    gc.collect()
    mm.soft_empty_cache()


def out_of_memory_advice() -> str:
    """What a user can do when the smallest piece of a decode does not fit."""
    return (
        "Put Free Memory (SpeedLab) set to 'diffusion' before decoding, use Tiny VAE Decode (SpeedLab), or close "
        "other programs that use the device."
    )


# Values looked at at once: a few megabytes.
_AT_ONCE = 1 << 20


def is_finite(tensor: Any) -> bool:
    """Whether a tensor has neither NaN nor Inf. On a CPU part by part, so that a large image is not copied whole."""
    import torch

    if tensor.device.type != "cpu" or tensor.numel() <= _AT_ONCE:
        return bool(torch.isfinite(tensor).all())
    longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
    rows = max(tensor.shape[longest] * _AT_ONCE // tensor.numel(), 1)
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(rows, dim=longest))

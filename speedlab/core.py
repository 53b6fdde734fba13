"""ComfyUI's own top-level modules, reached by name: inside this pack `nodes` would be read as ours by type checkers."""

from __future__ import annotations

import importlib
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


def missing_input(message: str) -> Any:
    """A value for an output that has nothing to pass on: nodes behind it stop with `message`."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(message)

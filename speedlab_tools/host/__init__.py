"""Where ComfyUI is, and how to start it. Standard library only: `run.py` uses it before anything is installed."""

from __future__ import annotations

from .base import Host, HostError, ServerError, cache_root, child_environment, from_environment, pack_root
from .resolve import resolve
from .server import ComfyServer

__all__ = [
    "ComfyServer",
    "Host",
    "HostError",
    "ServerError",
    "cache_root",
    "child_environment",
    "from_environment",
    "pack_root",
    "resolve",
]

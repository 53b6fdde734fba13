"""How long nodes of a prompt took, as ComfyUI's progress tells it: the only sight of nodes that are not this pack's.

Times of the host around a whole node, without waiting for a device: estimates, which are named so where they are shown.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from .timeline import executing

_NAME = "speedlab"


class _Watch:
    """A progress handler. It lives in the registry that ComfyUI makes for a prompt, and is gone with it."""

    name = _NAME
    enabled = True

    def __init__(self, started: Collection[str]) -> None:
        # When these began is not known.
        self.before = frozenset(started)
        self.began: dict[str, int] = {}
        self.took: dict[str, int] = {}

    def set_registry(self, registry: Any) -> None: ...

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        self.began[node_id] = time.perf_counter_ns()

    def update_handler(self, node_id: str, *_: Any, **__: Any) -> None: ...

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        began = self.began.pop(node_id, None)
        if began is not None:
            self.took[node_id] = time.perf_counter_ns() - began

    def reset(self) -> None: ...


def watch() -> None:
    """Watch the prompt that begins: to be called when ComfyUI asks which nodes have changed, before it runs any."""
    registry = _registry()
    if registry is not None and _NAME not in registry.handlers:
        registry.register_handler(_Watch(registry.nodes))


def seen_ms(node_ids: Collection[str]) -> float | str | None:
    """What these nodes of the executing prompt took together; `cached` where one was answered from the cache, None
    where one was not seen."""
    registry = _registry()
    seen = None if registry is None else registry.handlers.get(_NAME)
    if registry is None or seen is None or registry.prompt_id != executing().prompt_id or seen.before & set(node_ids):
        return None
    took = [seen.took.get(node_id) for node_id in node_ids]
    return "cached" if None in took else round(sum(filter(None, took)) / 1e6, 3)


def _registry() -> Any | None:
    """ComfyUI's progress registry of the prompt that runs; None where this ComfyUI has none."""
    try:
        from comfy_execution.progress import get_progress_state
    except ImportError:
        return None
    return get_progress_state()

"""Whether anybody compiles a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def is_compiled(model: Any) -> bool:
    """Whether a compiler is on MODEL `model`: through a node, on a module in place, or on the network as a whole."""
    by_site: Mapping[str, Mapping[str, Any]] = getattr(model, "wrappers", {}) or {}
    if any("compile" in str(key) and wrappers for keys in by_site.values() for key, wrappers in keys.items()):
        return True
    if "torch._dynamo" not in sys.modules:
        return False
    patches = getattr(model, "object_patches", {}) or {}
    network: Any = getattr(model.model, "diffusion_model", None)
    parts = [*patches.values(), *(network.modules() if hasattr(network, "modules") else ())]
    return any(getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod") for part in parts)

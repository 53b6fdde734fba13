"""Whether anybody compiles a model, and what compiled code excludes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..errors import UnavailableError
from .patching import Site


def refusal_of_streaming() -> UnavailableError:
    """Compiled code guards the device of each weight: it would be compiled anew at every layer."""
    return UnavailableError(
        "Memory Plan's sequential offload and compiled code (Compile Model, Compile VAE, TorchCompileModel) exclude "
        "each other: compiled code holds on to where its weights are. Set offload to model, or take the compile node "
        "out."
    )


def has_compile_wrapper(wrappers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether compiled modules are swapped in by a wrapper: ComfyUI's node and ours put "compile" into its key."""
    return any("compile" in str(key) and found for key, found in wrappers.get(Site.APPLY_MODEL.value, {}).items())


def is_compiled_in_place(network: Any) -> bool:
    """Whether a module of `network` was compiled where it stands."""
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in network.modules())


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

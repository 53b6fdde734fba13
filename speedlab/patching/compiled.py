"""Whether a model is compiled, and what compiled code excludes.

How often torch.compile broke a graph or compiled again during a run, from dynamo's own counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import UnavailableError
from ..common.torch_private import compilation_log, dynamo_counters, is_dynamo_loaded, is_module_compiled, uncompiled
from .wrappers import Site


def refusal_of_streaming() -> UnavailableError:
    """Compiled code guards the device of each weight: it would be compiled again at every layer."""
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
    return any(map(is_module_compiled, network.modules()))


def is_compiled(model: Any) -> bool:
    """Whether a compiler is on MODEL `model`: through a node, on a module in place, or on the network as a whole."""
    by_site: Mapping[str, Mapping[str, Any]] = getattr(model, "wrappers", {}) or {}
    if any("compile" in str(key) and wrappers for keys in by_site.values() for key, wrappers in keys.items()):
        return True
    if not is_dynamo_loaded():
        return False
    patches = getattr(model, "object_patches", {}) or {}
    network: Any = getattr(model.model, "diffusion_model", None)
    parts = [*patches.values(), *(network.modules() if hasattr(network, "modules") else ())]
    return any(is_module_compiled(part) or uncompiled(part) is not part for part in parts)


@dataclass(frozen=True)
class CompileCounts:
    """Dynamo's counters of this process so far. `known` are the compilations that its log still holds."""

    frames: int = 0
    graphs: int = 0
    breaks: int = 0
    known: tuple[Any, ...] = ()


def compile_counts() -> CompileCounts:
    """Read the counters; all zero where nothing has been compiled yet. Dynamo is never imported for it."""
    counters = dynamo_counters()
    if counters is None:
        return CompileCounts()
    return CompileCounts(
        frames=int(counters.get("frames", {}).get("total", 0)),
        graphs=int(counters.get("stats", {}).get("unique_graphs", 0)),
        breaks=sum(int(count) for count in counters.get("graph_break", {}).values()),
        known=compilation_log(),
    )


def counts_between(before: CompileCounts, after: CompileCounts) -> dict[str, int]:
    """What was compiled between two readings. A recompile is one more compilation of code that was compiled before."""
    seen = {id(entry) for entry in before.known}
    fresh = [entry for entry in after.known if id(entry) not in seen]
    return {
        "compilations": max(after.frames - before.frames, 0),
        "graphs": max(after.graphs - before.graphs, 0),
        "graph_breaks": max(after.breaks - before.breaks, 0),
        "recompiles": sum(1 for entry in fresh if _is_recompile(entry)),
    }


def _is_recompile(entry: Any) -> bool:
    """Compilations are numbered `frame/compilation of that frame`, with `[..]` before it for compiled autograd."""
    number = str(getattr(entry, "compile_id", "") or "").rpartition("/")[2].partition("_")[0]
    return number.isdigit() and int(number) > 0

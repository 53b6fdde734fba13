"""How often torch.compile broke a graph or compiled again during a run, from dynamo's own counters."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCounts:
    """Dynamo's counters of this process so far. `known` are the compilations that its log still holds."""

    frames: int = 0
    graphs: int = 0
    breaks: int = 0
    known: tuple[Any, ...] = ()


def compile_counts() -> CompileCounts:
    """Read the counters; all zero where nothing has been compiled yet. Dynamo is never imported for it."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    counters = getattr(utils, "counters", None)
    if counters is None:
        return CompileCounts()
    log = getattr(utils, "get_compilation_metrics", list)
    return CompileCounts(
        frames=int(counters.get("frames", {}).get("total", 0)),
        graphs=int(counters.get("stats", {}).get("unique_graphs", 0)),
        breaks=sum(int(count) for count in counters.get("graph_break", {}).values()),
        known=tuple(log()),
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

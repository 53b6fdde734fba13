"""What makes a single prompt a warm repeat of itself: texts that no cache holds, and a short run before it.

The time of a run is what a warm repeat costs. The first prompt of a plan moves the weights to the device, compiles and
measures alternatives; and a text that the server encoded for an earlier prompt would be missing in the time.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from .client import ComfyClient, RunResult
from .errors import BenchError
from .events import SAMPLERS, TEXT_ENCODERS, nodes_of
from .graph import ApiGraph
from .results import REPORT, SWEEP

STEPS = 2
# An input that no node has: ComfyUI hands it to nobody, but looks in its cache for nodes with the same inputs.
_MARK = "speedlab_turn"
_ONCE: Mapping[str, Any] = {"warmup": 0, "repeats": 1, "detail": "timing"}


def with_new_texts(graph: ApiGraph) -> ApiGraph:
    """A copy of a graph whose texts the server encodes anew, and with them all that follows; loaders stay cached."""
    mark = uuid.uuid4().hex
    encoders = set(nodes_of(graph, TEXT_ENCODERS))
    return {
        node_id: {**node, "inputs": {**node["inputs"], _MARK: mark}} if node_id in encoders else dict(node)
        for node_id, node in graph.items()
    }


def warm_up_graph(graph: ApiGraph) -> ApiGraph | None:
    """A graph that does once, in few steps, what `graph` does, and reports nothing; None where it warms up by itself.

    The images go to a preview in place of Profile Report and of all that comes after it.
    """
    reports = set(nodes_of(graph, frozenset({REPORT})))
    if nodes_of(graph, frozenset({SWEEP})) or not all("images" in graph[node]["inputs"] for node in reports):
        return None
    left_out = _after(graph, reports)
    kept = with_new_texts({node_id: node for node_id, node in graph.items() if node_id not in left_out})
    for node_id in nodes_of(kept, SAMPLERS):
        inputs = kept[node_id]["inputs"]
        few = {"steps": min(inputs["steps"], STEPS)} if isinstance(inputs.get("steps"), int) else {}
        once = {name: value for name, value in _ONCE.items() if name in inputs}
        kept[node_id]["inputs"] = {**inputs, **few, **once}
    for node_id in reports:
        kept[node_id] = {"class_type": "PreviewImage", "inputs": {"images": graph[node_id]["inputs"]["images"]}}
    return kept if reports else None


def shape_of(graph: ApiGraph) -> str:
    """What two graphs have in common of which one warms up the other: all but texts and seeds."""
    encoders = set(nodes_of(graph, TEXT_ENCODERS))
    plain = {
        node_id: {
            name: value
            for name, value in node["inputs"].items()
            if name != "seed" and (node_id not in encoders or isinstance(value, list))
        }
        for node_id, node in graph.items()
    }
    classes = {node_id: node["class_type"] for node_id, node in graph.items()}
    return repr((sorted(classes.items()), sorted((node_id, sorted(told.items())) for node_id, told in plain.items())))


async def warm_up(client: ComfyClient, graph: ApiGraph) -> None:
    """Run a graph of `warm_up_graph` and take the records that its samplers wrote out of the library again."""
    result = await client.run(graph)
    runs = _run_ids(result)
    if runs:
        await client.delete_runs(runs)


def _run_ids(result: RunResult) -> list[str]:
    told = [entry for node in nodes_of(result.graph, SAMPLERS) for entry in _shown(result, node)]
    return [str(entry["run_id"]) for entry in told if isinstance(entry, Mapping) and "run_id" in entry]


def _shown(result: RunResult, node: str) -> list[Any]:
    shown = (result.outputs.get(node) or {}).get("speedlab") or []
    if not isinstance(shown, list):
        raise BenchError("the server's sampler told nothing that can be read: is its SpeedLab of this version?")
    return shown


def _after(graph: ApiGraph, nodes: set[str]) -> set[str]:
    """The nodes that need an output of `nodes`, at any distance."""
    found: set[str] = set()
    while True:
        more = {
            node_id
            for node_id, node in graph.items()
            if node_id not in found | nodes
            and any(isinstance(value, list) and str(value[0]) in found | nodes for value in node["inputs"].values())
        }
        if not more:
            return found
        found |= more

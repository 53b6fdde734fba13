"""Runs one scenario on a server and keeps what it left.

What makes a single prompt a warm repeat of itself: texts that no cache holds, and a short run before it.

The time of a run is what a warm repeat costs. The first prompt of a plan moves the weights to the device, compiles and
measures alternatives; and a text that the server encoded for an earlier prompt would be missing in the time.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speedlab.common.errors import first_line

from ..client.client import ComfyClient, RunResult
from ..client.errors import BenchError, ServerGone
from ..client.events import SAMPLERS, TEXT_ENCODERS, ProgressLine, nodes_of
from ..client.graph import ApiGraph, split_rows
from ..scenarios.overrides import MARK, PROMPTS, shrink
from ..scenarios.scenario import Scenario
from ..scenarios.workflows import ui_graph
from .results import REPORT, SWEEP, Journal, Outcome, fetch_images, fetch_records


def parts_of(scenario: Scenario, small: bool = False) -> list[tuple[str, ApiGraph]]:
    """The graphs that are queued one by one, each with the name of what it makes."""
    graph = scenario.graph()
    rows = split_rows(graph)
    prompts = scenario.settings.prompts
    # One row a prompt where their numbers agree; any other graph has rows of its own meaning.
    named = [f"{scenario.id}_{prompt.name}" for prompt in prompts] if len(prompts) == len(rows) > 1 else []
    names = named or [f"{scenario.id}_{n}" if len(rows) > 1 else scenario.id for n in range(1, len(rows) + 1)]
    parts = list(zip(names, rows, strict=True))
    if not small:
        return parts
    if len(prompts) == len(rows):
        # Of the same thing with other prompts two are enough, and of each variant its first prompt.
        firsts = [part for part, prompt in zip(parts, prompts, strict=True) if prompt.text == prompts[0].text]
        parts = firsts if graph.plans else parts[:PROMPTS]
    return [(name, shrink(row)) for name, row in parts]


async def run_scenario(
    client: ComfyClient, scenario: Scenario, out: Path, *, small: bool = False, journal: Journal | None = None
) -> Outcome:
    """Queue a scenario image by image, warmed up; its outcome holds what was reached before an error.

    Parts that `journal` holds are not run again. Raises ServerGone where the server died.
    """
    outcome = Outcome(scenario.id)
    parts = parts_of(scenario, small)
    warm = ""
    for number, (name, graph) in enumerate(parts, start=1):
        if journal is not None and journal.recall(name, out, outcome):
            outcome.recalled += 1
            continue
        line = ProgressLine(f"{scenario.id}{f' {number}/{len(parts)}' if len(parts) > 1 else ''}", graph)
        before = len(outcome.records), len(outcome.images)
        try:
            # Times of a small run say nothing, so nothing is done for them.
            if not small and shape_of(graph) != warm:
                before_it = warm_up_graph(graph)
                if before_it is not None:
                    await warm_up(client, before_it)
                warm = shape_of(graph)
            asked = graph if small else with_new_texts(graph)
            result = await client.run(asked, extra_data=extra_data(scenario, small), listener=line)
            outcome.images += await fetch_images(client, result, out, name)
            await fetch_records(client, result, out, outcome)
        except ServerGone:
            raise
        except BenchError as error:
            outcome.error = str(error)
            return outcome
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            outcome.error = f"the server's answer makes no sense: {type(error).__name__}: {first_line(error)}"
            return outcome
        finally:
            line.done()
        if journal is not None and outcome.error is None:
            runs = [path.stem for path in outcome.records[before[0] :]]
            journal.finished(name, runs, outcome.images[before[1] :])
    return outcome


def extra_data(scenario: Scenario, small: bool) -> dict[str, object]:
    """What a prompt carries beside its graph: the workflow, and the scenario's name for the record."""
    workflow = ui_graph(scenario)
    named = {**workflow["extra"]["speedlab"], "scenario": scenario.id + (MARK if small else "")}
    return {"extra_pnginfo": {"workflow": workflow, "speedlab": named}}


STEPS = 2
# An input that no node has: ComfyUI passes it to no node, but looks in its cache for nodes with the same inputs.
_MARK = "speedlab_turn"
_ONCE: Mapping[str, Any] = {"warmup": 0, "repeats": 1, "detail": "timing"}


def with_new_texts(graph: ApiGraph) -> ApiGraph:
    """A copy of a graph whose texts the server encodes again, and with them all that follows; loaders stay cached."""
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
    return repr((sorted(classes.items()), sorted((node_id, sorted(given.items())) for node_id, given in plain.items())))


async def warm_up(client: ComfyClient, graph: ApiGraph) -> None:
    """Run a graph of `warm_up_graph` and take the records that its samplers wrote out of the library again."""
    result = await client.run(graph)
    runs = _run_ids(result)
    if runs:
        await client.delete_runs(runs)


def _run_ids(result: RunResult) -> list[str]:
    shown = [entry for node in nodes_of(result.graph, SAMPLERS) for entry in _shown(result, node)]
    return [str(entry["run_id"]) for entry in shown if isinstance(entry, Mapping) and "run_id" in entry]


def _shown(result: RunResult, node: str) -> list[Any]:
    shown = (result.outputs.get(node) or {}).get("speedlab") or []
    if not isinstance(shown, list):
        raise BenchError("the server's sampler gave nothing that can be read: is its SpeedLab of this version?")
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

"""Subgraph blueprints: `subgraphs/<name>.json`, each a node in ComfyUI's node library and its search."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..client.graph import Graph, Link, Node
from .canvas import PACK, VERSION, UiGraph, place, to_ui
from .graphs import decode, empty_latent, encode, load_checkpoint, sample
from .scenario import (
    ASTRONAUT,
    CHECKPOINT_ANY,
    CHECKPOINT_SDXL,
    STOCK,
    NeededFile,
    Plan,
    Prompt,
    Scenario,
    Settings,
    Technique,
    models_of,
)

INPUTS, OUTPUTS = -10, -20  # the ids of a subgraph's own two nodes, by ComfyUI's format
WIDTH = 400
CHART_HEIGHT = 280  # of the sampler's chart, which stands on the subgraph's face too


@dataclass(frozen=True)
class Promoted:
    """An input of an inner node that the subgraph shows on its face, under a name of its own."""

    node: Node
    input: str
    name: str


@dataclass(frozen=True)
class Blueprint:
    """A subgraph: its graph, what it shows, and the outputs that leave it."""

    name: str
    description: str
    graph: Graph
    promoted: tuple[Promoted, ...]
    outputs: Mapping[str, Link]
    files: tuple[NeededFile, ...]


def _text_to_image(
    name: str, description: str, checkpoint: NeededFile, plan: Plan, settings: Settings, measured: bool
) -> Blueprint:
    scenario = Scenario(
        id=name, source="S1", title=name, shows=description, family="sdxl", files=(checkpoint,), settings=settings,
        published=(), plan=plan, build=lambda _: Graph(),
    )  # fmt: skip
    graph, prompt = Graph(), settings.prompts[0]
    loaded, latent = load_checkpoint(graph, scenario), empty_latent(graph, settings)
    conds = encode(graph, loaded.clip, prompt, 0, "")
    sampler = sample(graph, settings, prompt, loaded.model, conds, latent, 0, "")
    outputs = {"image": decode(graph, plan, sampler["latent"], loaded, 0, "")["image"]}
    if measured:
        report = graph.add(
            "SpeedLabProfileReport",
            group="Measure",
            title="Report",
            profile=sampler["profile"],
            images=outputs["image"],
        )
        outputs = {"image": report["images"], "report": report["report"]}
    (loader,), (size,) = graph.find("SpeedLabCheckpointLoader"), graph.find("EmptyLatentImage")
    texts = graph.find("SpeedLabTextEncode")
    shown = [(texts[0], "text", "prompt"), (texts[1], "text", "negative_prompt")]
    shown += [(size, side, side) for side in ("width", "height")]
    shown += [(sampler, setting, setting) for setting in ("seed", "steps", "cfg", "sampler_name", "scheduler")]
    shown += [(loader, "ckpt_name", "ckpt_name")]
    return Blueprint(name, description, graph, tuple(Promoted(*one) for one in shown), outputs, scenario.files)


_PROMPT = Prompt("blueprint", ASTRONAUT.text, 1, "blurry")
_FAST = Plan(
    "Attention + DeepCache + Dynamic CFG",
    (
        Technique("Attention", "SpeedLabAttention"),
        Technique("DeepCache", "SpeedLabDeepCache", {"cache_interval": 3}),
        Technique("Dynamic CFG", "SpeedLabDynamicCFG", {"stop_at": 0.75}),
    ),
)
BLUEPRINTS = (
    _text_to_image(
        "Fast SDXL",
        "Text to image with SDXL and the fastest attention, DeepCache and Dynamic CFG: much faster, with small "
        "differences in detail. Open it to see or change them.",
        CHECKPOINT_SDXL,
        _FAST,
        Settings(prompts=(_PROMPT,), width=1024, height=1024, steps=30, cfg=5.0),
        measured=False,
    ),
    _text_to_image(
        "Measured text to image",
        "Text to image with a profile: each step, text encoding, decoding and peak memory, as a chart, a report and a "
        "row of output/speedlab/results.csv.",
        CHECKPOINT_ANY,
        STOCK,
        Settings(prompts=(_PROMPT,), steps=20, cfg=8.0),
        measured=True,
    ),
)


def _id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"speedlab/subgraphs/{name}"))


def blueprint_ui(blueprint: Blueprint) -> UiGraph:
    """The file of a blueprint: one node, and the subgraph that it is of."""
    inner, subgraph = _subgraph(blueprint)
    host = {
        "id": 1,
        "type": subgraph["id"],
        "pos": [0, 0],
        "size": [WIDTH, CHART_HEIGHT + 80 + 30 * len(blueprint.promoted)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": one.name, "type": entry["type"], "widget": {"name": one.name}, "link": None}
            for one, entry in zip(blueprint.promoted, subgraph["inputs"], strict=True)
        ],
        "outputs": [{"name": entry["name"], "type": entry["type"], "links": []} for entry in subgraph["outputs"]],
        "properties": {"cnr_id": PACK},
        "widgets_values": [],
        "title": blueprint.name,
    }
    return {
        "id": _id(f"{blueprint.name}/workflow"),
        "revision": 0,
        "last_node_id": max(1, inner["last_node_id"]),
        "last_link_id": subgraph["state"]["lastLinkId"],
        "nodes": [host],
        "links": [],
        "version": VERSION,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {},
    }


def _subgraph(blueprint: Blueprint) -> tuple[UiGraph, dict[str, Any]]:
    graph = blueprint.graph
    inner = to_ui(graph, name=blueprint.name, note="", extra={}, models=models_of(blueprint.files))
    nodes = {node["id"]: node for node in inner["nodes"][:-1]}  # without the note
    parents = {one["id"]: {"parentId": one["parentId"]} for one in inner["extra"].get("linkExtensions", [])}
    links = [{**dict(zip(_LINK, link, strict=True)), **parents.get(link[0], {})} for link in inner["links"]]
    reroutes = inner["extra"].get("reroutes", [])
    inputs, outputs = [], []

    def add_link(origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        ends = {"origin_id": origin[0], "origin_slot": origin[1], "target_id": target[0], "target_slot": target[1]}
        links.append({"id": len(links) + 1, **ends, "type": kind})
        return len(links)

    for slot, one in enumerate(blueprint.promoted):
        (target, entry) = next(
            (index, entry) for index, entry in enumerate(nodes[one.node.id]["inputs"]) if entry["name"] == one.input
        )
        entry["link"] = add_link((INPUTS, slot), (one.node.id, target), entry["type"])
        inputs.append(_port(blueprint, one.name, entry["type"], entry["link"]))
    for slot, (name, link) in enumerate(blueprint.outputs.items()):
        output = nodes[link.node]["outputs"][link.slot]
        number = add_link((link.node, link.slot), (OUTPUTS, slot), link.type)
        output["links"] = [*(output["links"] or []), number]
        outputs.append(_port(blueprint, name, link.type, number))
    boxes = place(graph).values()
    right, middle = max(box.right for box in boxes), max(box.bottom for box in boxes) // 2
    return inner, {
        "id": _id(blueprint.name),
        "version": 1,
        "state": {
            "lastGroupId": len(inner["groups"]),
            "lastNodeId": max(nodes),
            "lastLinkId": len(links),
            "lastRerouteId": len(reroutes),
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "description": blueprint.description,
        "category": "SpeedLab",
        "inputNode": {"id": INPUTS, "bounding": [-220, 0, 140, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right + 80, middle, 140, 40 + 20 * len(outputs)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": inner["groups"],
        "links": links,
        "reroutes": reroutes,
        "extra": {},
    }


_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def _port(blueprint: Blueprint, name: str, kind: str, link: int) -> dict[str, Any]:
    return {"id": _id(f"{blueprint.name}/{name}"), "name": name, "type": kind, "linkIds": [link]}

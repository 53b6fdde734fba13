"""The drag-in workflow format of ComfyUI's canvas (version 0.4): from a graph to it, and back to a `/prompt` graph."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from .graph import ApiGraph, Graph, Link, Node
from .layout import Box, frame, place
from .signatures import NodeSignature, signature

VERSION = 0.4
NOTE_TYPE = "MarkdownNote"
NOTE_WIDTH = 460
NOTE_GAP = 80
PACK = "speedlab"
GROUP_COLOURS = {
    "Load": "#3f789e",
    "Prompt": "#8a8a3f",
    "Sample": "#8a5a3f",
    "Decode": "#6a3f8a",
    "Measure": "#3f8a5a",
}
UiGraph = dict[str, Any]


def _widget_values(node: Node) -> list[Any]:
    """Values in the order of INPUT_TYPES; a second widget (such as 'control after generate') follows its own."""
    values: list[Any] = []
    for entry in node.signature.widgets:
        value = node.inputs.get(entry.name, entry.default)
        # A linked widget keeps a value of its own on the canvas, which the link overrides.
        values.append(entry.default if isinstance(value, Link) else value)
        if entry.extra is not None:
            values.append(entry.extra)
    return values


def _input_slots(node: Node, link_ids: Mapping[tuple[int, str], int]) -> list[dict[str, Any]]:
    slots: list[dict[str, Any]] = []
    for entry in (*node.signature.sockets, *node.signature.widgets):
        slot: dict[str, Any] = {"name": entry.name, "type": entry.type, "link": link_ids.get((node.id, entry.name))}
        if entry.optional and not entry.widget:
            slot["shape"] = 7  # LiteGraph's hollow circle: an optional socket
        if entry.widget:
            slot["widget"] = {"name": entry.name}
        slots.append(slot)
    return slots


def _slot_index(known: NodeSignature, name: str) -> int:
    return [entry.name for entry in (*known.sockets, *known.widgets)].index(name)


def _ui_node(
    node: Node, box: Box, order: int, link_ids: Mapping[tuple[int, str], int], links: list[list[Any]]
) -> dict[str, Any]:
    outputs = [
        {
            "name": name,
            "type": kind,
            "slot_index": slot,
            "links": [link[0] for link in links if link[1] == node.id and link[2] == slot] or None,
        }
        for slot, (name, kind) in enumerate(node.signature.outputs)
    ]
    return {
        "id": node.id,
        "type": node.class_type,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": _input_slots(node, link_ids),
        "outputs": outputs,
        "title": node.title,
        "properties": {
            "cnr_id": PACK if node.class_type.startswith("SpeedLab") else "comfy-core",
            "Node name for S&R": node.class_type,
        },
        "widgets_values": _widget_values(node),
    }


def _note(node_id: int, order: int, title: str, text: str, box: Box) -> dict[str, Any]:
    return {
        "id": node_id,
        "type": NOTE_TYPE,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title,
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _note_box(text: str) -> Box:
    # A line holds about 58 characters at the note's width; a line is 22 pixels high.
    lines = sum(1 + len(line) // 58 for line in text.splitlines())
    return Box(-NOTE_WIDTH - NOTE_GAP, 0, NOTE_WIDTH, 60 + 22 * lines)


def to_ui(graph: Graph, *, name: str, note: str, note_title: str = "Read me", extra: Mapping[str, Any]) -> UiGraph:
    """The graph as a drag-in workflow with a note left of it.

    `name` fixes the workflow's id, `extra` is kept in the workflow's own `extra` and comes back with every run.
    """
    boxes = place(graph)
    links: list[list[Any]] = []
    link_ids: dict[tuple[int, str], int] = {}
    for node in graph.nodes:
        for input_name, link in node.links().items():
            number = len(links) + 1
            slot = _slot_index(node.signature, input_name)
            links.append([number, link.node, link.slot, node.id, slot, link.type])
            link_ids[(node.id, input_name)] = number
    nodes = [_ui_node(node, boxes[node.id], order + 1, link_ids, links) for order, node in enumerate(graph.nodes)]
    note_id = len(graph.nodes) + 1
    nodes.append(_note(note_id, 0, note_title, note, _note_box(note)))
    groups = [
        {
            "id": number,
            "title": title,
            "bounding": [box.x, box.y, box.width, box.height],
            "color": GROUP_COLOURS[title],
            "font_size": 24,
            "flags": {},
        }
        for number, (title, box) in enumerate(frame(graph, boxes).items(), start=1)
    ]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"speedlab/workflows/{name}")),
        "revision": 0,
        "last_node_id": note_id,
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": {"scale": 0.7, "offset": [620, 160]}, **extra},
        "version": VERSION,
    }


def ui_to_api(ui: UiGraph) -> ApiGraph:
    """What the canvas would queue for a drag-in workflow, by the committed signatures; notes are left out."""
    origins = {link[0]: link for link in ui["links"]}
    api: ApiGraph = {}
    for node in sorted(ui["nodes"], key=lambda entry: entry["id"]):
        if node["type"] == NOTE_TYPE:
            continue
        known = signature(node["type"])
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        linked = {slot["name"]: slot["link"] for slot in node["inputs"] if slot["link"] is not None}
        for entry in known.inputs:
            value = next(values) if entry.widget else None
            if entry.widget and entry.extra is not None:
                next(values)
            if entry.name in linked:
                link = origins[linked[entry.name]]
                inputs[entry.name] = [str(link[1]), link[2]]
            elif entry.widget:
                inputs[entry.name] = value
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["title"]}}
    return api

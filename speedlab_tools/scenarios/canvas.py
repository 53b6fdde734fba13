"""The drag-in workflow format of ComfyUI's canvas (version 0.4): from a graph to it, and back to a `/prompt` graph.

Where the nodes of a workflow lie: one column a group from left to right, one row an image. A link that would pass
behind nodes runs by reroutes: down the gap right of its column, then through the channel that lies above each row.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..client.graph import GROUPS, ApiGraph, Graph, Link, Node, NodeSignature, signature

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


def _shows_advanced(node: Node) -> bool:
    """Whether an advanced input is set: what a workflow sets is to be seen."""
    return any(
        entry.advanced and node.inputs.get(entry.name, entry.default) != entry.default
        for entry in node.signature.widgets
    )


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
    node: Node,
    box: Box,
    order: int,
    link_ids: Mapping[tuple[int, str], int],
    links: list[list[Any]],
    models: Sequence[Mapping[str, str]],
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
    # ComfyUI offers to fetch a model that is missing where the node that names it says from where.
    named = [model for model in models if model["name"] in node.inputs.values()]
    return {
        "id": node.id,
        "type": node.class_type,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "order": order,
        "mode": 0,
        **({"showAdvanced": True} if _shows_advanced(node) else {}),
        "inputs": _input_slots(node, link_ids),
        "outputs": outputs,
        "title": node.title,
        "properties": {
            "cnr_id": PACK if node.class_type.startswith("SpeedLab") else "comfy-core",
            "Node name for S&R": node.class_type,
            **({"models": named} if named else {}),
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


def to_ui(
    graph: Graph,
    *,
    name: str,
    note: str,
    note_title: str = "Read me",
    extra: Mapping[str, Any],
    models: Sequence[Mapping[str, str]] = (),
) -> UiGraph:
    """The graph as a drag-in workflow with a note left of it.

    `name` fixes the workflow's id, `extra` is kept in the workflow's own `extra` and comes back with every run.
    `models` are files that can be fetched: name, url and directory of each.
    """
    boxes = place(graph)
    reroutes, last_reroute = _reroutes(graph, boxes)
    links: list[list[Any]] = []
    link_ids: dict[tuple[int, str], int] = {}
    for node in graph.nodes:
        for input_name, link in node.links().items():
            number = len(links) + 1
            slot = _slot_index(node.signature, input_name)
            links.append([number, link.node, link.slot, node.id, slot, link.type])
            link_ids[(node.id, input_name)] = number
    nodes = [
        _ui_node(node, boxes[node.id], order + 1, link_ids, links, models) for order, node in enumerate(graph.nodes)
    ]
    for reroute in reroutes:
        reroute["linkIds"] = [link_ids[end] for end in reroute["linkIds"]]
    routed = {
        "reroutes": reroutes,
        "linkExtensions": [{"id": link_ids[end], "parentId": last} for end, last in last_reroute.items()],
    }
    note_id = len(graph.nodes) + 1
    nodes.append(_note(note_id, 0, note_title, note, _note_box(note)))
    frames = frame(graph, boxes)
    groups = [
        {
            "id": number,
            "title": title,
            "bounding": [box.x, box.y, box.width, box.height],
            "color": GROUP_COLOURS[title],
            "font_size": 24,
            "flags": {},
        }
        for number, (title, box) in enumerate(frames.items(), start=1)
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
        "extra": {"ds": {"scale": VIEW_SCALE, "offset": _view(frames)}, **(routed if reroutes else {}), **extra},
        "version": VERSION,
    }


def _view(frames: Mapping[str, Box]) -> list[int]:
    """Where the canvas begins: the note and the titles of the groups beside and below the bars of the page.

    The Vue renderer of some frontends draws a workflow larger by a fifth.
    """
    top = min((box.y for box in frames.values()), default=0)
    return [round((NOTE_WIDTH + NOTE_GAP) * 1.2 + 100 / VIEW_SCALE), round(100 / VIEW_SCALE - 1.2 * top)]


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


VIEW_SCALE = 0.7
TITLE_HEIGHT = 30
SLOT_HEIGHT = 20
WIDGET_HEIGHT = 28
LINE_HEIGHT = 8  # by which the Vue renderer's field of a text is taller than another widget
CHIP_HEIGHT = 28  # the Vue renderer's row that says which pack a node is of
TEXT_HEIGHT = 64
SLOT_MIDDLE = 14
TRACK = 20  # between two links side by side
GAP_X = 60
GAP_Y = 50
GROUP_PAD = 20
GROUP_TITLE = 40
WIDTH = 320
# Nodes that show more than sockets and widgets: extra (width, height) in pixels.
EXTRA: Mapping[str, tuple[int, int]] = {
    "SaveImage": (20, 320),
    "PreviewImage": (20, 520),
    "CLIPTextEncode": (60, 50),
    "SpeedLabTextEncode": (60, 50),
    "SpeedLabPromptQueue": (160, 100),
    "SpeedLabProfileReport": (220, 460),
    "SpeedLabProfileSampler": (60, 350),
    "SpeedLabEnsembleSampler": (60, 350),
    "SpeedLabBenchmark": (220, 460),
    "SpeedLabTune": (60, 340),
    "SpeedLabCompareImages": (0, 70),
    "SpeedLabCompareLatents": (0, 70),
}


@dataclass(frozen=True)
class Box:
    """A rectangle on the canvas; (x, y) is its top left corner, without the title bar."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """The x right of it."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """The y below it."""
        return self.y + self.height

    def with_title(self) -> Box:
        """The box with the title bar that is drawn above the body."""
        return Box(self.x, self.y - TITLE_HEIGHT, self.width, self.height + TITLE_HEIGHT)

    def overlaps(self, other: Box) -> bool:
        """Whether both share a point inside."""
        apart_x = self.right <= other.x or other.right <= self.x
        apart_y = self.bottom <= other.y or other.bottom <= self.y
        return not (apart_x or apart_y)


def node_size(node: Node) -> tuple[int, int]:
    """(width, height) in pixels of a node's body with room for what it shows."""
    known = node.signature
    slots = SLOT_HEIGHT * max(len(known.sockets), len(known.outputs), 1)
    height = 10 + CHIP_HEIGHT + slots
    # The Vue renderer has a button that shows and hides them.
    height += WIDGET_HEIGHT if any(entry.advanced for entry in known.widgets) else 0
    for entry in known.widgets:
        if entry.advanced and not _shows_advanced(node):
            continue
        height += TEXT_HEIGHT if entry.multiline else WIDGET_HEIGHT
        height += LINE_HEIGHT if entry.type == "STRING" and not entry.multiline else 0
        height += WIDGET_HEIGHT if entry.extra is not None else 0
    # The classic renderer has room for hidden widgets too, and the Vue renderer of older frontends hides none.
    widgets = sum(1 if entry.extra is None else 2 for entry in known.widgets)
    height = max(height, CHIP_HEIGHT + slots + WIDGET_HEIGHT * widgets)
    more_width, more_height = EXTRA.get(node.class_type, (0, 0))
    return WIDTH + more_width, height + more_height


def _columns(graph: Graph) -> dict[int, int]:
    """The column of each node: by its group, and by how many links inside the group lie before it."""
    by_id = {node.id: node for node in graph.nodes}
    depths: dict[int, int] = {}
    for node in graph.nodes:
        before = [link.node for link in node.links().values() if by_id[link.node].group == node.group]
        depths[node.id] = 1 + max((depths[other] for other in before), default=-1)
    places = {node.id: (GROUPS.index(node.group), depths[node.id]) for node in graph.nodes}
    order = sorted(set(places.values()))
    return {node_id: order.index(where) for node_id, where in places.items()}


# An output: node and slot. An end of a link: node and input.
Output = tuple[int, int]
End = tuple[int, str]


def _routed(graph: Graph) -> dict[Output, dict[int, list[End]]]:
    """The links that need a way of their own, by output and by the row they lead to.

    Not those of neighbours: they cross nothing but the gap between two columns.
    """
    columns, by_id = _columns(graph), {node.id: node for node in graph.nodes}
    widest: dict[tuple[int, int], int] = {}
    for node in graph.nodes:
        cell = columns[node.id], node.row
        widest[cell] = max(node_size(node)[0], widest.get(cell, 0))
    routed: dict[Output, dict[int, list[End]]] = {}
    for node in graph.nodes:
        for name, link in node.links().items():
            origin, column = by_id[link.node], columns[link.node]
            # Beside a narrow node a wider one of its column may lie in the way.
            begins_at_gap = node_size(origin)[0] == widest[column, origin.row]
            is_next = columns[node.id] == column + 1 and origin.row == node.row and begins_at_gap
            # Graphs whose links run backwards are drawn too, but not tidied.
            if not is_next and columns[node.id] > column:
                routed.setdefault((link.node, link.slot), {}).setdefault(node.row, []).append((node.id, name))
    return routed


def _channel(routed: Mapping[Output, Mapping[int, object]], row: int) -> int:
    """The height of the channel above a row."""
    tracks = sum(1 for rows in routed.values() if row in rows)
    return TRACK * (tracks + 1) if tracks else 0


def _tracks(
    graph: Graph, columns: Mapping[int, int], routed: Mapping[Output, Mapping[int, object]]
) -> dict[Output, int]:
    """Where each output's links run in the gap right of its column: 1, 2, 3 ... from the left.

    Those that stay in a row share a track with those of other rows.
    """
    rows = {node.id: node.row for node in graph.nodes}
    stays = {output: set(to) == {rows[output[0]]} for output, to in routed.items()}
    tracks: dict[Output, int] = {}
    used: dict[tuple[int, int | None], int] = {}
    for output in sorted(routed, key=lambda one: stays[one]):  # those of several rows first
        column = columns[output[0]]
        place_of = (column, rows[output[0]] if stays[output] else None)
        used[place_of] = used.get(place_of, 0) + 1
        tracks[output] = used[place_of] + (used.get((column, None), 0) if stays[output] else 0)
    return tracks


def place(graph: Graph, x: int = 0, y: int = 0) -> dict[int, Box]:
    """A box for every node, by id. Every link runs from left to right and no two boxes overlap."""
    columns, routed = _columns(graph), _routed(graph)
    tracks = _tracks(graph, columns, routed)
    sizes = {node.id: node_size(node) for node in graph.nodes}
    cells: dict[tuple[int, int], list[int]] = {}
    for node in graph.nodes:
        cells.setdefault((columns[node.id], node.row), []).append(node.id)

    row_top: dict[int, int] = {}
    top = y
    for number, row in enumerate(graph.rows()):
        top += _channel(routed, row) if number else 0  # that of the first lies under the titles of the groups
        row_top[row] = top
        heights = [sum(sizes[i][1] + TITLE_HEIGHT + GAP_Y for i in ids) for (_, at), ids in cells.items() if at == row]
        top += max(heights)

    boxes: dict[int, Box] = {}
    left = x
    for column in sorted(set(columns.values())):
        widest = 0
        for (at, row), ids in cells.items():
            if at != column:
                continue
            y = row_top[row]
            for node_id in ids:
                width, height = sizes[node_id]
                boxes[node_id] = Box(left, y, width, height)
                y += height + TITLE_HEIGHT + GAP_Y
                widest = max(widest, width)
        left += widest + GAP_X + TRACK * max((tracks[one] for one in routed if columns[one[0]] == column), default=0)
    return boxes


def _reroutes(graph: Graph, boxes: Mapping[int, Box]) -> tuple[list[dict[str, Any]], dict[End, int]]:
    """Reroutes with the ends of the links through each, and the last one before each end.

    An output's links share their way: right of its column to the channel of each row, along that to each column.
    """
    columns, routed = _columns(graph), _routed(graph)
    tracks = _tracks(graph, columns, routed)
    left: dict[int, int] = {}
    right: dict[int, int] = {}
    row_top: dict[int, int] = {}
    for node in graph.nodes:
        box, column = boxes[node.id], columns[node.id]
        left[column] = box.x
        right[column] = max(box.right, right.get(column, box.right))
        row_top[node.row] = min(box.y, row_top.get(node.row, box.y))
    reroutes: list[dict[str, Any]] = []
    last: dict[End, int] = {}

    def add(x: int, y: int, parent: int | None, ends: Sequence[End]) -> int:
        upper = {} if parent is None else {"parentId": parent}
        reroutes.append({"id": len(reroutes) + 1, **upper, "pos": [x, y], "linkIds": list(ends)})
        return len(reroutes)

    in_channel: dict[int, int] = {}
    for (node_id, slot), rows in routed.items():
        column = columns[node_id]
        x, slot_y = right[column] + TRACK * tracks[node_id, slot], boxes[node_id].y + SLOT_HEIGHT * slot + SLOT_MIDDLE
        levels = {}
        for row in rows:
            in_channel[row] = in_channel.get(row, 0) + 1
            levels[row] = row_top[row] - TITLE_HEIGHT - TRACK * in_channel[row]
        out = add(x, slot_y, None, [end for ends in rows.values() for end in ends])
        for above in (True, False):  # of where the link leaves its node
            ways = sorted(
                (row for row in rows if (levels[row] < slot_y) is above),
                key=lambda row: abs(levels[row] - slot_y),
            )
            parent = out
            for number, row in enumerate(ways):
                beyond = [end for other in ways[number:] for end in rows[other]]
                parent = along = add(x, levels[row], parent, beyond)
                targets = sorted({columns[end[0]] for end in rows[row]})
                for target in targets:
                    ends = [end for end in rows[row] if columns[end[0]] >= target]
                    if target > column + 1:
                        along = add(left[target] - GAP_X // 2, levels[row], along, ends)
                    last |= {end: along for end in ends if columns[end[0]] == target}
    return reroutes, last


def frame(graph: Graph, boxes: Mapping[int, Box]) -> dict[str, Box]:
    """The rectangle of each group that has nodes, with room for the group's title, in the order of GROUPS."""
    frames = {}
    room = GROUP_TITLE + _channel(_routed(graph), graph.rows()[0]) if graph.nodes else GROUP_TITLE
    for group in GROUPS:
        inside = [boxes[node.id].with_title() for node in graph.nodes if node.group == group]
        if inside:
            x = min(box.x for box in inside) - GROUP_PAD
            y = min(box.y for box in inside) - room
            right = max(box.right for box in inside) + GROUP_PAD
            bottom = max(box.bottom for box in inside) + GROUP_PAD
            frames[group] = Box(x, y, right - x, bottom - y)
    return frames

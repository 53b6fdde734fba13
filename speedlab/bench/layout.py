"""Where the nodes of a workflow lie: one column a group from left to right, one row a lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .graph import GROUPS, Graph, Node

TITLE_HEIGHT = 30
SLOT_HEIGHT = 20
WIDGET_HEIGHT = 24
TEXT_HEIGHT = 120
GAP_X = 60
GAP_Y = 50
GROUP_PAD = 20
GROUP_TITLE = 40
WIDTH = 320
# Nodes that show more than sockets and widgets: extra (width, height) in pixels.
EXTRA: Mapping[str, tuple[int, int]] = {
    "SaveImage": (20, 320),
    "PreviewImage": (20, 260),
    "CLIPTextEncode": (60, 0),
    "SpeedLabTextEncode": (60, 0),
    "SpeedLabPromptQueue": (160, 60),
    "SpeedLabProfileReport": (220, 660),
    "SpeedLabProfileSampler": (60, 270),
    "SpeedLabBenchmark": (220, 420),
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
    height = 6 + SLOT_HEIGHT * max(len(known.sockets), len(known.outputs), 1)
    for entry in known.widgets:
        height += TEXT_HEIGHT if entry.multiline else WIDGET_HEIGHT
        height += WIDGET_HEIGHT if entry.extra is not None else 0
    more_width, more_height = EXTRA.get(node.class_type, (0, 0))
    return WIDTH + more_width, height + more_height


def _depths(graph: Graph) -> dict[int, int]:
    """How many links inside its own group lie before each node: its sub-column."""
    by_id = {node.id: node for node in graph.nodes}
    depths: dict[int, int] = {}
    for node in graph.nodes:
        before = [link.node for link in node.links().values() if by_id[link.node].group == node.group]
        depths[node.id] = 1 + max((depths[other] for other in before), default=-1)
    return depths


def place(graph: Graph, x: int = 0, y: int = 0) -> dict[int, Box]:
    """A box for every node, by id. Every link runs from left to right and no two boxes overlap."""
    depths = _depths(graph)
    sizes = {node.id: node_size(node) for node in graph.nodes}
    cells: dict[tuple[str, int, int], list[int]] = {}
    for node in graph.nodes:
        cells.setdefault((node.group, depths[node.id], node.lane), []).append(node.id)

    lane_top: dict[int, int] = {}
    top = y
    for lane in graph.lanes():
        lane_top[lane] = top
        heights = [sum(sizes[i][1] + TITLE_HEIGHT + GAP_Y for i in ids) for key, ids in cells.items() if key[2] == lane]
        top += max(heights)

    boxes: dict[int, Box] = {}
    left = x
    for column in sorted({(GROUPS.index(group), depth) for group, depth, _ in cells}):
        group, depth = GROUPS[column[0]], column[1]
        widest = 0
        for (cell_group, cell_depth, lane), ids in cells.items():
            if (cell_group, cell_depth) != (group, depth):
                continue
            row = lane_top[lane]
            for node_id in ids:
                width, height = sizes[node_id]
                boxes[node_id] = Box(left, row, width, height)
                row += height + TITLE_HEIGHT + GAP_Y
                widest = max(widest, width)
        left += widest + GAP_X
    return boxes


def frame(graph: Graph, boxes: Mapping[int, Box]) -> dict[str, Box]:
    """The rectangle of each group that has nodes, with room for the group's title, in the order of GROUPS."""
    frames = {}
    for group in GROUPS:
        inside = [boxes[node.id].with_title() for node in graph.nodes if node.group == group]
        if inside:
            x = min(box.x for box in inside) - GROUP_PAD
            y = min(box.y for box in inside) - GROUP_TITLE
            right = max(box.right for box in inside) + GROUP_PAD
            bottom = max(box.bottom for box in inside) + GROUP_PAD
            frames[group] = Box(x, y, right - x, bottom - y)
    return frames

"""A small typed graph builder: one definition, written as a `/prompt` graph or as a drag-in workflow.

    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", group="Load", ckpt_name="model.safetensors")
    encode = graph.add("CLIPTextEncode", group="Prompt", clip=loader["CLIP"], text="a lighthouse")

Inputs are checked while building: an unknown name, a missing socket or a link of another type is an error there.

What each node of a workflow takes and gives: a committed snapshot of `/object_info`, cut to what a graph needs.

The order of inputs is part of it: a drag-in workflow stores widget values as a plain list in that order. A server
test compares the snapshot with a live server, and `workflows --signatures URL` renews it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

GROUPS = ("Load", "Prompt", "Sample", "Decode", "Measure")
ANY = "*"
ApiGraph = dict[str, dict[str, Any]]


class GraphError(ValueError):
    """A graph that cannot be built; the message names node and input."""


@dataclass(frozen=True)
class Link:
    """An output of a node: where a link starts."""

    node: int
    slot: int
    type: str


@dataclass(frozen=True)
class Node:
    """One node. `row` is where it stands on the canvas: one row an image."""

    id: int
    signature: NodeSignature
    inputs: Mapping[str, Any]
    title: str
    group: str
    row: int

    @property
    def class_type(self) -> str:
        """The node id that ComfyUI knows."""
        return self.signature.id

    def __getitem__(self, output: str | int) -> Link:
        """The output called `output`, or the output at that position."""
        names = [name for name, _ in self.signature.outputs]
        if isinstance(output, str):
            if output not in names:
                raise GraphError(f"{self.class_type} has no output '{output}'; it has {', '.join(names) or 'none'}")
            output = names.index(output)
        if not 0 <= output < len(names):
            raise GraphError(f"{self.class_type} has no output {output}; it has {len(names)}")
        return Link(self.id, output, self.signature.outputs[output][1])

    def links(self) -> dict[str, Link]:
        """The inputs that are links, by name."""
        return {name: value for name, value in self.inputs.items() if isinstance(value, Link)}


def types_match(given: str, wanted: str) -> bool:
    """Whether an output of type `given` may feed an input of type `wanted` (either may be `*` or a comma list)."""
    if ANY in (given, wanted):
        return True
    return bool({part.strip() for part in given.split(",")} & {part.strip() for part in wanted.split(",")})


def _checked(node: NodeSignature, entry: InputSignature, inputs: Mapping[str, Any]) -> Any:
    """The value of one input: as given, else its default; GraphError where that leaves a hole or a wrong type."""
    if entry.name not in inputs:
        if entry.widget and entry.default is not None:
            return entry.default
        raise GraphError(f"{node.id}: input '{entry.name}' ({entry.type}) is missing")
    value = inputs[entry.name]
    if isinstance(value, Link):
        if not types_match(value.type, entry.type):
            raise GraphError(f"{node.id}: input '{entry.name}' takes {entry.type}, not {value.type}")
    elif not entry.widget:
        raise GraphError(f"{node.id}: input '{entry.name}' ({entry.type}) takes a link, not {value!r}")
    return value


@dataclass
class Graph:
    """Nodes in the order they were added. Ids are 1, 2, 3 ... so that the same definition gives the same files."""

    nodes: list[Node] = field(default_factory=list)
    # Names of plans by the sampler that runs them, where a graph holds several; others run the scenario's plan.
    plans: dict[int, str] = field(default_factory=dict)

    def add(self, class_type: str, /, *, group: str, row: int = 0, title: str | None = None, **inputs: Any) -> Node:
        """Add a node and return it. Inputs are links or values; a widget left out gets its default."""
        known = signature(class_type)
        if group not in GROUPS:
            raise GraphError(f"{class_type}: group '{group}' is none of {', '.join(GROUPS)}")
        for name in inputs:
            if known.input(name) is None:
                raise GraphError(f"{class_type} has no input '{name}'")
        values: dict[str, Any] = {}
        for entry in known.inputs:
            left_out = entry.name not in inputs and entry.optional and (not entry.widget or entry.default is None)
            if not left_out:
                values[entry.name] = _checked(known, entry, inputs)
        node = Node(len(self.nodes) + 1, known, values, title or class_type, group, row)
        self.nodes.append(node)
        return node

    def find(self, class_type: str) -> list[Node]:
        """Every node of that id, in order."""
        return [node for node in self.nodes if node.class_type == class_type]

    def set(self, node: Node, **inputs: Any) -> Node:
        """Change inputs of a node already added; returns the new node."""
        for name, value in inputs.items():
            entry = node.signature.input(name)
            if entry is None:
                raise GraphError(f"{node.class_type} has no input '{name}'")
            _checked(node.signature, entry, {name: value})
        changed = replace(node, inputs={**node.inputs, **inputs})
        self.nodes[node.id - 1] = changed
        return changed

    def to_api(self) -> ApiGraph:
        """The graph as `/prompt` takes it: {"1": {"class_type": ..., "inputs": ..., "_meta": {"title": ...}}}."""
        return {
            str(node.id): {
                "class_type": node.class_type,
                "inputs": {
                    name: [str(value.node), value.slot] if isinstance(value, Link) else value
                    for name, value in node.inputs.items()
                },
                "_meta": {"title": node.title},
            }
            for node in self.nodes
        }

    def rows(self) -> list[int]:
        """The rows in use, top to bottom."""
        return sorted({node.row for node in self.nodes})


def is_link(value: Any) -> bool:
    """Whether an input value of an API graph is a link: [node id, slot]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def upstream(api: ApiGraph, targets: Iterable[str]) -> ApiGraph:
    """The part of an API graph that `targets` need, themselves included, in the graph's own order."""
    wanted: set[str] = set()
    todo = list(targets)
    while todo:
        node_id = todo.pop()
        if node_id in wanted:
            continue
        wanted.add(node_id)
        todo += [value[0] for value in api[node_id]["inputs"].values() if is_link(value)]
    return {node_id: node for node_id, node in api.items() if node_id in wanted}


def split_rows(graph: Graph) -> list[ApiGraph]:
    """One API graph a row, each with everything that row's output nodes need.

    Images that are queued one by one have load, encode and decode times of their own, and only the first one loads.
    """
    api = graph.to_api()
    parts = []
    for row in graph.rows():
        ends = [str(node.id) for node in graph.nodes if node.row == row and node.signature.output_node]
        if ends:
            parts.append(upstream(api, ends))
    return parts


SNAPSHOT = Path(__file__).with_name("signatures.json")
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
OURS = "SpeedLab"
SEED_NAMES = frozenset({"seed", "noise_seed"})


class UnknownNodeError(KeyError):
    """A node id that the snapshot does not hold."""

    def __str__(self) -> str:
        return f"node '{self.args[0]}' is not in {SNAPSHOT.name}: renew it with 'workflows --signatures URL'"


@dataclass(frozen=True)
class InputSignature:
    """One input: a socket (`widget` False) or a value with a widget; `extra` is the value of a second widget.

    The canvas shows an `advanced` one only where that is asked for.
    """

    name: str
    type: str
    widget: bool = False
    optional: bool = False
    default: Any = None
    multiline: bool = False
    extra: str | None = None
    advanced: bool = False

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that the snapshot stays short."""
        plain = InputSignature(self.name, self.type)
        return {
            key: value for key, value in vars(self).items() if key in ("name", "type") or value != getattr(plain, key)
        }


@dataclass(frozen=True)
class NodeSignature:
    """A node's inputs in the order of INPUT_TYPES (required, then optional) and its outputs as (name, type)."""

    id: str
    inputs: tuple[InputSignature, ...]
    outputs: tuple[tuple[str, str], ...]
    output_node: bool = False

    def input(self, name: str) -> InputSignature | None:
        """The input called `name`, or None."""
        return next((entry for entry in self.inputs if entry.name == name), None)

    @property
    def sockets(self) -> tuple[InputSignature, ...]:
        """The inputs that only take links."""
        return tuple(entry for entry in self.inputs if not entry.widget)

    @property
    def widgets(self) -> tuple[InputSignature, ...]:
        """The inputs that have a widget."""
        return tuple(entry for entry in self.inputs if entry.widget)

    def to_json(self) -> dict[str, Any]:
        """The form kept in the snapshot."""
        return {
            "inputs": [entry.to_json() for entry in self.inputs],
            "outputs": [list(entry) for entry in self.outputs],
            "output_node": self.output_node,
        }


def _input_from_info(name: str, spec: list[Any], optional: bool) -> InputSignature:
    kind, options = spec[0], (spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {})
    type_name = "COMBO" if isinstance(kind, list) else str(kind)
    widget = type_name in WIDGET_TYPES and not options.get("forceInput", False)
    extra = None
    if widget and options.get("control_after_generate", type_name == "INT" and name in SEED_NAMES):
        extra = "fixed"
    elif widget and options.get("image_upload", False):
        extra = "image"
    return InputSignature(
        name=name,
        type=type_name,
        widget=widget,
        optional=optional,
        default=options.get("default") if widget else None,
        multiline=bool(options.get("multiline", False)),
        extra=extra,
        advanced=widget and bool(options.get("advanced", False)),
    )


def signature_from_info(node_id: str, info: Mapping[str, Any]) -> NodeSignature:
    """Cut one entry of `/object_info` down to a signature."""
    inputs: list[InputSignature] = []
    for section in ("required", "optional"):
        entries: Mapping[str, Any] = info["input"].get(section, {})
        order = info.get("input_order", {}).get(section, list(entries))
        found = [_input_from_info(name, entries[name], section == "optional") for name in order]
        # Which inputs of core's nodes are advanced differs by version; the snapshot holds for all.
        inputs += found if node_id.startswith(OURS) else [replace(entry, advanced=False) for entry in found]
    types = [str(entry) if not isinstance(entry, list) else "COMBO" for entry in info["output"]]
    return NodeSignature(
        id=node_id,
        inputs=tuple(inputs),
        outputs=tuple(zip(info["output_name"], types, strict=True)),
        output_node=bool(info.get("output_node", False)),
    )


def signature_from_json(node_id: str, entry: Mapping[str, Any]) -> NodeSignature:
    """Read one entry of the snapshot."""
    return NodeSignature(
        id=node_id,
        inputs=tuple(InputSignature(**fields) for fields in entry["inputs"]),
        outputs=tuple((name, kind) for name, kind in entry["outputs"]),
        output_node=bool(entry["output_node"]),
    )


@functools.lru_cache(maxsize=1)
def snapshot() -> Mapping[str, NodeSignature]:
    """Every signature of the committed snapshot, by node id."""
    data = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return {node_id: signature_from_json(node_id, entry) for node_id, entry in data.items()}


def signature(node_id: str) -> NodeSignature:
    """The signature of one node; UnknownNodeError where the snapshot has none."""
    try:
        return snapshot()[node_id]
    except KeyError:
        raise UnknownNodeError(node_id) from None


def snapshot_text(signatures: Iterable[NodeSignature]) -> str:
    """The snapshot file's text: sorted by id, one input a line."""
    blocks = []
    for entry in sorted(signatures, key=lambda item: item.id):
        data = entry.to_json()
        lines = ",\n".join(f"      {json.dumps(line)}" for line in data["inputs"])
        inputs = f"[\n{lines}\n    ]" if lines else "[]"
        blocks.append(
            f'  {json.dumps(entry.id)}: {{\n    "inputs": {inputs},\n    "outputs": {json.dumps(data["outputs"])},\n'
            f'    "output_node": {json.dumps(entry.output_node)}\n  }}'
        )
    return "{\n" + ",\n".join(blocks) + "\n}\n"

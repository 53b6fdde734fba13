"""What each node of a workflow takes and gives: a committed snapshot of `/object_info`, cut to what a graph needs.

The order of inputs is part of it: a drag-in workflow stores widget values as a plain list in that order. A server
test compares the snapshot with a live server, and `workflows --signatures URL` renews it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("signatures.json")
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
SEED_NAMES = frozenset({"seed", "noise_seed"})


class UnknownNodeError(KeyError):
    """A node id that the snapshot does not hold."""

    def __str__(self) -> str:
        return f"node '{self.args[0]}' is not in {SNAPSHOT.name}: renew it with 'workflows --signatures URL'"


@dataclass(frozen=True)
class InputSignature:
    """One input: a socket (`widget` False) or a value with a widget; `extra` is the value of a second widget."""

    name: str
    type: str
    widget: bool = False
    optional: bool = False
    default: Any = None
    multiline: bool = False
    extra: str | None = None

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
    )


def signature_from_info(node_id: str, info: Mapping[str, Any]) -> NodeSignature:
    """Cut one entry of `/object_info` down to a signature."""
    inputs: list[InputSignature] = []
    for section in ("required", "optional"):
        entries: Mapping[str, Any] = info["input"].get(section, {})
        order = info.get("input_order", {}).get(section, list(entries))
        inputs += [_input_from_info(name, entries[name], section == "optional") for name in order]
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

"""What saved workflows and prompts rely on: a committed snapshot of this pack's nodes at the last release.

`signatures.json` follows the tree; the contract is renewed at a release only, with `python -m speedlab_tools contract
URL` and a running ComfyUI. Until then every node, input, choice and output of it has to stay where it is.

`contract`: what a running ComfyUI's nodes of this pack keep of the last release, and renewing it at the next.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedlab import __version__

from .client.client import ComfyClient
from .client.errors import BenchError
from .client.files import MODEL_SUFFIXES
from .client.graph import InputSignature, NodeSignature, signature_from_info, signature_from_json

CONTRACT = Path(__file__).with_name("contract.json")
PREFIX = "SpeedLab"
RENEW = "python -m speedlab_tools contract URL --breaking"


@dataclass(frozen=True)
class Limits:
    """What a widget's value may be: `choices` of a combo, bounds of a number; None where there are none of ours."""

    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Only what is set."""
        values = {"choices": None if self.choices is None else list(self.choices), "low": self.low, "high": self.high}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class NodeContract:
    """One node as saved workflows know it; `limits` by the name of the input."""

    signature: NodeSignature
    limits: Mapping[str, Limits]


def contract_from_info(node_id: str, info: Mapping[str, Any]) -> NodeContract:
    """Read an entry of `/object_info`, or the same made from a node class by `info_of`."""
    signature = signature_from_info(node_id, info)
    specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return NodeContract(signature, {entry.name: _limits(entry.name, specs[entry.name]) for entry in signature.widgets})


def info_of(node: Any) -> dict[str, Any]:
    """What `/object_info` would say of a node class, as far as the contract reads it."""
    return {
        "input": node.INPUT_TYPES(),
        "output": list(node.RETURN_TYPES),
        "output_name": list(node.RETURN_NAMES),
        "output_node": bool(getattr(node, "OUTPUT_NODE", False)),
    }


def read_contract(path: Path = CONTRACT) -> dict[str, NodeContract]:
    """The committed contract by node id."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return {node_id: _from_json(node_id, entry) for node_id, entry in nodes.items()}


def contract_text(version: str, nodes: Iterable[NodeContract]) -> str:
    """The text of the contract file: sorted by id, one input a line."""
    blocks = []
    for node in sorted(nodes, key=lambda entry: entry.signature.id):
        data = node.signature.to_json()
        lines = [json.dumps({**entry, **_limits_of(node, entry["name"]).to_json()}) for entry in data["inputs"]]
        inputs = "[\n        " + ",\n        ".join(lines) + "\n      ]" if lines else "[]"
        blocks.append(
            f'    {json.dumps(node.signature.id)}: {{\n      "inputs": {inputs},\n'
            f'      "outputs": {json.dumps(data["outputs"])},\n'
            f'      "output_node": {json.dumps(node.signature.output_node)}\n    }}'
        )
    return f'{{\n  "version": {json.dumps(version)},\n  "nodes": {{\n' + ",\n".join(blocks) + "\n  }\n}\n"


def breaches(kept: Mapping[str, NodeContract], present: Mapping[str, NodeContract]) -> list[str]:
    """One sentence for each thing of the contract that is not there any more. New nodes and outputs, and new optional
    inputs behind the old ones, are none."""
    found: list[str] = []
    for node_id, node in kept.items():
        if node_id in present:
            found += [f"{node_id}: {line}" for line in _node_breaches(node, present[node_id])]
        else:
            found.append(f"{node_id} is gone: workflows that hold it do not load any more")
    return found


def _node_breaches(kept: NodeContract, present: NodeContract) -> Iterator[str]:
    old, new = kept.signature, present.signature
    for entry in old.inputs:
        now = new.input(entry.name)
        if now is None:
            yield f"input '{entry.name}' is gone"
        else:
            yield from _input_breaches(entry, now)
            yield from _limit_breaches(entry.name, _limits_of(kept, entry.name), _limits_of(present, entry.name))
    names = [entry.name for entry in old.inputs]
    ordered = [entry.name for entry in new.inputs if entry.name in names]
    if ordered != [name for name in names if name in ordered]:
        yield f"inputs stand in the order {', '.join(ordered)}, not {', '.join(names)}: saved values would be mixed up"
    added = [entry for entry in new.inputs if old.input(entry.name) is None]
    yield from (f"new input '{entry.name}' is not optional" for entry in added if not entry.optional)
    if any(entry.name not in names for entry in new.inputs[: len(names)]):
        yield f"new inputs ({', '.join(entry.name for entry in added)}) do not stand behind the old ones"
    for slot, output in enumerate(old.outputs):
        now_there = new.outputs[slot] if slot < len(new.outputs) else None
        if now_there != output:
            yield f"output {slot} was {' '.join(output)} and is {' '.join(now_there) if now_there else 'gone'}"
    if old.output_node and not new.output_node:
        yield "it is no output node any more: a prompt that ends in it is refused"


def _input_breaches(old: InputSignature, new: InputSignature) -> Iterator[str]:
    if new.type != old.type:
        yield f"input '{old.name}' was {old.type} and is {new.type}"
    if new.widget != old.widget or new.extra != old.extra:
        yield f"input '{old.name}' has other widgets: the saved values behind it would move"
    if old.optional and not new.optional:
        yield f"input '{old.name}' was optional and is required"
    if new.default != old.default:
        yield f"the default of '{old.name}' was {old.default!r} and is {new.default!r}"


def _limit_breaches(name: str, old: Limits, new: Limits) -> Iterator[str]:
    lost = [choice for choice in old.choices or () if choice not in (new.choices or ())]
    if lost:
        yield f"'{name}' has no choice {', '.join(lost)} any more"
    if new.low is not None and (old.low is None or new.low > old.low):
        yield f"'{name}' began at {old.low} and begins at {new.low}"
    if new.high is not None and (old.high is None or new.high < old.high):
        yield f"'{name}' ended at {old.high} and ends at {new.high}"


def _limits(name: str, spec: Any) -> Limits:
    kind, options = spec[0], (spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {})
    if isinstance(kind, str):
        return Limits(_choices(name, options.get("options")), options.get("min"), options.get("max"))
    return Limits(_choices(name, kind))


def _choices(name: str, given: Any) -> tuple[str, ...] | None:
    """The choices that this pack makes. Names of files, and core's samplers and schedulers, differ by machine."""
    if given is None or name.endswith("_name") or name in ("scheduler", "sampler"):
        return None
    return tuple(str(choice) for choice in given if not str(choice).lower().endswith(MODEL_SUFFIXES))


def _limits_of(node: NodeContract, name: str) -> Limits:
    return node.limits.get(name, Limits())


def _from_json(node_id: str, entry: Mapping[str, Any]) -> NodeContract:
    limits, inputs = {}, []
    for fields in entry["inputs"]:
        rest = {key: value for key, value in fields.items() if key not in ("choices", "low", "high")}
        inputs.append(rest)
        if fields.get("widget"):
            choices = fields.get("choices")
            kept = None if choices is None else tuple(choices)
            limits[fields["name"]] = Limits(kept, fields.get("low"), fields.get("high"))
    return NodeContract(signature_from_json(node_id, {**entry, "inputs": inputs}), limits)


def run(args: argparse.Namespace) -> int:
    """Compare, and unless `--check` was given write the new contract; exit code 1 where something of it is gone."""
    present = asyncio.run(_fetch(args.url))
    if not present:
        raise BenchError(f"the server at {args.url} has no node of this pack")
    broken = breaches(read_contract(), present) if CONTRACT.is_file() else []
    for line in broken:
        print(line)
    if args.check:
        print(f"{len(broken)} breaches of {CONTRACT.name}")
        return 1 if broken else 0
    if broken and not args.breaking:
        print(f"Nothing was written. Where that is meant: {RENEW}, and say so in the changelog.")
        return 1
    CONTRACT.write_text(contract_text(__version__, present.values()), encoding="utf-8", newline="\n")
    print(CONTRACT)
    return 0


async def _fetch(url: str) -> dict[str, NodeContract]:
    async with ComfyClient(url) as client:
        info = await client.object_info()
    return {node_id: contract_from_info(node_id, info[node_id]) for node_id in info if node_id.startswith(PREFIX)}

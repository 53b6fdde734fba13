"""`--small`: any scenario cut down to seconds, for tests of the machinery. Its times say nothing about a device.

Sizes shrink to 64 pixels, steps to 2, repeats to 1, prompts to 2 and an axis to its first values; of lanes that
differ by more than the prompt all are kept. Records name the scenario with `@small` behind it, so that such a row is
never taken for a measurement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..client.graph import ApiGraph

MARK = "@small"
SIDE, STEPS, BATCH, PROMPTS, VALUES = 64, 2, 2, 2, 2
_AXES: Mapping[str, str] = {
    "batch": "1, 2",
    "resolution": f"{SIDE}x{SIDE}, {2 * SIDE}x{SIDE}",
    "steps": "1, 2",
    "prompt_tokens": "8, 154",
}
_MOST: Mapping[str, int] = {
    "width": SIDE, "height": SIDE, "steps": STEPS, "batch": BATCH, "batch_size": BATCH, "repeats": 1, "warmup": 0,
}  # fmt: skip
_SETTING = re.compile(r"\b(steps|width|height|batch)\s*=\s*(\d+)")


def shrink(api: ApiGraph) -> ApiGraph:
    """A copy of a graph with everything small that costs time; links and model files stay as they are."""
    return {node_id: {**node, "inputs": _inputs(node["inputs"])} for node_id, node in api.items()}


def _inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    small = {name: _limited(name, value) for name, value in inputs.items()}
    for axis in ("x", "y"):
        if isinstance(small.get(f"axis_{axis}"), str) and isinstance(small.get(f"values_{axis}"), str):
            small[f"values_{axis}"] = axis_values(small[f"axis_{axis}"], small[f"values_{axis}"])
    for name in ("positive", "prompts", "seed", "seeds"):
        if isinstance(small.get(name), str):
            small[name] = "\n".join(small[name].splitlines()[:PROMPTS])
    if isinstance(small.get("plan"), str):
        small["plan"] = _plan(small["plan"])
    return small


def _limited(name: str, value: Any) -> Any:
    most = _MOST.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return min(value, most) if most is not None and is_number else value


def axis_values(axis: str, text: str) -> str:
    """The first values of an axis, or small ones where their size is what costs time."""
    if axis in _AXES:
        if axis == "batch" and "max" in text:
            return "1, max@2"
        # A baseline of the whole scenario stays one: the last value stands for it.
        *first, last = _AXES[axis].split(", ")
        return ", ".join([*first, f"*{last}" if "*" in text else last])
    if axis == "plan":
        return "\n".join(_plan(line) for line in text.splitlines())
    if axis == "sampler":
        return re.sub(r"@\d+", f"@{STEPS}", text)
    parts = [part for part in re.split(r"[\n,]", text) if part.strip()]
    marked = [part for part in parts if part.strip().startswith("*")]
    kept = dict.fromkeys([*marked, *parts])
    return ",".join(list(kept)[: max(VALUES, len(marked))])


def _plan(text: str) -> str:
    return _SETTING.sub(lambda match: f"{match[1]}={min(int(match[2]), _MOST[match[1]])}", text)

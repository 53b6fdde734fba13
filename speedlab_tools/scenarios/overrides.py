"""Command-line settings laid over a scenario's own: sizes, steps, seed and model files.

`--small`: any scenario cut down to seconds, for tests of the machinery. Its times say nothing about a device.

Sizes shrink to 64 pixels, steps to 2, repeats to 1, prompts to 2 and an axis to its first values; of rows that
differ by more than the prompt all are kept. Records name the scenario with `@small` behind it, so that such a row is
never taken for a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..client.errors import BenchError
from ..client.graph import ApiGraph
from . import drawn
from .scenario import NeededFile, Scenario, Settings

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Overrides:
    """What the user changed; None keeps the scenario's value."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    batch: int | None = None
    seed: int | None = None
    repeats: int | None = None
    warmup: int | None = None

    def check(self) -> None:
        """BenchError for a value that no node would take, before anything is started."""
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (value < 64 or value % 8):
                raise BenchError(f"--{name} {value}: sizes are multiples of 8 from 64 on")
        for name, least in (("steps", 1), ("batch", 1), ("repeats", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BenchError(f"--{name} {value}: {least} is the least")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise BenchError(f"--seed {self.seed}: seeds run from 0 to {MAX_SEED}")


def _with_overrides(settings: Settings, overrides: Overrides) -> Settings:
    changed = {
        name: getattr(overrides, name)
        for name in ("width", "height", "steps", "batch", "repeats", "warmup")
        if getattr(overrides, name) is not None
    }
    if overrides.seed is not None:
        changed["prompts"] = tuple(dataclasses.replace(prompt, seed=overrides.seed) for prompt in settings.prompts)
    return dataclasses.replace(settings, **changed)


def with_file(scenario: Scenario, kind: str, name: str) -> Scenario:
    """The scenario with another model file of that kind; a kind it does not need yet is added."""
    known = scenario.file(kind)
    if known is None:
        extra = NeededFile(kind, f"models/{kind}", name, "given on the command line")
        return dataclasses.replace(scenario, files=(*scenario.files, extra))
    other = dataclasses.replace(known, default=name, url="")
    return dataclasses.replace(scenario, files=tuple(other if entry is known else entry for entry in scenario.files))


def adapt(
    scenario: Scenario, overrides: Overrides, checkpoint: str | None = None, others: Mapping[str, str] | None = None
) -> Scenario:
    """The scenario as the user wants it run, with model files that the server knows by these names.

    `others` are by kind. A VAE takes the place of any checkpoint's own; other kinds go where a scenario needs them.
    """
    family = drawn.family_of(checkpoint)
    if family is not None:
        scenario = drawn.on_drawn(scenario, family)
    scenario = scenario.with_settings(_with_overrides(scenario.settings, overrides))
    if checkpoint is not None:
        scenario = with_file(scenario, "checkpoint", checkpoint)
    for kind, name in (others or {}).items():
        if kind == "vae" or scenario.file(kind) is not None:
            scenario = with_file(scenario, kind, name)
    return scenario


def overrides_of(args: argparse.Namespace) -> Overrides:
    """The checked settings of the command line."""
    overrides = Overrides(args.width, args.height, args.steps, args.batch, args.seed, args.repeats, args.warmup)
    overrides.check()
    return overrides


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
            parts = re.split(r"[\n,]", small[name]) if name == "seed" else small[name].splitlines()
            small[name] = "\n".join(parts[:PROMPTS])
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

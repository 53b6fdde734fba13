"""Random values for the widgets of a node, from the server's own description of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

_WIDGETS = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
_DEFAULT_SHARE = 0.4
# Far from a default there is only more of the same, and it takes longer.
_MOST_OVER_DEFAULT = 6


def choices(node: Mapping[str, Any], name: str) -> list[Any]:
    """The choices of a node's combo, as `/object_info` tells them in old and in new words; empty where it is none."""
    spec = {**node["input"].get("required", {}), **node["input"].get("optional", {})}.get(name, [None])
    return list(spec[0] if isinstance(spec[0], list) else _options(spec).get("options", []))


def sockets(node: Mapping[str, Any], part: str = "required") -> dict[str, str]:
    """The inputs of a node that take links: name -> type."""
    return {name: spec[0] for name, spec in node["input"].get(part, {}).items() if not _is_widget(spec)}


def widget_values(node: Mapping[str, Any], rng: Random) -> dict[str, Any]:
    """A value for every widget, in range: the default, or a random one."""
    specs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    return {name: _value(spec, rng) for name, spec in specs.items() if _is_widget(spec)}


def _is_widget(spec: Sequence[Any]) -> bool:
    return isinstance(spec[0], list) or (spec[0] in _WIDGETS and not _options(spec).get("forceInput"))


def _options(spec: Sequence[Any]) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _value(spec: Sequence[Any], rng: Random) -> Any:
    kind, options = spec[0], _options(spec)
    if "default" in options and rng.random() < _DEFAULT_SHARE:
        return options["default"]
    if isinstance(kind, list) or kind == "COMBO":
        return rng.choice(kind if isinstance(kind, list) else options["options"])
    if kind == "BOOLEAN":
        return rng.random() < 0.5
    if kind == "STRING":
        return options.get("default", "")
    low, high = options.get("min", 0), options.get("max", 1)
    high = min(high, _MOST_OVER_DEFAULT * max(abs(options.get("default", 0)), 1))
    if kind == "INT":
        return low + options.get("step", 1) * rng.randint(0, int((high - low) // options.get("step", 1)))
    return round(rng.uniform(low, high), 3)

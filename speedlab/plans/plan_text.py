"""The text of a plan: `name=technique(option=value)+technique(...)`. Pure: nothing here knows a node or a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..common.errors import SpeedLabError

BASELINE_MARK = "*"
STOCK = "stock"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAIN = ""
# The option that a value without a name stands for.
MAIN_OPTION: Mapping[str, str] = {
    "attention": "backend",
    "ays": "model_type",
    "compile": "backend",
    "compile_vae": "backend",
    "deepcache": "cache_interval",
    "dynamic_cfg": "stop_at",
    "forecast": "tolerance",
    "gits": "coeff",
    "memory_plan": "offload",
    "tiny": "decoder",
    "weights": "precision",
}
_EXACT = "attention(auto)+precision(linear=auto,memory=auto,convolution=auto)"
# Accelerate's presets, each on the front of docs/quality.md. README, help pages and the node show these very lines.
PRESETS: Mapping[str, str] = {
    "exact": _EXACT,
    "balanced": f"{_EXACT}+forecast(0.02)",
    "fast": f"{_EXACT}+deepcache(3,features=extrapolate)+dynamic_cfg(0.75)+tiny",
}


class SweepTextError(SpeedLabError):
    """A text of the Benchmark node that cannot be read; the message quotes it and says what is expected."""


@dataclass(frozen=True)
class TechniqueText:
    """A technique as written: options by name, values as texts; the key '' holds a value without a name."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> str:
        """The canonical spelling, which parses to the same again."""
        options = ",".join(value if key == MAIN else f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class PlanText:
    """A named stack of techniques, in order."""

    name: str
    techniques: tuple[TechniqueText, ...] = ()

    def words(self) -> str:
        """The canonical spelling."""
        return f"{self.name}={'+'.join(t.words() for t in self.techniques) or STOCK}"


def split_outside(text: str, separators: str) -> list[str]:
    """Split at separators outside of parentheses; parts are stripped. Raises SweepTextError if unbalanced."""
    parts, current, depth = [], "", 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if depth == 0 and character in separators:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if depth != 0:
        raise SweepTextError(f"'{text.strip()}' has a parenthesis without its partner.")
    return [*parts, current.strip()]


def parse_technique(text: str) -> TechniqueText:
    """Read `name`, `name(value)` or `name(option=value, ...)`. Raises SweepTextError."""
    match = re.fullmatch(r"\s*([^()\s=+]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None or not _NAME.fullmatch(match[1]):
        raise SweepTextError(f"'{text.strip()}' is no technique: write name or name(option=value, option=value).")
    options: dict[str, str] = {}
    for part in split_outside(match[2] or "", ","):
        if not part:
            if match[2] and match[2].strip():
                raise SweepTextError(f"'{text.strip()}' has an empty option.")
            continue
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            name, value = MAIN, name
        elif not _NAME.fullmatch(name):
            raise SweepTextError(f"'{name}' in '{text.strip()}' is no name of an option.")
        if not value:
            raise SweepTextError(f"The option '{name}' in '{text.strip()}' has no value.")
        if name in options:
            what = f"option '{name}'" if name else "value without a name"
            raise SweepTextError(f"'{text.strip()}' has more than one {what}.")
        options[name] = value
    return TechniqueText(match[1], options)


def parse_stack(text: str) -> tuple[TechniqueText, ...]:
    """Read `technique+technique(...)`; empty or `stock` is no technique at all. Raises SweepTextError."""
    if text.strip() in ("", STOCK):
        return ()
    stack = tuple(parse_technique(part) for part in split_outside(text, "+"))
    names = [technique.name for technique in stack if technique.name != "settings"]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SweepTextError(f"'{text.strip()}' has {twice} twice, of which only one could run: leave one out.")
    return stack


def parse_plan(text: str) -> PlanText:
    """Read one line `name=stack`; a stack without a name is called by its own spelling. Raises SweepTextError."""
    line = text.strip()
    name, equals, stack = line.partition("=")
    # An equals sign inside parentheses belongs to an option, so the line has no name.
    if not equals or "(" in name:
        techniques = parse_stack(line)
        return PlanText("+".join(t.words() for t in techniques) or STOCK, techniques)
    if not name.strip():
        raise SweepTextError(f"The plan '{line}' has no name before '='.")
    return PlanText(name.strip(), parse_stack(stack))

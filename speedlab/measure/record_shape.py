"""Whether JSON has the types that a class declares. A record is a file that may have been changed by hand."""

from __future__ import annotations

import collections.abc
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin, get_type_hints

# No time, size or rate of a run is larger.
_LARGEST = 1e15


def shape_fault(data: Mapping[str, Any], declared: type, place: str = "") -> str | None:
    """The first field that has not the type which `declared` gives it, in words; None where all have.

    What is missing is no fault. Of an object `Annotated` with a class, the parts that this class declares are looked at
    too, after the fields.
    """
    known = {name: hint for name, hint in _hints(declared).items() if name in data}
    for name, hint in known.items():
        outer = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if not _fits(data[name], outer):
            return f"{place}{name} is not {_kind(outer)}"
    parts = ((name, get_args(hint)[1]) for name, hint in known.items() if get_origin(hint) is Annotated)
    return next(filter(None, (shape_fault(data[name], inner, f"{place}{name}.") for name, inner in parts)), None)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a time, size or rate can be; what is computed from such numbers stays finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


@cache
def _hints(declared: type) -> dict[str, Any]:
    return get_type_hints(declared, include_extras=True)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is float:
        return is_number(value)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Annotated:
        return _fits(value, inner[0]) and shape_fault(value, inner[1]) is None
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(_fits(item, inner[1]) for item in value.values())
    if origin is collections.abc.Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(item, inner[0]) for item in value)
    return isinstance(value, hint)


def _kind(hint: Any, *, plural: bool = False) -> str:
    """`a text`, `an object of numbers`; that it may also be null is left out."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(choice, plural=plural) for choice in inner if choice is not types.NoneType)
    if origin is Annotated:
        return _kind(inner[0], plural=plural)
    names = {float: "number", str: "text", collections.abc.Mapping: "object", collections.abc.Sequence: "list"}
    noun = names.get(origin or hint, "value")
    noun = f"a{'n' if noun == 'object' else ''} {noun}" if not plural else f"{noun}s"
    return noun if not inner or inner[-1] is Any else f"{noun} of {_kind(inner[-1], plural=True)}"

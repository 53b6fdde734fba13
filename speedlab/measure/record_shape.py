"""Whether JSON has the shape of a record: which types stand where. A record is a file that anybody may have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

# No time, size or rate of a run is larger.
_LARGEST = 1e15

Check = Callable[[Any], bool]


def shape_fault(data: Mapping[str, Any]) -> str | None:
    """What is wrong with a record's fields, in words; None where the record can be computed with."""
    for name, (check, kind) in _FIELDS.items():
        if name in data and not check(data[name]):
            return f"{name} is not {kind}"
    for place, name, check, kind in _PARTS:
        value = data[place].get(name)
        if value is not None and not check(value):
            return f"{place}.{name} is not {kind}"
    return None


def _text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a time, size or rate can be; what is computed from such numbers stays finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, (list, tuple)) and all(check(item) for item in value)


def _object_of(check: Check) -> Check:
    return lambda value: _object(value) and all(check(item) for item in value.values())


def _precision(value: Any) -> bool:
    return _text(value) or (_object(value) and _or_none(_object_of(_or_none(_text)))(value.get("unet")))


_TEXT, _OBJECT = (_text, "a text"), (_object, "an object")
_OBJECTS = (_list_of(_object), "a list of objects")
_OPTIONAL = (_or_none(_object), "an object")
_FIELDS: dict[str, tuple[Check, str]] = {
    "run_id": _TEXT,
    "timestamp": _TEXT,
    "status": _TEXT,
    "error": (_or_none(_text), "a text"),
    "env": _OBJECT,
    "env_hash": _TEXT,
    "request": _OBJECT,
    "phases_ms": (
        _object_of(lambda value: value is None or _text(value) or is_number(value)),
        "an object of milliseconds",
    ),
    "steps": _OBJECTS,
    "summary": _OBJECT,
    "memory": (_object_of(_object), "an object of objects"),
    "kernels": _OBJECTS,
    "kernel_profile": _OPTIONAL,
    "roofline": _OPTIONAL,
    "quality": _OPTIONAL,
    "artifacts": _OBJECT,
    "warnings": (_list_of(_text), "a list of texts"),
}
_TIMES = (_list_of(_or_none(is_number)), "a list of milliseconds")
# What the row in the CSV is computed from.
_PARTS: tuple[tuple[str, str, Check, str], ...] = (
    ("request", "accelerators", _list_of(_text), "a list of texts"),
    ("request", "checkpoint", _object, "an object"),
    ("request", "precision", _precision, "a precision"),
    ("summary", "runs_ms", *_TIMES),
    ("summary", "totals_ms", *_TIMES),
    ("summary", "step_time_ms", is_number, "a number"),
    ("summary", "it_per_s", is_number, "a number"),
    ("summary", "first_eval_ms", is_number, "a number"),
)

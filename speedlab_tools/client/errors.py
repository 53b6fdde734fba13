"""Errors of the command line and of the client, and the server's error messages put into words."""

# ruff: noqa: N818 - the names say what happened
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speedlab.common.errors import SpeedLabError


class BenchError(SpeedLabError):
    """An error that ends the command with its message."""


class ServerGone(BenchError):
    """The server does not answer, or has forgotten the prompt."""


class PromptRejected(BenchError):
    """The server refused a graph. `node_errors` is its own list, the message says it in words."""

    def __init__(self, message: str, node_errors: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class ExecutionFailed(BenchError):
    """A node raised. `node_id` and `class_type` tell which, `reason` is its own message."""

    def __init__(self, node_id: str, class_type: str, title: str, kind: str, reason: str, trace: str = "") -> None:
        name = f"{title} ({class_type})" if title and title != class_type else class_type
        super().__init__(f"node {node_id}, {name}, failed: {reason.strip()}")
        self.node_id = node_id
        self.class_type = class_type
        self.kind = kind
        self.reason = reason.strip()
        self.trace = trace


class ExecutionInterrupted(BenchError):
    """The run was cancelled."""


class RunTimeout(BenchError):
    """The run took longer than allowed."""


def describe_rejection(body: Mapping[str, Any], graph: Mapping[str, Mapping[str, Any]]) -> str:
    """The answer of a refused `/prompt` in words: every node with its title, every input with what is wrong."""
    error = body.get("error")
    head = str(error.get("message", "")) if isinstance(error, Mapping) else str(error or "")
    lines = [f"the server refused the graph: {head or 'no reason given'}"]
    for node_id, found in _mapping(body.get("node_errors")).items():
        node, entry = graph.get(str(node_id), {}), _mapping(found)
        class_type = str(entry.get("class_type", node.get("class_type", "?")))
        title = str(node.get("_meta", {}).get("title", class_type))
        for reason in _list(entry.get("errors")):
            lines.append(f"  node {node_id}, {title} ({class_type}): {_reason_words(_mapping(reason))}")
    if len(lines) == 1 and isinstance(error, Mapping) and error.get("details"):
        lines.append(f"  {error['details']}")
    return "\n".join(lines)


def _reason_words(reason: Mapping[str, Any]) -> str:
    extra = _mapping(reason.get("extra_info"))
    name = extra.get("input_name")
    kind = reason.get("type")
    if kind == "value_not_in_list":
        spec = [*_list(extra.get("input_config")), None, None]
        options = spec[0] if isinstance(spec[0], list) else _list(_mapping(spec[1]).get("options"))
        shown = ", ".join(str(option) for option in options[:12]) or "nothing"
        more = f" and {len(options) - 12} more" if len(options) > 12 else ""
        return f"'{extra.get('received_value')}' is no choice of '{name}'; the server has {shown}{more}"
    words = str(reason.get("message", kind or "wrong"))
    details = str(reason.get("details", ""))
    return f"{words}: {details}" if details else words


def failure_from_status(data: Mapping[str, Any], graph: Mapping[str, Mapping[str, Any]]) -> ExecutionFailed:
    """The exception for an `execution_error` message (of the socket or of the history)."""
    node_id = str(data.get("node_id", "?"))
    class_type = str(data.get("node_type", "?"))
    title = str(graph.get(node_id, {}).get("_meta", {}).get("title", class_type))
    trace = data.get("traceback") or ""
    return ExecutionFailed(
        node_id=node_id,
        class_type=class_type,
        title=title,
        kind=str(data.get("exception_type", "")),
        reason=str(data.get("exception_message", "no message")),
        trace="".join(map(str, trace)) if isinstance(trace, list) else str(trace),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    """A part of a server's answer that should be an object: it may come from any program."""
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

"""What a node sends to the browser about a run: small, plain values."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from ..measure.context import NodeContext
from ..measure.record import RunRecord


def browser_summary(record: RunRecord, context: NodeContext | None = None) -> dict[str, Any]:
    """Run id, status, plan, phases, steps and summary, for the node's display.

    `workflow` is the id of the canvas's workflow, by which a browser tells its open workflows apart.
    """
    return {
        "run_id": record.run_id,
        "workflow": None if context is None else context.workflow_id(),
        "status": record.status,
        "plan": record.request.get("plan"),
        "accelerators": list(record.request.get("accelerators", ())),
        "asked": record.request.get("asked"),
        "warnings": list(record.warnings),
        "phases_ms": dict(record.phases_ms),
        "steps": [dict(step) for step in record.steps],
        "summary": dict(record.summary),
        "memory": dict(record.memory.get("overall", {})),
        "step_memory": dict(record.step_memory),
    }


def browser_images(record: RunRecord) -> list[dict[str, str]]:
    """The saved images as ComfyUI's /view names them."""
    paths = (PurePosixPath(path) for path in record.artifacts.get("images", ()))
    return [{"filename": path.name, "subfolder": str(path.parent), "type": "output"} for path in paths]

"""A set-up as stages, each done once: a stamp with the hash of its inputs is written only after it ended well."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .progress import Reporter

Facts = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One step of a set-up.

    `inputs` gives what the result depends on, as text. `run(label)` does the work and returns facts for the stamp
    (anything JSON holds). `fault(facts)` looks at what is on disk: "" where all is there, else what is wrong.
    """

    name: str
    title: str
    inputs: Callable[[], Mapping[str, str]]
    run: Callable[[str], Facts]
    fault: Callable[[Facts], str]


def key_of(inputs: Mapping[str, str]) -> str:
    """The hash of a stage's inputs."""
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode("utf-8")).hexdigest()


def reason_to_run(stage: Stage, stamps: Path) -> str:
    """Why a stage has to run, "" where it is done."""
    path = _stamp(stage, stamps)
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        key, facts = stamp["key"], stamp["facts"]
    except OSError:  # not there, or not for us to read: making it says which
        return "not done yet"
    except (ValueError, KeyError, TypeError):
        return f"its stamp {path.name} is unreadable"
    if key != key_of(stage.inputs()):
        return "what it is made from has changed"
    return stage.fault(facts)


def first_reason(stages: Sequence[Stage], stamps: Path) -> str:
    """Why the set-up is not complete, "" where it is."""
    for stage in stages:
        reason = reason_to_run(stage, stamps)
        if reason:
            return f"{stage.title}: {reason}"
    return ""


def run_stages(stages: Sequence[Stage], stamps: Path, reporter: Reporter) -> list[str]:
    """Run the stages that need it, in order. Returns their names. Errors of a stage pass through, without a stamp."""
    stamps.mkdir(parents=True, exist_ok=True)
    ran = []
    for number, stage in enumerate(stages, start=1):
        label = f"[{number}/{len(stages)}] {stage.title}"
        reason = reason_to_run(stage, stamps)
        if not reason:
            reporter.line(f"{label}: ready")
            continue
        reporter.line(f"{label}: {reason}")
        _stamp(stage, stamps).unlink(missing_ok=True)
        begun = time.monotonic()
        key = key_of(stage.inputs())  # before the work: inputs that change meanwhile make another run
        facts = stage.run(label)
        write_whole(_stamp(stage, stamps), json.dumps({"key": key, "facts": facts}))
        reporter.line(f"{label}: done in {time.monotonic() - begun:.0f} s")
        ran.append(stage.name)
    return ran


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stamp(stage: Stage, stamps: Path) -> Path:
    return stamps / f"{stage.name}.json"

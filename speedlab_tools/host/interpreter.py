"""Which requirements an interpreter lacks. Asked in a process of its own, so that any Python can answer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import HostError
from .packages import requirement_name

# Runs in the other interpreter. `packaging`, or the one inside pip, reads versions and markers; without both, a
# requirement with a marker is taken as met and one with a version is looked up by name.
_SCRIPT = """
import importlib.metadata, json, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        Requirement = None
answers = []
for line, name, strict in json.load(sys.stdin):
    try:
        have = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        have = None
    wanted = Requirement(line) if Requirement else None
    if (wanted.marker and not wanted.marker.evaluate()) if wanted else ";" in line:
        answers.append("")
    elif not have:
        answers.append("missing")
    elif strict and wanted and not wanted.specifier.contains(have, prereleases=True):
        answers.append("has " + have)
    else:
        answers.append("")
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True)
class Lack:
    """A requirement that an interpreter does not meet, and in what way ("missing" or "has 1.2")."""

    requirement: str
    state: str

    def __str__(self) -> str:
        return f"{self.requirement} ({self.state})"


def lacking(python: Path, requirements: Sequence[str], *, strict: bool) -> list[Lack]:
    """The requirements that `python` does not meet; `strict` compares versions too, not only names.

    Raises HostError where the interpreter does not answer.
    """
    asked = [(line, requirement_name(line), strict) for line in requirements]
    try:
        answer = subprocess.run(
            [str(python), "-c", _SCRIPT], input=json.dumps(asked), capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{python} does not run ({error}).") from error
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(f"{python} could not say which packages it has: {last}")
    return [Lack(line, state) for (line, _, _), state in zip(asked, json.loads(answer.stdout), strict=True) if state]


def own_interpreter(comfyui: Path) -> Path | None:
    """The interpreter that a ComfyUI brings along: a venv in its folder, or the portable Windows build's."""
    candidates = (
        comfyui / "venv" / "bin" / "python",
        comfyui / ".venv" / "bin" / "python",
        comfyui / "venv" / "Scripts" / "python.exe",
        comfyui / ".venv" / "Scripts" / "python.exe",
        comfyui.parent / "python_embeded" / "python.exe",  # their spelling
    )
    return next((path for path in candidates if path.exists()), None)

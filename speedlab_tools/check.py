"""What `run.py check` and `run.py test` run on the host, and the size of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from .host.child import run_child

# Not `-m pytest`: that puts the current folder on sys.path, where this pack's `nodes/` would shadow ComfyUI's nodes.py.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"

# import-linter has a script, which lies where its Python puts scripts, and no module to run.
_LAYERS = (
    "-c",
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))",
)

CHECKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: arguments to check, arguments to fix
    "ruff": (("-m", "ruff", "check", "."), ("-m", "ruff", "check", "--fix", ".")),
    "format": (("-m", "ruff", "format", "--check", "."), ("-m", "ruff", "format", ".")),
    "mypy": (("-m", "mypy"), ("-m", "mypy")),
    "layers": (_LAYERS, _LAYERS),
}


def run_checks(names: Sequence[str], *, fix: bool, python: Path, cwd: Path, env: Mapping[str, str]) -> dict[str, int]:
    """Run ruff, its formatter, mypy and import-linter (or those named), all even where one fails.

    Returns the exit codes by name.
    """
    return {
        name: run_child([str(python), *CHECKS[name][1 if fix else 0]], cwd=cwd, env=env) for name in names or CHECKS
    }


def size_report(root: Path) -> str:
    """Files and lines of Python in each half: `speedlab/: 117 files, 17,000 lines; ...`."""
    halves = []
    for half in ("speedlab", "speedlab_tools", "nodes", "tests"):
        files = sorted((root / half).rglob("*.py"))
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        halves.append(f"{half}/: {len(files)} files, {lines:,} lines")
    return "; ".join(halves)


def durations(report: Path, longest: int = 60) -> str:
    """Seconds of the longest tests, set-up of fixtures included, then of each file, from a JUnit report."""
    cases = [(float(case.get("time", 0)), case) for case in ElementTree.parse(report).iter("testcase")]
    files: dict[str, float] = {}
    for seconds, case in cases:
        file = str(case.get("classname"))
        files[file] = files.get(file, 0.0) + seconds
    slow = sorted(((seconds, f"{case.get('classname')} {case.get('name')}") for seconds, case in cases), reverse=True)
    lines = [f"{len(cases)} tests, {sum(files.values()):.1f} s", ""]
    by_file = sorted(((seconds, name) for name, seconds in files.items()), reverse=True)
    return "\n".join([*lines, *_rows(slow[:longest]), "", *_rows(by_file), ""])


def _rows(times: Sequence[tuple[float, str]]) -> list[str]:
    return [f"{seconds:8.1f} {name}" for seconds, name in times]

"""Running a command on the host as a child process that ends with us, and whose exit code is ours."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

INTERRUPTED = 130

# Not `-m pytest`: that puts the current folder on sys.path, where this pack's `nodes/` would shadow ComfyUI's nodes.py.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"

# import-linter has a script, which lies where its Python puts scripts, and no module to run.
_LAYERS = (
    "-c",
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))",
)

CHECKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: arguments that look, arguments that mend
    "ruff": (("-m", "ruff", "check", "."), ("-m", "ruff", "check", "--fix", ".")),
    "format": (("-m", "ruff", "format", "--check", "."), ("-m", "ruff", "format", ".")),
    "mypy": (("-m", "mypy"), ("-m", "mypy")),
    "layers": (_LAYERS, _LAYERS),
}


def run_child(command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> int:
    """Run a command in the foreground. Ctrl-C and SIGTERM reach it, and it is waited for. Returns its exit code."""
    process = subprocess.Popen(list(command), cwd=cwd, env=dict(env))

    def hand_on(_number: int, _frame: FrameType | None) -> None:
        process.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        code = _wait(process)
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.kill()
            process.wait()
    return code if code >= 0 else 128 - code


def run_checks(names: Sequence[str], *, fix: bool, python: Path, cwd: Path, env: Mapping[str, str]) -> dict[str, int]:
    """Run ruff, its formatter, mypy and import-linter (or those named), all even where one fails.

    Returns the exit codes by name.
    """
    return {
        name: run_child([str(python), *CHECKS[name][1 if fix else 0]], cwd=cwd, env=env) for name in names or CHECKS
    }


def size_report(root: Path) -> str:
    """Files and lines of Python in each half, for the eye: `speedlab/: 117 files, 17,000 lines; ...`."""
    told = []
    for half in ("speedlab", "speedlab_tools", "nodes", "tests"):
        files = sorted((root / half).rglob("*.py"))
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        told.append(f"{half}/: {len(files)} files, {lines:,} lines")
    return "; ".join(told)


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:
        # A terminal has interrupted the child as well; a signal to this process alone has not.
        if sys.platform != "win32" and not sys.stdin.isatty():
            process.send_signal(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        process.wait(60)
        return INTERRUPTED
    process.terminate()
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        process.wait(10)
    return INTERRUPTED

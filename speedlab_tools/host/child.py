"""Running a command as a child process that ends with us, and whose exit code is ours."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

INTERRUPTED = 130


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

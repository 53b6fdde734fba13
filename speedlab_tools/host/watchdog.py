"""Ends a server whose owner died without stopping it (killed, so that no `finally` and no atexit ran).

Run as a script: `python watchdog.py PID`. The owner holds the other end of stdin: "done" there means that the server
was stopped, the end of the stream without it that the owner is gone. Standard library only;
imports nothing of this pack.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time


def end_tree(pid: int) -> None:
    """End a process and its children: asked first, then killed. On POSIX `pid` leads a process group."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True)
        return
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sign)
            time.sleep(3 if sign == signal.SIGTERM else 0)


def main() -> int:
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stdin.read().strip() != "done":
        end_tree(int(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

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


def kill_tree(pid: int, patience_s: float = 0.0) -> None:
    """Kill a process and its children, on POSIX a process group; with patience they are asked to end first."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if patience_s:
            os.killpg(pid, signal.SIGTERM)
            time.sleep(patience_s)
        os.killpg(pid, signal.SIGKILL)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stdin.read().strip() != "done":
        kill_tree(int(sys.argv[1]), patience_s=3)
    return 0


if __name__ == "__main__":
    sys.exit(main())

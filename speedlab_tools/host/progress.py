"""What a person sees while a long step runs: the stage, progress, and the end. pip's own output goes to a log.

The one display of progress here. Standard library only: `run.py` shows it before anything, tqdm too, is installed.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

_SIZED = re.compile(r"^\s*(?:Downloading|Using cached) \S+ \(([\d.]+) (B|kB|MB|GB)\)", re.MULTILINE)
_UNITS = {"B": 1e-9, "kB": 1e-6, "MB": 1e-3, "GB": 1.0}
_AT_HAND = re.compile(r"^(?:Collecting|Installing collected packages:|\s*Building wheel for) .+", re.MULTILINE)


class Reporter:
    """Writes stages and progress: a line that rewrites itself on a terminal, else a line every `interval_s`."""

    def __init__(self, stream: TextIO | None = None, interval_s: float = 10.0) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.terminal = self.stream.isatty()
        self.interval_s = 0.5 if self.terminal else interval_s
        self._open = False

    def line(self, text: str) -> None:
        """A whole line."""
        self._write(("\r\x1b[K" if self._open else "") + text + "\n")
        self._open = False

    def alive(self, text: str) -> None:
        """A line of progress; on a terminal the next one replaces it."""
        if not self.terminal:
            self._write(text + "\n")
            return
        self._write("\r\x1b[K" + text[:118])
        self._open = True

    def clear(self) -> None:
        """Remove the line of progress."""
        if self._open:
            self._write("\r\x1b[K")
            self._open = False

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:  # a console that knows neither the path's nor pip's letters
            self.stream.write(text.encode("ascii", "replace").decode("ascii"))
        self.stream.flush()


def pip_status(output: str) -> str:
    """What pip is at, in a few words: the last package it began, and how much it has fetched."""
    found = _AT_HAND.findall(output)
    last = found[-1].strip() if found else "starting"
    if last.startswith("Collecting "):
        last = "fetching " + re.split(r"[<>=!~;\[ ]", last.removeprefix("Collecting "), maxsplit=1)[0]
    elif last.startswith("Installing "):
        last = f"unpacking {last.count(',') + 1} packages"
    fetched_gb = sum(float(amount) * _UNITS[unit] for amount, unit in _SIZED.findall(output))
    return f"{last}, {fetched_gb:.2f} GB so far" if fetched_gb >= 0.01 else last


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    reporter: Reporter,
    label: str,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> tuple[int, str]:
    """Run a command to its end, its output to `log`, with progress. Returns its exit code and output.

    An interrupt ends the command too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begun, free_before = time.monotonic(), shutil.disk_usage(log.parent).free
    with log.open("wb") as sink:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            pass_fds=tuple(pass_fds),
        )
    try:
        while True:
            try:
                return process.wait(reporter.interval_s), _text(log)
            except subprocess.TimeoutExpired:
                written = (free_before - shutil.disk_usage(log.parent).free) / 1e9
                disk = f", {written:.2f} GB written" if written > 0.01 else ""
                reporter.alive(f"{label}: {pip_status(_text(log))}{disk}, {time.monotonic() - begun:.0f} s")
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")

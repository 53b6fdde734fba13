"""What a person sees while a long step runs: the stage, a sign of life, and the end. pip's own output goes to a log."""

from __future__ import annotations

import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

UNITS = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}


class Reporter:
    """Writes stages and signs of life: a line that rewrites itself on a terminal, else a line every `interval_s`."""

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
        """A sign of life; on a terminal the next one takes its place."""
        if not self.terminal:
            self._write(text + "\n")
            return
        self._write("\r\x1b[K" + text[:118])
        self._open = True

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:  # a console that knows neither the path's nor pip's letters
            self.stream.write(text.encode("ascii", "replace").decode("ascii"))
        self.stream.flush()


class PipDigest:
    """Boils pip's lines down to one: how much was fetched, and what is at hand."""

    _SIZED = re.compile(r"^\s*(?:Downloading|Using cached) (\S+?)(?:\.metadata)? \(([\d.]+) (B|kB|KB|MB|GB)\)")
    _INSTALLING = re.compile(r"^Installing collected packages: (.+)")
    _BUILDING = re.compile(r"^\s*Building wheel for (\S+)")

    def __init__(self) -> None:
        self.fetched_bytes = 0.0
        self.now = "starting"
        self._unpacking = False

    def feed(self, line: str) -> None:
        sized = self._SIZED.match(line)
        if sized:
            self.fetched_bytes += float(sized[2]) * UNITS[sized[3]]
            self.now = "fetching " + sized[1].rsplit("/", 1)[-1].split("-")[0]
        elif line.startswith("Collecting "):
            self.now = "fetching " + re.split(r"[<>=!~;\[ ]", line[11:], maxsplit=1)[0]
        elif found := self._INSTALLING.match(line):
            self.now = f"unpacking {found[1].count(',') + 1} packages"
            self._unpacking = True
        elif found := self._BUILDING.match(line):
            self.now = f"building {found[1]}"

    def __str__(self) -> str:
        if self.fetched_bytes < 1e6:
            return self.now
        amount = f"{self.fetched_bytes / 1e9:.2f} GB"
        return f"{self.now} ({amount} packed)" if self._unpacking else f"{self.now}, {amount} so far"


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code and its last lines."""

    code: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    reporter: Reporter,
    label: str,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    digest: PipDigest | None = None,
) -> Outcome:
    """Run a command to its end, all output to `log`, a sign of life to the reporter. An interrupt ends the command."""
    status = PipDigest() if digest is None else digest
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = shown = time.monotonic()
    free_before = shutil.disk_usage(log.parent).free
    last: deque[str] = deque(maxlen=60)
    with log.open("w", encoding="utf-8", errors="replace") as sink:
        sink.write("$ " + " ".join(command) + "\n")
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=None if env is None else dict(env),
            pass_fds=tuple(pass_fds) if sys.platform != "win32" else (),
        )
        try:
            for line in _lines(process, tick_s=min(reporter.interval_s, 0.5)):
                if line is not None:
                    sink.write(line)
                    last.append(line.rstrip())
                    status.feed(line)
                now = time.monotonic()
                if now - shown >= reporter.interval_s:
                    written = free_before - shutil.disk_usage(log.parent).free
                    disk = f", {written / 1e9:.2f} GB written" if written > 1e7 else ""
                    reporter.alive(f"{label}: {status}{disk}, {now - begun:.0f} s")
                    shown = now
            return Outcome(process.wait(), tuple(last))
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _lines(process: subprocess.Popen[str], tick_s: float) -> _LineSource:
    assert process.stdout is not None
    return _LineSource(process.stdout, tick_s)


class _LineSource:
    """The lines of a stream, and None whenever none came for `tick_s`: reading blocks, a sign of life must not."""

    def __init__(self, stream: IO[str], tick_s: float) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._tick_s = tick_s
        self._ended = False
        threading.Thread(target=self._read, args=(stream, self._queue.put), daemon=True).start()

    @staticmethod
    def _read(stream: IO[str], put: Callable[[str | None], None]) -> None:
        try:
            for line in stream:
                put(line)
        finally:
            put(None)

    def __iter__(self) -> _LineSource:
        return self

    def __next__(self) -> str | None:
        if self._ended:
            raise StopIteration
        try:
            line = self._queue.get(timeout=self._tick_s)
        except queue.Empty:
            return None
        if line is None:
            self._ended = True
            raise StopIteration
        return line

"""What the driver says while a fleet runs: one line that is written over in a terminal, now and then one elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from ..client.progress import duration
from .messages import Ready
from .pool import Member, Staff
from .tasks import ERROR, LOST, OK, Row

_EVERY_S = 30.0
_MOST_FAILED = 10
_FIRST = 3


class FleetProgress:
    """Prints to `stream`. `before` results were there when this call began."""

    def __init__(self, total: int, before: int, stream: TextIO | None = None) -> None:
        self.total, self.before = total, before
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self._began: float | None = None
        self._said = (0.0, -1)
        self._width = 0
        self._failed = 0

    def ready(self, name: str, ready: Ready) -> None:
        """A worker can begin."""
        self._began = self._began or time.monotonic()
        self.line(f"{name} is ready on {ready.machine}: process {ready.pid}, ComfyUI {ready.server_pid} at {ready.url}")

    def lost(self, member: Member, reason: str) -> None:
        """A worker is lost; whether it is started again stands in `member`."""
        then = "it is given up" if member.is_out else "starting it again"
        self.line(f"{member.name} is lost, {then}: {reason}")

    def failed(self, row: Row) -> None:
        """A task has no result. After some of them the manifest is the place to look."""
        self._failed += 1
        if self._failed <= _MOST_FAILED:
            self.line(f"{row.name} failed ({row.status}): {row.error}")
        elif self._failed == _MOST_FAILED + 1:
            self.line("More tasks fail; the manifest has their errors.")

    def show(self, counts: Mapping[str, int], left: int, staff: Staff) -> None:
        """How far it is: rewritten in a terminal; else a line when that has changed and some time has passed."""
        done = self.total - left
        now = time.monotonic()
        said_at, said = self._said
        soon = now - said_at < (0.2 if self.terminal else _EVERY_S)
        # Elsewhere than in a terminal the first results are worth a line each, and the last one.
        worth = done != said and (not soon or not left or done - self.before <= _FIRST)
        if not worth and (soon or not self.terminal):
            return
        self._said = (now, done)
        text = self._text(counts, left, done, staff, now)
        if self.terminal:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def line(self, text: str) -> None:
        """A line of its own."""
        self.end()
        self.stream.write(text + "\n")
        self.stream.flush()

    def end(self) -> None:
        """Clear the line that is written over."""
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
        self._width = 0

    def _text(self, counts: Mapping[str, int], left: int, done: int, staff: Staff, now: float) -> str:
        busy = sum(member.work is not None for member in staff.members.values())
        failed = counts.get(ERROR, 0) + counts.get(LOST, 0)
        parts = [f"{done}/{self.total} done", f"{busy} of {len(staff.members)} workers busy"]
        if failed:
            parts.append(f"{failed} failed")
        if self._began is not None and counts.get(OK, 0) and left:
            parts.append(f"{duration((now - self._began) / (done - self.before) * left)} left")
        return ", ".join(parts)

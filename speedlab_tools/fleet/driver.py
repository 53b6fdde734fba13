"""What the driver says while a fleet runs: one line that is written over in a terminal, now and then one elsewhere.

The driver's loop: hands tasks out, keeps what comes back, and replaces workers that are lost.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

from ..client.events import duration
from .folder import Keeper, Origin
from .messages import Done, Event, Failed, FleetError, Job, Ready
from .pool import MOST_FAILURES, Ledger, Member, Staff
from .tasks import ERROR, LOST, OK, Row, Work

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


# So many tasks that fail alike, and none that succeeds: the rest would fail too.
HOPELESS = 3
_WAIT_S = 1.0
# The worker keeps the limit by itself; one that does not even do that is overdue so much later.
_GRACE_S = 60.0


class Crew(Protocol):
    """What the loop needs of the cluster. No method waits except `wait`."""

    def hire(self, worker: str, hire: int) -> None:
        """Start a worker; its first event has no ticket."""

    def give(self, worker: str, hire: int, job: Job) -> None:
        """Let it run a job; an event with the job's ticket follows."""

    def dismiss(self, worker: str, hire: int) -> None:
        """End it at once. What it was doing may still answer."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """What has come since, after at most that long."""


@dataclass(frozen=True)
class Limits:
    """How long a task and a start may take in seconds, and how many workers may be lost on one task."""

    task_s: float
    start_s: float
    attempts: int


class Fleet:
    """One call's run over the tasks in `todo`."""

    def __init__(
        self, work: Work, todo: Sequence[int], crew: Crew, workers: Sequence[str], keeper: Keeper, limits: Limits,
        progress: FleetProgress, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.work, self.crew, self.keeper, self.limits = work, crew, keeper, limits
        self.progress, self.clock = progress, clock
        self.ledger = Ledger(todo, limits.attempts)
        self.staff = Staff({name: Member(name, clock()) for name in workers})
        self.counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._began: dict[int, tuple[float, float]] = {}

    def run(self) -> None:
        """Run until every task has its row. Raises FleetError where no worker is left, ResultsError for a full disk."""
        for member in self.staff.members.values():
            member.since = self.clock()
            self.crew.hire(member.name, member.hire)
        while self.ledger.left:
            self._hand_out()
            for event in self.crew.wait(_WAIT_S):
                self._take(event)
            self._replace_overdue()
            if self.ledger.left:
                self._require_hope()
            self.progress.show(self.counts, self.ledger.left, self.staff)

    def _hand_out(self) -> None:
        for member in self.staff.idle():
            hand_out = self.ledger.take(member.name, self.staff.colleagues())
            if hand_out is None:
                continue
            payload = self.work.build(self.work.tasks[hand_out.task])
            member.work, member.since = hand_out, self.clock()
            self._began[hand_out.ticket] = (time.time(), member.since)
            job = Job(hand_out.ticket, payload.graph, payload.extra, self.limits.task_s)
            self.crew.give(member.name, member.hire, job)

    def _take(self, event: Event) -> None:
        member = self.staff.members[event.worker]
        answer, is_current = event.answer, event.hire == member.hire and not member.is_out
        if isinstance(answer, Ready):
            if is_current:
                member.ready, member.since, member.failed_starts = answer, self.clock(), 0
                self.progress.ready(member.name, answer)
        elif isinstance(answer, (Done, Failed)):
            self._keep(event, answer)
            if is_current:
                member.work = None
                member.lost_tasks.clear()
        else:
            if event.ticket is not None:
                self._lost(event.ticket, answer.reason)
            if is_current:
                self._replace(member, answer.reason)

    def _keep(self, event: Event, answer: Done | Failed) -> None:
        assert event.ticket is not None
        hand_out = self.ledger.answered(event.ticket)
        origin = self._origin(event.ticket, event.worker)
        if hand_out is None:
            return
        task = self.work.tasks[hand_out.task]
        if isinstance(answer, Failed):
            row = self.keeper.failed(task, hand_out, answer.error, origin)
        else:
            row = self.keeper.done(task, hand_out, answer, origin)
        self._count(row)

    def _origin(self, ticket: int, worker: str) -> Origin:
        wall, began = self._began.pop(ticket, (time.time(), self.clock()))
        ready = self.staff.members[worker].ready
        machine = None if ready is None else ready.machine
        shared = 1 if machine is None else self.staff.sharing(machine)
        return Origin(machine, wall, self.clock() - began, shared)

    def _lost(self, ticket: int, reason: str) -> None:
        hand_out = self.ledger.lost(ticket)
        if hand_out is None:
            return
        told = f"{hand_out.attempt} workers were lost on it; the last one: {reason}"
        origin = self._origin(ticket, hand_out.worker)
        self._count(self.keeper.failed(self.work.tasks[hand_out.task], hand_out, told, origin, lost=True))

    def _replace(self, member: Member, reason: str) -> None:
        """End a worker and start it anew, unless it has failed too often."""
        if member.work is not None:
            self._lost(member.work.ticket, reason)
        self.crew.dismiss(member.name, member.hire)
        self.staff.failed(member, reason)
        member.since = self.clock()
        self.progress.lost(member, reason)
        if not member.is_out:
            member.hire += 1
            self.crew.hire(member.name, member.hire)

    def _replace_overdue(self) -> None:
        task_s = self.limits.task_s + _GRACE_S
        for member in self.staff.overdue(self.clock(), self.limits.start_s, task_s):
            what = "a task" if member.work is not None else "starting"
            self._replace(member, f"it took longer than {self.limits.task_s if member.work else self.limits.start_s:g} "
                                  f"s for {what} and does not answer")  # fmt: skip

    def _count(self, row: Row) -> None:
        self.counts[row.status] += 1
        if row.status != OK:
            self.progress.failed(row)
            self._failures[row.error or ""] += 1

    def _require_hope(self) -> None:
        if not self.staff.colleagues():
            reasons = {member.reason for member in self.staff.members.values()}
            raise FleetError(
                f"No worker is left: each one failed {MOST_FAILURES} times in a row.\n" + "\n".join(sorted(reasons))
            )
        error, times = next(iter(self._failures.most_common(1)), ("", 0))
        if times >= HOPELESS and not any(row.status == OK for row in self.keeper.folder.rows.values()):
            raise FleetError(f"The first {times} tasks failed alike, so the others were not tried: {error}")

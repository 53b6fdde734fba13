"""Which task is whose: hand-outs, retries, and one result a task however often it was given out. Pure.

Which workers there are and what each does. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from .messages import Ready


@dataclass(frozen=True)
class HandOut:
    """A task given to a worker. `ticket` is unique, `attempt` counts from 1."""

    ticket: int
    task: int
    worker: str
    attempt: int


class Ledger:
    """Tasks by number. A task ends once: with its first answer, or when `most_attempts` workers were lost on it."""

    def __init__(self, tasks: Iterable[int], most_attempts: int) -> None:
        self.most_attempts = most_attempts
        self.late = 0
        self._waiting = deque(tasks)
        self._open = set(self._waiting)
        self._given: dict[int, HandOut] = {}
        self._attempts: dict[int, int] = {}
        self._lost_on: dict[int, set[str]] = {}
        self._tickets = 0

    @property
    def left(self) -> int:
        """How many tasks have no result yet."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """How many tasks nobody works on."""
        return len(self._waiting)

    def take(self, worker: str, colleagues: Collection[str] = ()) -> HandOut | None:
        """The next task for a worker; None where nothing waits for it.

        A task that was lost on this worker is left to `colleagues` as long as one of them has not lost it too.
        """
        for place, task in enumerate(self._waiting):
            lost_on = self._lost_on.get(task, set())
            if worker in lost_on and any(other not in lost_on for other in colleagues if other != worker):
                continue
            del self._waiting[place]
            self._tickets += 1
            self._attempts[task] = self._attempts.get(task, 0) + 1
            hand_out = HandOut(self._tickets, task, worker, self._attempts[task])
            self._given[hand_out.ticket] = hand_out
            return hand_out
        return None

    def answered(self, ticket: int) -> HandOut | None:
        """A result has come. The hand-out whose result counts, None where the task has one already: drop this one."""
        hand_out = self._given.pop(ticket, None)
        if hand_out is None or hand_out.task not in self._open:
            self.late += 1
            return None
        self._open.discard(hand_out.task)
        # It may wait again, when its worker was thought lost and answered after all.
        if hand_out.task in self._lost_on and hand_out.task in self._waiting:
            self._waiting.remove(hand_out.task)
        return hand_out

    def lost(self, ticket: int) -> HandOut | None:
        """The worker of a hand-out is lost. The hand-out where that was the last attempt, else None: it waits again.

        The ticket stays good: an answer that comes late counts if it is the first one.
        """
        hand_out = self._given.get(ticket)
        if hand_out is None or hand_out.task not in self._open or hand_out.task in self._waiting:
            return None
        self._lost_on.setdefault(hand_out.task, set()).add(hand_out.worker)
        if any(
            other.task == hand_out.task and other.attempt > hand_out.attempt for other in self._given.values()
        ):  # somebody else has it already
            return None
        if hand_out.attempt >= self.most_attempts:
            self._open.discard(hand_out.task)
            return hand_out
        self._waiting.appendleft(hand_out.task)
        return None


# A worker that fails to start so often in a row, or loses so many tasks in a row where others remain that may do them,
# is not started again: its machine is not fit.
MOST_FAILURES = 3


@dataclass
class Member:
    """One worker. `hire` counts its starts; `since` is when it began what it does, on the driver's clock; `lost_tasks`
    are those it was lost on since its last result, `failed_starts` the starts since its last one that went well.
    """

    name: str
    since: float
    hire: int = 1
    ready: Ready | None = None
    work: HandOut | None = None
    failed_starts: int = 0
    lost_tasks: set[int] = field(default_factory=set)
    is_out: bool = False
    reason: str = ""


@dataclass
class Staff:
    """The workers by name."""

    members: dict[str, Member] = field(default_factory=dict)

    def idle(self) -> list[Member]:
        """Workers that are ready and have nothing to do."""
        return [member for member in self.members.values() if member.ready and member.work is None]

    def colleagues(self) -> list[str]:
        """The workers that are not given up."""
        return [member.name for member in self.members.values() if not member.is_out]

    def failed(self, member: Member, reason: str) -> None:
        """A worker is lost, at its start or on its task. The last one that starts is kept, whatever it loses: else one
        prompt that costs every worker would end all others."""
        if member.work is None:
            member.failed_starts += member.ready is None
        else:
            member.lost_tasks.add(member.work.task)
        others = any(name != member.name for name in self.colleagues())
        unfit = others and len(member.lost_tasks) >= MOST_FAILURES
        member.is_out = unfit or member.failed_starts >= MOST_FAILURES
        member.ready, member.work, member.reason = None, None, reason

    def overdue(self, now: float, start_s: float, task_s: float) -> list[Member]:
        """Workers that take longer than allowed to start or for a task: they do not answer any more."""
        late = []
        for member in self.members.values():
            waits = member.work is not None or member.ready is None
            if waits and not member.is_out and now - member.since > (start_s if member.work is None else task_s):
                late.append(member)
        return late

    def sharing(self, machine: str) -> int:
        """How many workers run on a machine."""
        return sum(member.ready is not None and member.ready.machine == machine for member in self.members.values())

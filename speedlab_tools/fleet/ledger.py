"""Which task is whose: hand-outs, retries, and one result a task however often it was given out. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass


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

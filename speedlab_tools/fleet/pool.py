"""Which workers there are and what each does. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ledger import HandOut
from .messages import Ready

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

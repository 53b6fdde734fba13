"""The pool: each worker is a Ray actor, prompts are handed out one by one, and answers are written as they come.

Ray restarts the process of a worker that died or was killed (`max_restarts`), on another machine where its own is
gone, and tries to start its ComfyUI three times (`max_task_retries`). A prompt is not left to Ray's retries: those go
to the same worker, and another one is the better choice.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from speedlab.common.errors import first_line

from ..client.events import duration
from ..host.progress import Reporter
from . import FleetError
from .tasks import Work
from .worker import Done, Failed, Ready, Worker, WorkerSpec
from .writer import ERROR, LOST, OK, Attempt, Row, Writer

# A worker that fails to start so often in a row, or loses so many prompts in a row where others remain that may do
# them, is given up: its machine is not fit.
MOST_FAILURES = 3
# So many tasks that fail alike, and none that succeeds: the rest would fail too.
HOPELESS = 3
_MOST_SHOWN = 10
_WAIT_S = 1.0
# How long workers may take to end their ComfyUI by themselves; their watchdogs end it where they do not.
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Limits:
    """How long a task and a start may take in seconds, and how many workers may be lost on one task.

    The worker keeps the times by itself; one that does not even do that is killed `grace_s` later.
    """

    task_s: float
    start_s: float
    attempts: int
    grace_s: float = 60.0


@dataclass(eq=False)
class PoolWorker:
    """An actor. `lost_tasks` are those it was lost on since its last result; `reason` is why it was lost last."""

    name: str
    actor: Any
    ready: Ready | None = None
    lost_tasks: set[int] = field(default_factory=set)
    given_up: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Call:
    """What an actor was asked: to run a task, or to start (None). `began` is on the monotonic clock."""

    worker: PoolWorker
    task: int | None
    began: float
    most_s: float


class Pool:
    """Runs the tasks in `todo`; `close` ends every worker. `gpu`: each worker has a GPU to itself."""

    def __init__(
        self, ray: Any, specs: Mapping[str, WorkerSpec], gpu: bool, work: Work, todo: Sequence[int], writer: Writer,
        limits: Limits, reporter: Reporter, kind: type = Worker,
    ) -> None:  # fmt: skip
        self.ray, self.work, self.writer, self.limits = ray, work, writer, limits
        self.reporter = reporter
        resources: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpu else {"num_cpus": 1}
        # With no retries at all Ray would refuse what is asked of an actor while it restarts.
        make = ray.remote(
            **resources, max_restarts=-1, max_task_retries=MOST_FAILURES - 1, scheduling_strategy="SPREAD"
        )(kind)
        self.workers = [PoolWorker(name, make.remote(spec)) for name, spec in specs.items()]
        self._calls: dict[Any, Call] = {}
        self._waiting, self._left = deque(todo), set(todo)
        self._lost_on: dict[int, list[str]] = {}
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._began: float | None = None
        self._shown = time.monotonic()

    def close(self) -> None:
        """End every worker: asked first, then killed."""
        alive = self._alive()
        try:
            asked = [worker.actor.stop.remote() for worker in alive]
            if asked:
                self.ray.wait(asked, num_returns=len(asked), timeout=_PATIENCE_S)
        finally:
            for worker in alive:
                self._kill(worker, restart=False)

    def run(self) -> None:
        """Run until every task has its row. Raises FleetError where no worker is left, ResultsError for a full disk."""
        for worker in self.workers:
            self._start(worker)
        while self._left:
            self._hand_out()
            waiting = list(self._calls)
            self.ray.wait(waiting, num_returns=1, timeout=_WAIT_S)
            ready, others = self.ray.wait(waiting, num_returns=len(waiting), timeout=0)
            now = time.monotonic()
            for reference in ready:
                self._take(reference)
            for reference in others:
                if now - self._calls[reference].began > self._calls[reference].most_s:
                    self._overdue(reference)
            if self._left:
                self._require_hope()
            self._show()

    def _alive(self) -> list[PoolWorker]:
        return [worker for worker in self.workers if not worker.given_up]

    def _start(self, worker: PoolWorker) -> None:
        """Start a worker's ComfyUI. Waits in Ray until the actor runs; tried MOST_FAILURES times."""
        most_s = MOST_FAILURES * self.limits.start_s + self.limits.grace_s
        reference = worker.actor.start.options(retry_exceptions=True).remote()
        self._calls[reference] = Call(worker, None, time.monotonic(), most_s)

    def _hand_out(self) -> None:
        busy = {call.worker.name for call in self._calls.values()}
        for worker in self.workers:
            task = None if worker.name in busy or worker.given_up else self._next(worker)
            if task is None:
                continue
            payload = self.work.build(self.work.tasks[task])
            run = worker.actor.run.options(max_task_retries=0)
            reference = run.remote(payload.graph, payload.extra, self.limits.task_s)
            self._calls[reference] = Call(worker, task, time.monotonic(), self.limits.task_s + self.limits.grace_s)

    def _next(self, worker: PoolWorker) -> int | None:
        """The next task for a worker. One that was lost on it is left to the others that have not lost it too."""
        others = {other.name for other in self._alive()} - {worker.name}
        for task in self._waiting:
            lost_on = self._lost_on.get(task, [])
            if worker.name not in lost_on or not others.difference(lost_on):
                self._waiting.remove(task)
                return task
        return None

    def _take(self, reference: Any) -> None:
        call = self._calls.pop(reference)
        try:
            answer = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            self._lose(call, str(error.cause))
        except self.ray.exceptions.RayError as error:
            self._lose(call, f"its process ended ({type(error).__name__}: {_in_short(error)})")
        else:
            if isinstance(answer, Ready):
                self._began = self._began or time.monotonic()
                call.worker.ready = answer
                at = f"process {answer.pid}, ComfyUI {answer.server_pid} at {answer.url}"
                self.reporter.line(f"{call.worker.name} is ready on {answer.machine}: {at}")
            else:
                self._finish(call, answer)

    def _finish(self, call: Call, answer: Done | Failed) -> None:
        assert call.task is not None
        self._left.discard(call.task)
        task, attempt = self.work.tasks[call.task], self._attempt(call)
        call.worker.lost_tasks.clear()
        if isinstance(answer, Failed):
            self._count(self.writer.failed(task, answer.error, attempt))
        else:
            self._count(self.writer.done(task, answer, attempt))

    def _attempt(self, call: Call) -> Attempt:
        assert call.task is not None
        machine = None if call.worker.ready is None else call.worker.ready.machine
        shared = sum(other.ready is not None and other.ready.machine == machine for other in self.workers)
        seconds = time.monotonic() - call.began
        started = (datetime.now() - timedelta(seconds=seconds)).astimezone().isoformat(timespec="milliseconds")
        number = len(self._lost_on.get(call.task, [])) + 1
        return Attempt(call.worker.name, machine, number, started, round(seconds, 3), shared)

    def _overdue(self, reference: Any) -> None:
        """Kill a worker that does not answer; Ray restarts it. What it may still say is never asked for."""
        call = self._calls.pop(reference)
        self._kill(call.worker, restart=True)
        what = "starting" if call.task is None else "a task"
        self._lose(call, f"it took longer than {call.most_s:g} s for {what} and does not answer")

    def _lose(self, call: Call, reason: str) -> None:
        """A worker is lost, at its start or on its task. The last one that starts is kept, whatever it loses: else one
        prompt that costs every worker would end all others.
        """
        worker = call.worker
        if call.task is None:
            worker.given_up = True
        else:
            self._try_elsewhere(call.task, call, reason)
            worker.lost_tasks.add(call.task)
            worker.given_up = len(self._alive()) > 1 and len(worker.lost_tasks) >= MOST_FAILURES
        worker.ready, worker.reason = None, reason
        then = "it is given up" if worker.given_up else "starting it again"
        self.reporter.line(f"{worker.name} is lost, {then}: {reason}")
        if worker.given_up:
            self._kill(worker, restart=False)
        else:
            self._start(worker)

    def _try_elsewhere(self, index: int, call: Call, reason: str) -> None:
        attempt = self._attempt(call)
        self._lost_on.setdefault(index, []).append(call.worker.name)
        if attempt.attempts < self.limits.attempts:
            self._waiting.appendleft(index)
            return
        self._left.discard(index)
        error = f"{attempt.attempts} workers were lost on it; the last one: {reason}"
        self._count(self.writer.failed(self.work.tasks[index], error, attempt, LOST))

    def _kill(self, worker: PoolWorker, restart: bool) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError, ValueError):
            self.ray.kill(worker.actor, no_restart=not restart)

    def _count(self, row: Row) -> None:
        self._counts[row.status] += 1
        if row.status == OK:
            return
        self._failures[row.error or ""] += 1
        failed = self._counts[ERROR] + self._counts[LOST]
        if failed <= _MOST_SHOWN:
            self.reporter.line(f"{row.name} failed ({row.status}): {row.error}")
        elif failed == _MOST_SHOWN + 1:
            self.reporter.line("More tasks fail; the manifest has their errors.")

    def _require_hope(self) -> None:
        if not self._alive():
            reasons = "\n".join(sorted({worker.reason for worker in self.workers}))
            raise FleetError(f"No worker is left: each one failed {MOST_FAILURES} times in a row.\n{reasons}")
        error, times = next(iter(self._failures.most_common(1)), ("", 0))
        if times >= HOPELESS and not any(row.status == OK for row in self.writer.rows.values()):
            raise FleetError(f"The first {times} tasks failed alike, so the others were not tried: {error}")

    def _show(self) -> None:
        """How far it is, now and then and at the end."""
        now = time.monotonic()
        if self._left and now - self._shown < self.reporter.interval_s:
            return
        self._shown = now
        total, left = len(self.work.tasks), len(self._left)
        busy = sum(call.task is not None for call in self._calls.values())
        parts = [f"{total - left}/{total} done", f"{busy} of {len(self.workers)} workers busy"]
        if failed := self._counts[ERROR] + self._counts[LOST]:
            parts.append(f"{failed} failed")
        if self._began is not None and self._counts[OK] and left:
            parts.append(f"{duration((now - self._began) / self._counts.total() * left)} left")
        self.reporter.alive(", ".join(parts))


def _in_short(error: Exception) -> str:
    """The first line of Ray's report and the last one, which names the cause where a worker could not be made."""
    first, last = first_line(error), (str(error).strip().splitlines() or [""])[-1].strip()
    return first if last in ("", first) else f"{first} ... {last}"

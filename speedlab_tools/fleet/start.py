"""The workers as Ray actors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from speedlab.common.errors import first_line

from .cluster import Cluster
from .messages import Event, Gone, Job, WorkerSpec
from .worker import Worker

# How long workers may take to end their ComfyUI by themselves; their watchdogs end it where they do not.
_PATIENCE_S = 20.0


class RayCrew:
    """Actors by worker. `gpu`: each has a GPU to itself. Use as a context manager: leaving it ends all of them."""

    def __init__(self, cluster: Cluster, specs: Mapping[str, WorkerSpec], gpu: bool) -> None:
        self.ray, self.specs = cluster.ray, specs
        resources: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpu else {"num_cpus": 1}
        self._actor = self.ray.remote(**resources, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(
            Worker
        )
        self._hired: dict[tuple[str, int], Any] = {}
        self._pending: dict[Any, tuple[str, int, int | None]] = {}

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hire(self, worker: str, hire: int) -> None:
        """Start a worker; its first event has no ticket."""
        actor = self._actor.remote(self.specs[worker])
        self._hired[worker, hire] = actor
        self._pending[actor.start.remote()] = (worker, hire, None)

    def give(self, worker: str, hire: int, job: Job) -> None:
        """Let it run a job; an event with the job's ticket follows."""
        self._pending[self._hired[worker, hire].run.remote(job)] = (worker, hire, job.ticket)

    def dismiss(self, worker: str, hire: int) -> None:
        """End it at once. Its watchdog ends the ComfyUI that it leaves."""
        actor = self._hired.pop((worker, hire), None)
        if actor is not None:
            self.ray.kill(actor, no_restart=True)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """What has come since, after at most that long."""
        waiting = list(self._pending)
        if not waiting:
            time.sleep(timeout_s)
            return []
        ready, _ = self.ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [Event(*self._pending.pop(reference), self._answer(reference)) for reference in ready]

    def close(self) -> None:
        """End every worker: asked first, then killed."""
        hired, self._hired = self._hired, {}
        self._pending = {}
        try:
            asked = [actor.stop.remote() for actor in hired.values()]
            if asked:
                self.ray.wait(asked, num_returns=len(asked), timeout=_PATIENCE_S)
        finally:
            for actor in hired.values():
                with contextlib.suppress(self.ray.exceptions.RayError, ValueError):
                    self.ray.kill(actor, no_restart=True)

    def _answer(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return Gone(f"its process ended ({type(error).__name__}: {_in_short(error)})")


def _in_short(error: Exception) -> str:
    """The first line of Ray's report and the last one, which names the cause where a worker could not be made."""
    first, last = first_line(error), (str(error).strip().splitlines() or [""])[-1].strip()
    return first if last in ("", first) else f"{first} ... {last}"

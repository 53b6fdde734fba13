"""Ray, imported on use: a cluster of this call's own, or one that runs already.

The workers as Ray actors.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from speedlab.common.errors import UnavailableError, first_line

from ..host import pack_root
from .messages import Event, FleetError, Gone, Job, WorkerSpec
from .worker import Worker

# Pictures of a few megabytes pass through; Ray's own default is 30 % of the RAM.
_STORE_BYTES = 256 * 2**20
_REFUSALS = (ConnectionError, TimeoutError, ValueError, OSError, RuntimeError)
# Ray's sockets lie below its folder, and a socket's path may have 107 letters.
_LONGEST_FOLDER = 40
_NOT_SENT = [
    "**/__pycache__", ".git", ".venv", "venv", ".*_cache", ".hypothesis", "output", "build", "tests", "docs",
    "benchmarks/results", "*.safetensors",
]  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """A cluster that answers. `ray` is the module; `gpus`, `cpus` and `nodes` are what it had at the start."""

    ray: Any
    embedded: bool
    gpus: int
    cpus: int
    nodes: int


@contextlib.contextmanager
def open_cluster(address: str | None, workers: int | None) -> Iterator[Cluster]:
    """Connect to the cluster at `address`, or start one on this machine's loopback address, which ends with this.

    Raises UnavailableError without Ray, FleetError where no cluster answers.
    """
    ray = import_ray(embedded=address is None)
    with _embedded(ray, workers) if address is None else _existing(ray, address):
        # Ray has put a handler of its own in the way.
        signal.signal(signal.SIGTERM, _raise_interrupt)
        have = ray.cluster_resources()
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        yield Cluster(ray, address is None, int(have.get("GPU", 0)), int(have.get("CPU", 0)), nodes)


def import_ray(embedded: bool) -> Any:
    """The `ray` module. Raises UnavailableError that says how to install it."""
    # All of this is read at import.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if embedded:
        # Whatever its name says: it makes a cluster of one machine listen on loopback alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # A token of this call's own: nobody else on this machine can hand work to its cluster.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        # ComfyUI looks after its memory; Ray would kill a worker where the machine is nearly full.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    try:
        import ray
    except ImportError as error:
        raise UnavailableError(
            f"`fleet` needs Ray, which {sys.executable} lacks ({first_line(error)}). Install it: "
            f"{sys.executable} -m pip install ray"
        ) from error
    return ray


@contextlib.contextmanager
def _embedded(ray: Any, workers: int | None) -> Iterator[None]:
    folder = _short_folder()
    try:
        try:
            # Not the cluster that RAY_ADDRESS names: that one is for --address auto.
            ray.init(
                address="local",
                num_cpus=workers or 1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
        except _REFUSALS as error:
            raise FleetError(f"Ray does not start on this machine: {first_line(error)}") from error
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _existing(ray: Any, address: str) -> Iterator[None]:
    environment = {"working_dir": str(pack_root()), "excludes": _NOT_SENT}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except _REFUSALS as error:
        raise FleetError(
            f"--address {address}: no Ray cluster takes this call: {first_line(error)}. `ray status --address ...` "
            "shows whether it runs. Ray and Python have to be of the same version there and here."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _short_folder() -> str | None:
    """A folder for Ray's own files that is taken away in the end; None (Ray's default) where none is short enough."""
    if sys.platform == "win32":
        return None
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(parent) + 16 <= _LONGEST_FOLDER and Path(parent).is_dir():
            return tempfile.mkdtemp(prefix="slray", dir=parent)
    return None


def _raise_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


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

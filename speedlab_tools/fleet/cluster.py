"""Ray, imported on use: a cluster of this call's own, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from speedlab.common.errors import UnavailableError, first_line

from ..host import pack_root
from . import FleetError

# Images of a few megabytes pass through; Ray's own default is 30 % of the RAM.
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
    embedded = address is None
    ray = import_ray(embedded)
    folder = _short_folder() if embedded else None
    options: dict[str, Any]
    if embedded:
        refusal = "Ray does not start on this machine: {}"
        options = {
            "address": "local",  # not the cluster that RAY_ADDRESS names: that one is for --address auto
            "num_cpus": workers or 1, "include_dashboard": False, "object_store_memory": _STORE_BYTES,
            "_node_ip_address": "127.0.0.1", "_temp_dir": folder,
        }  # fmt: skip
    else:
        refusal = (
            f"--address {address}: no Ray cluster takes this call: {{}}. `ray status --address ...` shows whether it "
            "runs. Ray and Python have to be of the same version there and here."
        )
        environment = {"working_dir": str(pack_root()), "excludes": _NOT_SENT}
        options = {"address": address, "runtime_env": environment}
    try:
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except _REFUSALS as error:
            raise FleetError(refusal.format(first_line(error))) from error
        # Ray has put a handler of its own in the way.
        signal.signal(signal.SIGTERM, _raise_interrupt)
        have = ray.cluster_resources()
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        yield Cluster(ray, embedded, int(have.get("GPU", 0)), int(have.get("CPU", 0)), nodes)
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def import_ray(embedded: bool) -> Any:
    """The `ray` module. Raises UnavailableError that says how to install it."""
    # All of this is read at import.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if embedded:
        # Whatever its name says: it makes a cluster of one machine listen on loopback alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # A token of this call's own: no other user of this machine can hand work to its cluster.
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

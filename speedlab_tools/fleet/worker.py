"""One worker: the ComfyUI, Python and model files of its machine, and the graphs that it runs. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedlab.common.errors import SpeedLabError, first_line

from ..bench.results import RUNS, report_ids, shown_images
from ..client.client import ComfyClient, ImageRef
from ..client.errors import BenchError, ExecutionFailed, PromptRejected
from ..client.files import kept_models, link_model
from ..client.graph import ApiGraph
from ..host import ComfyServer, pack_root
from ..host.base import COMFYUI_VARIABLE, Host, HostError, cache_root, is_comfyui
from ..host.managed import ManagedHost
from ..host.resolve import choose

_LOOK_S = 0.2
_TAIL = 8


@dataclass(frozen=True)
class ModelFile:
    """A model file as the driver sees it. On another machine it is the same where name and size are."""

    folder: str
    path: str
    size: int


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to start its ComfyUI; `host` is the driver's. `cpu` None asks torch; `threads` None leaves
    them to torch. `folder` and `logs` are given where worker and driver share a machine; else the worker makes its own.
    """

    name: str
    fleet: str
    host: Host
    files: tuple[ModelFile, ...] = ()
    cpu: bool | None = None
    threads: str | None = None
    start_timeout_s: float = 300.0
    folder: str | None = None
    logs: str | None = None


# Answers are plain values. A loss is a RuntimeError with plain text: no exception of this pack crosses the network.
@dataclass(frozen=True)
class Ready:
    """The worker's ComfyUI answers at `url`, an address of its own machine alone."""

    machine: str
    url: str
    pid: int
    server_pid: int


@dataclass(frozen=True)
class Done:
    """Images as they were saved, records as JSON, and the seconds that ComfyUI took. `cold`: its ComfyUI had made no
    image before."""

    images: tuple[bytes, ...]
    records: tuple[str, ...]
    seconds: float
    cold: bool = False


@dataclass(frozen=True)
class Failed:
    """ComfyUI refused the graph, or a node raised: another worker would say the same. `error` is its message."""

    error: str


class Worker:
    """`start`, then `run` for one graph after another, `stop` in the end. RuntimeError: this worker is lost."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.server: ComfyServer | None = None
        self.base: Path | None = None
        self.stopped = False
        self.cold = True

    async def start(self) -> Ready:
        """Start ComfyUI, in place of an earlier one, and wait until it answers."""
        await self._end()
        self.cold = True
        try:
            server = await asyncio.to_thread(self._start)
        except (SpeedLabError, OSError) as error:
            await self._end()
            raise RuntimeError(f"{platform.node()}: {error}") from None
        assert server.process is not None
        return Ready(platform.node(), server.url, os.getpid(), server.process.pid)

    async def run(self, graph: ApiGraph, extra: dict[str, Any], timeout_s: float) -> Done | Failed:
        """Queue a graph and fetch what it made."""
        server = self.server
        if server is None:  # Ray may hand what was asked of a process that died to the one in its place
            raise RuntimeError("its process ended, and the new one has no ComfyUI yet")
        work = asyncio.ensure_future(_work(server, graph, extra, timeout_s))
        try:
            # The client gives a server that is silent some time to come back; a process that ended does not.
            while not work.done() and _code(server) is None:
                await asyncio.wait({work}, timeout=_LOOK_S)
            answer: Done | Failed | str | None = work.result() if work.done() else None
        except BenchError as error:
            answer = str(error)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        if _code(server) is not None and not isinstance(answer, Done):
            tail = "\n".join(f"  {line}" for line in server.tail(_TAIL)) or "  (nothing)"
            raise RuntimeError(f"ComfyUI ended with exit code {_code(server)}; its log ends with\n{tail}")
        if isinstance(answer, Done):
            answer, self.cold = replace(answer, cold=self.cold), False
        if isinstance(answer, (Done, Failed)):
            return answer
        raise RuntimeError(answer or "its ComfyUI was stopped")

    async def stop(self) -> None:
        """End ComfyUI for the last time: a start that is tried again after this does nothing."""
        self.stopped = True
        await self._end()

    async def _end(self) -> None:
        server, self.server = self.server, None
        base, self.base = self.base, None
        if server is not None:
            await asyncio.to_thread(server.stop)
        if base is not None:
            await asyncio.to_thread(shutil.rmtree, base, ignore_errors=True)

    def _start(self) -> ComfyServer:
        spec = self.spec
        if self.stopped:
            raise HostError("this worker was stopped.")
        if sys.platform != "win32":
            # Ray's processes block SIGINT, and so would what they start; ComfyUI has to be asked to end that way.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        host = find_host(spec.host)
        self.base = base = self._folder()
        show_models(spec.files, host, base)
        # Ray sets this to the cores it has put down for the actor, which says nothing of ComfyUI's work.
        os.environ.pop("OMP_NUM_THREADS", None)
        server = ComfyServer(
            host,
            pack=pack_root(),
            base=base,
            models=kept_models() if kept_models().is_dir() else None,
            cpu=spec.cpu,
            env={} if spec.threads is None else {"OMP_NUM_THREADS": spec.threads},
            log=None if spec.logs is None else Path(spec.logs) / f"{spec.name}.log",
            timeout_s=spec.start_timeout_s,
        )
        self.server = server
        return server.start()

    def _folder(self) -> Path:
        """A folder of this worker's own; what a killed predecessor on this machine left of it is taken away."""
        parent = Path(tempfile.gettempdir()) if self.spec.folder is None else Path(self.spec.folder)
        stem = f"speedlab-fleet-{self.spec.fleet}-{self.spec.name}-"
        for old in parent.glob(f"{stem}*"):
            shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=stem, dir=parent))


async def _work(server: ComfyServer, graph: ApiGraph, extra: dict[str, Any], timeout_s: float) -> Done | Failed:
    """Raises BenchError where the server is lost or too slow."""
    began = time.perf_counter()
    try:
        async with ComfyClient(server.url) as client:
            result = await client.run(graph, extra_data=extra, timeout_s=timeout_s)
            seconds = time.perf_counter() - began
            images = [await client.view(image) for image in shown_images(result)]
            names = [ImageRef(f"{run_id}.json", RUNS, "output") for run_id in report_ids(result)]
            return Done(tuple(images), tuple([(await client.view(name)).decode() for name in names]), seconds)
    except (PromptRejected, ExecutionFailed) as error:
        return Failed(str(error))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return Failed(f"the server's answer makes no sense: {type(error).__name__}: {first_line(error)}")
    finally:
        # So that no worker's disk fills: what matters was fetched, and ComfyUI makes the folder again.
        await asyncio.to_thread(shutil.rmtree, server.base / "output", ignore_errors=True)


def _code(server: ComfyServer) -> int | None:
    """The exit code of a server that has ended by itself."""
    return None if server.process is None else server.process.poll()


def find_host(drivers: Host) -> Host:
    """The ComfyUI to run here: the driver's paths where they exist, COMFYUI_PATH, else the managed one.

    Nothing is installed. Raises HostError that says what to do on this machine.
    """
    if is_comfyui(drivers.comfyui) and drivers.python.is_file():
        return Host(drivers.comfyui, drivers.python, drivers.managed, "where the driver has it")
    own = choose(None, os.environ, ())
    if own is not None:
        return Host(own[0], Path(sys.executable), False, own[1])
    managed = ManagedHost(cache_root())
    reason = managed.missing()
    if reason:
        raise HostError(
            f"There is no ComfyUI at {drivers.comfyui} as on the driver's machine, {COMFYUI_VARIABLE} is not set, and "
            f"the managed one in {managed.root} is not ready ({reason}). Run `python run.py setup` there, or set "
            f"{COMFYUI_VARIABLE} before `ray start`."
        )
    return managed.host()


def show_models(files: Iterable[ModelFile], host: Host, base: Path) -> None:
    """Make the model files appear below `base`/models. Raises HostError that names the one that is not here.

    A file is the driver's where the same path has the same size; else one of that name and size in a models folder of
    this machine is taken, which the server reads by itself.
    """
    places = [kept_models(), *([] if host.managed else [host.comfyui / "models"])]
    for file in files:
        path = Path(file.path)
        sizes = {entry: _size(entry) for entry in (path, *(place / file.folder / path.name for place in places))}
        found = next((entry for entry, size in sizes.items() if size == file.size), None)
        if found is None:
            tried = ", ".join(f"{e} ({'not there' if size is None else f'{size} bytes'})" for e, size in sizes.items())
            raise HostError(
                f"The model file {path.name} of {file.size} bytes is not on this machine: {tried}. Copy it."
            )
        link_model(found, base / "models" / file.folder)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None

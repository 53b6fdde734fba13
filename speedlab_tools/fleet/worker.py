"""What a worker finds on its own machine: a ComfyUI, the Python that runs it, and the model files.

One ComfyUI on one device, and the tasks it is given. Runs as a Ray actor; knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from speedlab.common.errors import SpeedLabError, first_line

from ..bench.results import RUNS, report_ids, shown_pictures
from ..client.client import ComfyClient, ImageRef
from ..client.errors import BenchError, ExecutionFailed, PromptRejected
from ..client.files import kept_models, link_model
from ..host import ComfyServer, pack_root
from ..host.base import COMFYUI_VARIABLE, Host, HostError, cache_root, is_comfyui
from ..host.managed import ManagedHost
from .messages import Done, Failed, Gone, Job, ModelFile, Ready, WorkerSpec


def find_host(spec: WorkerSpec) -> Host:
    """The ComfyUI to run here: the driver's paths where they exist, COMFYUI_PATH, else the managed one.

    Nothing is installed. Raises HostError that says what to do on this machine.
    """
    comfyui, python = Path(spec.comfyui), Path(spec.python)
    if is_comfyui(comfyui) and python.is_file():
        return Host(comfyui, python, spec.managed, "where the driver has it")
    own = os.environ.get(COMFYUI_VARIABLE, "").strip()
    if own:
        if not is_comfyui(Path(own)):
            raise HostError(f"{COMFYUI_VARIABLE} names {own}, which is no ComfyUI.")
        return Host(Path(own), Path(sys.executable), False, f"from {COMFYUI_VARIABLE}")
    managed = ManagedHost(cache_root())
    reason = managed.missing()
    if reason:
        raise HostError(
            f"There is no ComfyUI at {comfyui} as on the driver's machine, {COMFYUI_VARIABLE} is not set, and the "
            f"managed one in {managed.root} is not ready ({reason}). Run `python run.py setup` there, or set "
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
        known = [path, *(place / file.folder / path.name for place in places)]
        found = next((entry for entry in known if _size(entry) == file.size), None)
        if found is None:
            told = ", ".join(f"{entry} ({_in_words(_size(entry))})" for entry in known)
            raise HostError(f"The model file {path.name} of {file.size} bytes is not on this machine: {told}. Copy it.")
        link_model(found, base / "models" / file.folder)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _in_words(size: int | None) -> str:
    return "not there" if size is None else f"{size} bytes"


_LOOK_S = 0.2
_TAIL = 8


class Worker:
    """`start` once, then `run` for one task after another, `stop` in the end. Every method answers, none raises."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.server: ComfyServer | None = None
        self.base: Path | None = None

    async def start(self) -> Ready | Gone:
        """Start ComfyUI and wait until it answers."""
        try:
            server = await asyncio.to_thread(self._start)
        except (SpeedLabError, OSError) as error:
            await self.stop()
            return Gone(f"{platform.node()}: {error}")
        assert server.process is not None
        return Ready(platform.node(), server.url, os.getpid(), server.process.pid)

    async def run(self, job: Job) -> Done | Failed | Gone:
        """Queue a task's graph and fetch what it made."""
        server = self.server
        if server is None:
            return Gone("its ComfyUI was not started")
        work = asyncio.ensure_future(self._work(server, job))
        watch = asyncio.ensure_future(_until_ended(server))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            answer = work.result() if work.done() else None
            code = None if server.process is None else server.process.poll()
            if code is not None and not isinstance(answer, Done):
                return Gone(f"ComfyUI ended with exit code {code}; its log ends with\n{_tail(server)}")
            return answer or Gone("its ComfyUI was stopped")
        finally:
            for task in (work, watch):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, SpeedLabError):
                await asyncio.gather(work, watch, return_exceptions=True)

    async def stop(self) -> None:
        """End ComfyUI and take its folder away. Does nothing the second time."""
        server, self.server = self.server, None
        base, self.base = self.base, None
        if server is not None:
            await asyncio.to_thread(server.stop)
        if base is not None:
            await asyncio.to_thread(shutil.rmtree, base, ignore_errors=True)

    def _start(self) -> ComfyServer:
        spec = self.spec
        _restore_interrupts()
        host = find_host(spec)
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

    async def _work(self, server: ComfyServer, job: Job) -> Done | Failed | Gone:
        began = time.perf_counter()
        try:
            async with ComfyClient(server.url) as client:
                result = await client.run(job.graph, extra_data=job.extra, timeout_s=job.timeout_s)
                seconds = time.perf_counter() - began
                pictures = [await client.view(image) for image in shown_pictures(result)]
                names = [ImageRef(f"{run_id}.json", RUNS, "output") for run_id in report_ids(result)]
                records = [(await client.view(name)).decode() for name in names]
        except (PromptRejected, ExecutionFailed) as error:
            return Failed(str(error))
        except BenchError as error:
            return Gone(str(error))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            return Failed(f"the server's answer makes no sense: {type(error).__name__}: {first_line(error)}")
        finally:
            await asyncio.to_thread(_clear, server.base / "output")
        return Done(tuple(pictures), tuple(records), seconds)


async def _until_ended(server: ComfyServer) -> None:
    """Wait until the server's process is no more."""
    while server.process is not None and server.process.poll() is None:
        await asyncio.sleep(_LOOK_S)


def _tail(server: ComfyServer) -> str:
    return "\n".join(f"  {line}" for line in server.tail(_TAIL)) or "  (nothing)"


def _clear(output: Path) -> None:
    """Take away what the driver has fetched, so that no worker's disk fills.

    ComfyUI's output folder here is only a place between the save node and the driver.
    """
    for path in output.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()


def _restore_interrupts() -> None:
    """Ray's processes block SIGINT and what they start would too, but ComfyUI has to be asked to end that way."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

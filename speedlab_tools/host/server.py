"""A real ComfyUI server process with this pack loaded, on 127.0.0.1, that never outlives its owner."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import layout, threads, watchdog
from .base import Host, ServerError, child_environment
from .gpu import cpu_is_wanted, maker_of_gpu, remedy

ADDRESS = "127.0.0.1"
_TAKEN = ("address already in use", "only one usage of each socket address")


class ComfyServer:
    """One ComfyUI process.

    `with ComfyServer(host, pack=pack_root(), base=folder) as server: ...server.url...`

    `base` is ComfyUI's base directory and is made; `output` moves only the output folder. `models` is one more tree
    with checkpoints/, loras/, vae/ and so on; the folders it has at the start are read. `port` None takes a free one,
    `cpu` None asks torch. `log` (default `base`/comfyui.log) gets all that the server prints. Of a server on the CPU
    `threads` says what was chosen; None where the environment says it.
    """

    def __init__(
        self,
        host: Host,
        *,
        pack: Path,
        base: Path,
        output: Path | None = None,
        models: Path | None = None,
        port: int | None = None,
        cpu: bool | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        timeout_s: float = 180.0,
    ) -> None:
        self.host = host
        self.pack = pack
        self.base = base.absolute()
        self.output = None if output is None else output.absolute()
        self.models = models
        self.cpu = cpu
        self.extra_args = tuple(extra_args)
        self.env = {**child_environment(host), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **(env or {})}
        self.log_path = (self.base / "comfyui.log") if log is None else log.absolute()
        self.timeout_s = timeout_s
        self.port = port or 0
        self.process: subprocess.Popen[bytes] | None = None
        self.threads: threads.Threads | None = None
        self._port_given = port is not None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server answers, without a slash at the end."""
        return f"http://{ADDRESS}:{self.port}"

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self) -> ComfyServer:
        """Start the process and wait until it answers. Raises ServerError: port in use, died at start, too slow."""
        if self.process is not None:
            raise ServerError(f"This server already runs at {self.url}.")
        if self._port_given:
            require_free(self.port)
        layout.make_base(self.host.comfyui, self.base)
        layout.link_pack(self.pack, self.base)
        arguments = self._arguments()
        for attempt in range(3):
            if not self._port_given:
                self.port = free_port()
            self._launch([*arguments, "--port", str(self.port)])
            try:
                self._wait_until_ready()
            except BaseException as error:
                self.stop()
                # A free port can be taken between the choice and the start; a given one is reported.
                if isinstance(error, ServerError) and not self._port_given and attempt < 2 and self._port_was_taken():
                    continue
                raise
            break
        return self

    def stop(self) -> None:
        """End the server and its children: asked first, then killed. Does nothing where none runs."""
        process, self.process = self.process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        try:
            if process.poll() is None:
                _ask_to_end(process)
        finally:
            if sys.platform != "win32" or process.poll() is None:
                watchdog.kill_tree(process.pid)
            process.wait()
            self._dismiss_watchdog()

    def system_stats(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """The server's own description of itself and its devices. Raises OSError where it does not answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/system_stats", timeout=timeout_s) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def tail(self, n: int = 30) -> list[str]:
        """The last `n` lines of the server's log."""
        try:
            with self.log_path.open(encoding="utf-8", errors="replace") as lines:
                return [line.rstrip() for line in deque(lines, maxlen=n)]
        except FileNotFoundError:
            return []

    def _arguments(self) -> list[str]:
        known = flags(self.host.comfyui)
        if "--base-directory" not in known:
            raise ServerError(f"The ComfyUI in {self.host.comfyui} is too old: it has no --base-directory. Update it.")
        # What is given twice counts as said last: nothing in extra_args can open the server to the network.
        arguments = [*self.extra_args, "--listen", ADDRESS, "--base-directory", str(self.base)]
        if "--disable-auto-launch" in known:
            arguments.append("--disable-auto-launch")
        if "--database-url" in known:
            arguments += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
        if self.output is not None:
            arguments += ["--output-directory", str(self.output)]
        trees = self._model_trees()
        if trees:
            config = self.base / "user" / "speedlab_model_paths.yaml"
            config.write_text(layout.models_config(trees), encoding="utf-8")
            arguments += ["--extra-model-paths-config", str(config)]
        if self._wants_cpu():
            arguments.append("--cpu")
        if "--cpu" in arguments:
            self.threads = threads.choose(self.env)
        return arguments

    def _model_trees(self) -> dict[str, Path]:
        own = self.host.comfyui / "models"
        trees = {} if self.models is None else {"speedlab": self.models}
        if not self.host.managed and own.is_dir():
            trees["comfyui"] = own
        return trees

    def _wants_cpu(self) -> bool:
        if any(argument in ("--cpu", "--directml") for argument in self.extra_args):
            return False
        if self.cpu is not None:
            return self.cpu
        if _has_device(self.host, tuple(sorted(self.env.items()))):
            return False
        found = "" if cpu_is_wanted(self.env) else maker_of_gpu()
        if found:
            raise ServerError(
                f"This machine has an {found} GPU, and the PyTorch of {self.host.python} sees none, so ComfyUI would "
                f"compute on the CPU. {remedy(found)}"
            )
        return True

    def _launch(self, arguments: Sequence[str]) -> None:
        command = [str(self.host.python), str(self.host.comfyui / "main.py"), *arguments]
        options = _own_group()
        chosen = {} if self.threads is None else {threads.VARIABLE: str(self.threads.count)}
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    command,
                    cwd=self.host.comfyui,
                    env={**self.env, **chosen},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    **options,
                )
        except OSError as error:
            raise ServerError(f"ComfyUI could not be started with {self.host.python}: {error}") from error
        atexit.register(self.stop)
        if self.threads is not None and self.threads.cpus and sys.platform == "linux":
            with contextlib.suppress(OSError):  # it has ended already, which is told by who waits for it
                os.sched_setaffinity(self.process.pid, self.threads.cpus)  # before it has any thread
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", str(Path(watchdog.__file__)), str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **options,
        )

    def _wait_until_ready(self) -> None:
        process = self.process
        assert process is not None
        deadline = time.monotonic() + self.timeout_s
        while True:
            if process.poll() is not None:
                raise ServerError(self._report(f"ComfyUI ended with exit code {process.returncode} while starting"))
            with contextlib.suppress(OSError, ValueError):
                self.system_stats(timeout_s=2.0)
                return
            if time.monotonic() >= deadline:
                raise ServerError(self._report(f"ComfyUI did not answer at {self.url} within {self.timeout_s:.0f} s"))
            time.sleep(0.1)

    def _report(self, what: str) -> str:
        lines = "\n".join("  " + line for line in self.tail(30)) or "  (nothing)"
        return f"{what}. Its log {self.log_path} ends with\n{lines}\n{self.host.remedy}"

    def _port_was_taken(self) -> bool:
        return any(sign in line.lower() for line in self.tail(40) for sign in _TAKEN)

    def _dismiss_watchdog(self) -> None:
        guard, self._watchdog = self._watchdog, None
        if guard is None:
            return
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            guard.communicate(b"done\n", timeout=5)
        if guard.poll() is None:
            guard.kill()
            guard.wait()


def _own_group() -> dict[str, Any]:
    """What makes a process the head of a group of its own: a Ctrl-C on the terminal is ours to handle, not its."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt, which lets ComfyUI clean up (it takes some seconds to unload torch), then terminate."""
    if sys.platform == "win32":
        signs = [(signal.CTRL_BREAK_EVENT, 8)]
    else:
        signs = [(signal.SIGINT, 8), (signal.SIGTERM, 4)]
    for sign, patience_s in signs:
        process.send_signal(sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            return


_DEVICE_SCRIPT = """
import importlib.util, torch
for extension in ("torch_npu", "torch_mlu"):
    if importlib.util.find_spec(extension):
        __import__(extension)
found = []
for owner, name in ((torch, "cuda"), (torch, "xpu"), (torch, "npu"), (torch, "mlu"), (torch.backends, "mps")):
    part = getattr(owner, name, None)
    if part is not None and hasattr(part, "is_available") and part.is_available():
        found.append(name)
print("devices:" + ",".join(found))
"""


def flags(comfyui: Path) -> frozenset[str]:
    """The command line flags of a ComfyUI, such as "--base-directory". Raises ServerError where they cannot be read."""
    source = comfyui / "comfy" / "cli_args.py"
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise ServerError(f"{source} cannot be read ({error.strerror}); {comfyui} is no whole ComfyUI.") from error
    return frozenset(re.findall(r"""["'](--[a-z0-9][a-z0-9_-]*)["']""", text))


@functools.cache
def _has_device(host: Host, env: tuple[tuple[str, str], ...]) -> bool:
    """Whether torch sees a device besides the CPU, asked in a process of its own. Raises ServerError without torch."""
    command = [str(host.python), "-c", _DEVICE_SCRIPT]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=180, env=dict(env))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"{host.python} does not run ({error}). {host.remedy}") from error
    line = next((line for line in answer.stdout.splitlines() if line.startswith("devices:")), None)
    if answer.returncode != 0 or line is None:
        last = "\n".join("  " + text for text in answer.stderr.strip().splitlines()[-5:]) or "  no message"
        raise ServerError(f"torch does not import in {host.python}:\n{last}\n{host.remedy}")
    return line != "devices:"


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server((ADDRESS, 0)) as probe:
        return int(probe.getsockname()[1])


def require_free(port: int) -> None:
    """Raises ServerError that names the port where something uses it, or it is no port."""
    if not 0 < port < 65536:
        raise ServerError(f"{port} is no port; take one from 1 to 65535.")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((ADDRESS, port)) == 0:
            raise ServerError(f"Port {port} is in use by another program. Close that one or choose another port.")
    try:
        socket.create_server((ADDRESS, port)).close()
    except OSError as error:
        raise ServerError(
            f"Port {port} cannot be used ({error.strerror}). Close the program that has it or choose another port."
        ) from error

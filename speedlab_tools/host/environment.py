"""A virtual environment in the cache folder, set up stage by stage, by one process at a time.

A stage that ended well leaves a stamp with the hash of what it was made from, and runs again only where that changes.
pip checks versions and hashes of what it installs (`--require-hashes`); nothing here checks them a second time. An
environment that was damaged afterwards is made again once its folder is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import CACHE_VARIABLE, HostError, clean_python_environment, environment_python
from .packages import Pip, requirement_lines
from .progress import Reporter, run_logged


@dataclass(frozen=True)
class Stage:
    """One step of a set-up: the hash of what it is made from, what makes it, and a file that is there afterwards."""

    name: str
    title: str
    key: str
    run: Callable[[str], None]
    result: Path


class StagedEnvironment:
    """A virtual environment under `root`, and what else its `stages` make there.

    A set-up says its `announcement` first, and takes `disk_gb` of space in all.
    """

    announcement: str
    disk_gb: float

    def __init__(self, root: Path, reporter: Reporter | None = None) -> None:
        self.root = root
        self.reporter = Reporter() if reporter is None else reporter
        self.environment = root / "venv"
        self.python = environment_python(self.environment)
        self.logs = root / "logs"
        self.stamps = root / "stamps"
        self._inherit: tuple[int, ...] = ()

    def stages(self) -> list[Stage]:
        """The steps of the set-up, in order. Raises HostError where a lock file cannot be read."""
        raise NotImplementedError

    def missing(self) -> str:
        """Why the set-up is not complete, "" where it is. Changes nothing."""
        return next((f"{stage.title}: {reason}" for stage in self.stages() if (reason := self._reason(stage))), "")

    def prepare(self) -> None:
        """Set up what is missing. Raises HostError with what to do; a later call continues where this one ended."""
        if not self.missing():
            return
        try:
            with setup_lock(self.root / "setup.lock", self.reporter.line) as self._inherit:
                if self.missing():
                    self._run_stages()
        except OSError as error:
            raise HostError(
                f"The set-up in {self.root} failed: {error}. Free or repair that folder, or set {CACHE_VARIABLE} to "
                "another one, then run the same command again."
            ) from error

    def environment_stage(self) -> Stage:
        """The stage that makes the virtual environment."""
        return Stage("environment", "Python environment", key_of(identity()), self._make_environment, self.python)

    def lock_stage(self, name: str, title: str, lock: Path, options: Sequence[str] = ()) -> Stage:
        """A stage that installs what a lock file names: each package with its version and hashes."""
        lines = locked_lines(lock)

        def run(label: str) -> None:
            self.forget_interrupted()
            self.pip(["install", *options, "--require-hashes", "-r", str(lock)], name, label, title)

        return Stage(name, title, key_of({**identity(), "lock": "\n".join(lines)}), run, self.python)

    def forget_interrupted(self) -> None:
        """Have pip install again what it was interrupted at: it writes INSTALLER last, but does not look for it."""
        for info in (*self.environment.glob("lib/python*/site-packages/*.dist-info"),
                     *self.environment.glob("Lib/site-packages/*.dist-info")):  # fmt: skip
            if not (info / "INSTALLER").is_file():
                shutil.rmtree(info)

    def pip(self, arguments: Sequence[str], name: str, label: str, what: str) -> None:
        """Run the environment's pip. Raises HostError where it fails."""
        Pip(self.python, self.logs, self.reporter, self._inherit).run(arguments, name=name, label=label, what=what)

    def _stamp(self, name: str) -> Path:
        return self.stamps / f"{name}.json"

    def _reason(self, stage: Stage) -> str:
        """Why a stage has to run, "" where it is done."""
        try:
            stamped = self._stamp(stage.name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "not done yet"
        if stage.key not in stamped:
            return "what it is made from has changed"
        return "" if stage.result.exists() else f"{stage.result} is missing"

    def _run_stages(self) -> None:
        self.reporter.line(self.announcement)
        free_gb = shutil.disk_usage(self.root).free / 1e9
        if free_gb < self.disk_gb and not self._stamp("packages").is_file():
            self.reporter.line(f"Warning: {free_gb:.1f} GB are free there; the set-up takes about {self.disk_gb:g} GB.")
        self.stamps.mkdir(exist_ok=True)
        stages = self.stages()
        for number, stage in enumerate(stages, start=1):
            label = f"[{number}/{len(stages)}] {stage.title}"
            reason = self._reason(stage)
            self.reporter.line(f"{label}: {reason or 'ready'}")
            if reason:
                begun = time.monotonic()
                self._stamp(stage.name).unlink(missing_ok=True)
                stage.run(label)
                self._stamp(stage.name).write_text(json.dumps({"key": stage.key}), encoding="utf-8")
                self.reporter.line(f"{label}: done in {time.monotonic() - begun:.0f} s")

    def _make_environment(self, label: str) -> None:
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            raise HostError(_no_venv())
        for stamp in self.stamps.glob("*packages.json"):  # the packages are deleted with the old environment
            stamp.unlink()
        if self.environment.exists():
            shutil.rmtree(self.environment)
        python = getattr(sys, "_base_executable", "") or sys.executable  # never the environment that is replaced
        code, output = run_logged(
            [python, "-m", "venv", str(self.environment)],
            log=self.logs / "environment.log",
            reporter=self.reporter,
            label=label,
            env=clean_python_environment(os.environ),
            pass_fds=self._inherit,
        )
        if "ensurepip" in output:
            raise HostError(_no_venv())
        if code:
            raise HostError(f"{python} could not make a virtual environment in {self.environment}: {output.strip()}")


def locked_lines(lock: Path) -> list[str]:
    """What a lock file names. Raises HostError where it cannot be read."""
    try:
        return requirement_lines(lock.read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"{lock} cannot be read ({error.strerror}); this copy of the pack is not whole.") from error


def key_of(inputs: Mapping[str, str]) -> str:
    """The hash of what a stage is made from."""
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode("utf-8")).hexdigest()


def identity() -> dict[str, str]:
    """What an environment made here is bound to."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "system": platform.system(),
        "machine": platform.machine(),
    }


def _no_venv() -> str:
    return (
        f"{sys.executable} cannot make virtual environments: its ensurepip is missing. On Debian and Ubuntu run `sudo "
        f"apt install python{identity()['python']}-venv`; elsewhere use a complete Python 3.10 or newer. Or pass your "
        "own ComfyUI with --comfyui."
    )


@contextlib.contextmanager
def setup_lock(
    path: Path, say: Callable[[str], None], wait_s: float = 3600.0, poll_s: float = 0.5
) -> Iterator[tuple[int, ...]]:
    """Hold a lock file, waiting for it first. Yields the descriptors that a child needs to hold the lock as well.

    The system releases the lock of a process that died. A child that inherits it, such as pip, keeps it until it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        begun, say_at = time.monotonic(), 0.0
        while not _try_lock(descriptor):
            owner = f"process {path.read_text(encoding='ascii', errors='replace').strip() or 'unknown'}"
            waited = time.monotonic() - begun
            if waited >= say_at:
                say(f"Another set-up ({owner}) is at work in {path.parent}; waiting, {waited:.0f} s")
                say_at = waited + 15.0
            if waited >= wait_s:
                raise HostError(
                    f"Another set-up ({owner}) has held {path} for more than {wait_s:.0f} s. End that process, then "
                    "run the same command again."
                )
            time.sleep(poll_s)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield () if sys.platform == "win32" else (descriptor,)
    finally:
        os.close(descriptor)  # which releases the lock, unless a child holds it too


if sys.platform == "win32":
    import msvcrt

    _BEYOND = 1 << 20  # Windows lets no process read a locked byte: lock one behind the text

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

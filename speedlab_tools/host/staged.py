"""A virtual environment in the cache folder, made and mended stage by stage.

A set-up as stages, each done once: a stamp with the hash of its inputs is written only after it ended well.

The virtual environment of a managed host: made with the running Python, checked by running its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import packages
from .base import CACHE_VARIABLE, HostError, clean_python_environment, environment_python, require_writable
from .lock import SetupLock
from .packages import Pip
from .progress import Reporter, run_logged


class StagedEnvironment:
    """An environment under `root` with a lock, stamps and logs of its own. What it is made of, `stages` says."""

    def __init__(self, root: Path, reporter: Reporter | None = None) -> None:
        self.root = root
        self.reporter = Reporter() if reporter is None else reporter
        self.environment = root / "venv"
        self.python = environment_python(self.environment)
        self.logs = root / "logs"
        self.stamps = root / "stamps"
        self._inherit: tuple[int, ...] = ()
        self._present: Mapping[str, packages.Package] | None = None

    def stages(self) -> list[Stage]:
        raise NotImplementedError

    def announcement(self) -> str:
        """What is said before a set-up begins."""
        raise NotImplementedError

    def space(self) -> tuple[str, float]:
        """The stage that takes the most space, and the GB that all of them take."""
        raise NotImplementedError

    def missing(self) -> str:
        """Why it is not ready, "" where it is. Changes nothing."""
        self._present = None
        return first_reason(self.stages(), self.stamps)

    def prepare(self) -> None:
        """Set up what is missing. Raises HostError with what to do; a later call goes on where this one ended."""
        if not self.missing():
            return
        require_writable(self.root)
        with SetupLock(self.root / "setup.lock", on_wait=self.reporter.line) as lock:
            self._inherit = lock.inherit
            if self.missing():
                self._announce()
                try:
                    run_stages(self.stages(), self.stamps, self.reporter)
                except OSError as error:
                    raise HostError(
                        f"The set-up in {self.root} failed: {error}. Free or repair that folder, or set "
                        f"{CACHE_VARIABLE} to another one, then run the same command again."
                    ) from error

    def environment_stage(self) -> Stage:
        return Stage("environment", "Python environment", identity, self._make_environment, self._environment_fault)

    def _announce(self) -> None:
        self.reporter.line(self.announcement())
        largest, needed_gb = self.space()
        free_gb = shutil.disk_usage(self.root).free / 1e9
        if not self.stamps.joinpath(f"{largest}.json").is_file() and free_gb < needed_gb:
            self.reporter.line(
                f"Warning: {free_gb:.1f} GB are free there and the set-up takes about {needed_gb:.0f} GB."
            )

    def _environment_fault(self, _facts: Facts) -> str:
        return environment_fault(self.environment)

    def _make_environment(self, label: str) -> Facts:
        self._present = None
        make_environment(self.environment, self.logs / "environment.log", self.reporter, label, self._inherit)
        return {}

    def lock_stage(self, name: str, title: str, lock: Path, options: Sequence[str] = ()) -> Stage:
        """A stage that installs exactly what a lock file names: each package with its version and hashes."""

        def inputs() -> Mapping[str, str]:
            return {**identity(), "lock": "\n".join(_locked(lock))}

        def run(label: str) -> Facts:
            return self._install(name, lock, label, title, options)

        return Stage(name, title, inputs, run, self._packages_fault)

    def _install(self, name: str, lock: Path, label: str, what: str, options: Sequence[str]) -> Facts:
        folder = packages.site_packages(self.environment)
        for broken in packages.remove_broken(folder):
            self.reporter.line(f"{label}: installing anew {broken}")
        self._present = None
        arguments = ["install", *options, "--require-hashes", "-r", str(lock)]
        Pip(self.python, self.logs, self.reporter, self._inherit).run(arguments, name=name, label=label, what=what)
        # A line may be for other systems or versions of Python: what is there now is what this one asks for.
        present = self._installed()
        names = {packages.requirement_name(line) for line in _locked(lock)}
        return {"versions": {name: present[name].version for name in sorted(names & present.keys())}}

    def _installed(self) -> Mapping[str, packages.Package]:
        if self._present is None:
            self._present = packages.installed(packages.site_packages(self.environment))
        return self._present

    def _packages_fault(self, facts: Facts) -> str:
        present = self._installed()
        for name, version in facts["versions"].items():
            if name not in present:
                return f"{name} is not installed"
            if present[name].fault:
                return f"{name} is damaged: {present[name].fault}"
            if present[name].version != version:
                return f"{name} is {present[name].version} instead of {version}"
        return ""


def _locked(lock: Path) -> list[str]:
    try:
        return packages.requirement_lines(lock.read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"{lock} cannot be read ({error.strerror}); this copy of the pack is not whole.") from error


Facts = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One step of a set-up.

    `inputs` gives what the result depends on, as text. `run(label)` does the work and returns facts for the stamp
    (anything JSON holds). `fault(facts)` looks at what is on disk: "" where all is there, else what is wrong.
    """

    name: str
    title: str
    inputs: Callable[[], Mapping[str, str]]
    run: Callable[[str], Facts]
    fault: Callable[[Facts], str]


def key_of(inputs: Mapping[str, str]) -> str:
    """The hash of a stage's inputs."""
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode("utf-8")).hexdigest()


def reason_to_run(stage: Stage, stamps: Path) -> str:
    """Why a stage has to run, "" where it is done."""
    path = _stamp(stage, stamps)
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        key, facts = stamp["key"], stamp["facts"]
    except OSError:  # not there, or not for us to read: making it says which
        return "not done yet"
    except (ValueError, KeyError, TypeError):
        return f"its stamp {path.name} is unreadable"
    if key != key_of(stage.inputs()):
        return "what it is made from has changed"
    return stage.fault(facts)


def first_reason(stages: Sequence[Stage], stamps: Path) -> str:
    """Why the set-up is not complete, "" where it is."""
    for stage in stages:
        reason = reason_to_run(stage, stamps)
        if reason:
            return f"{stage.title}: {reason}"
    return ""


def run_stages(stages: Sequence[Stage], stamps: Path, reporter: Reporter) -> list[str]:
    """Run the stages that need it, in order. Returns their names. Errors of a stage pass through, without a stamp."""
    stamps.mkdir(parents=True, exist_ok=True)
    ran = []
    for number, stage in enumerate(stages, start=1):
        label = f"[{number}/{len(stages)}] {stage.title}"
        reason = reason_to_run(stage, stamps)
        if not reason:
            reporter.line(f"{label}: ready")
            continue
        reporter.line(f"{label}: {reason}")
        _stamp(stage, stamps).unlink(missing_ok=True)
        begun = time.monotonic()
        key = key_of(stage.inputs())  # before the work: inputs that change meanwhile make another run
        facts = stage.run(label)
        write_whole(_stamp(stage, stamps), json.dumps({"key": key, "facts": facts}))
        reporter.line(f"{label}: done in {time.monotonic() - begun:.0f} s")
        ran.append(stage.name)
    return ran


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stamp(stage: Stage, stamps: Path) -> Path:
    return stamps / f"{stage.name}.json"


def identity() -> Mapping[str, str]:
    """What an environment made here is bound to."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "system": platform.system(),
        "machine": platform.machine(),
    }


def make_environment(folder: Path, log: Path, reporter: Reporter, label: str, inherit: Sequence[int] = ()) -> None:
    """Make a virtual environment with pip, in place of what is there. Raises HostError with what to do."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise HostError(no_venv())
    if folder.exists():
        shutil.rmtree(folder)
    base = getattr(sys, "_base_executable", "") or sys.executable  # never the environment that is being replaced
    outcome = run_logged(
        [base, "-m", "venv", str(folder)],
        log=log,
        reporter=reporter,
        label=label,
        env=clean_python_environment(os.environ),
        pass_fds=inherit,
    )
    if "ensurepip" in outcome.text:
        raise HostError(no_venv())
    fault = environment_fault(folder)
    if outcome.code or fault:
        raise HostError(
            f"Could not make a virtual environment in {folder} with {base}: {outcome.text.strip() or fault}"
        )


def environment_fault(folder: Path) -> str:
    """What is wrong with an environment, "" where its Python runs, has pip and is of the version that runs here."""
    python = environment_python(folder)
    if not python.exists():
        return f"{python} is missing"
    command = [str(python), "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"]
    env = clean_python_environment(os.environ)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its Python does not run ({error})"
    if answer.returncode != 0:
        return f"its Python does not run ({(answer.stderr.strip().splitlines() or ['no message'])[-1]})"
    wanted, found = identity()["python"], answer.stdout.strip()
    return "" if found == wanted else f"it has Python {found} instead of {wanted}"


def no_venv() -> str:
    """What to do where Python cannot make virtual environments."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"{sys.executable} cannot make virtual environments: its ensurepip is missing. On Debian and Ubuntu run "
        f"`sudo apt install python{version}-venv`; elsewhere use a complete Python 3.10 or newer. Or pass your own "
        "ComfyUI with --comfyui."
    )

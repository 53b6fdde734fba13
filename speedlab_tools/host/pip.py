"""pip inside a virtual environment, under the user's own pip configuration, with its failures put into words."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import CACHE_VARIABLE, HostError, clean_python_environment
from .progress import Reporter, run_logged

_NO_CONNECTION = (
    "connection broken by",
    "failed to establish a new connection",
    "max retries exceeded",
    "name or service not known",
    "temporary failure in name resolution",
    "getaddrinfo failed",
    "read timed out",
    "connection timed out",
    "connecttimeouterror",
    "could not fetch url",
    "proxyerror",
    "incompleteread",
    "connection reset by peer",
)
_UNFOUND = re.compile(r"No matching distribution found for ([^\s(]+)|for requirement ([^\s(]+) \(from versions: none\)")
_DISK_FULL = ("no space left on device", "errno 28", "not enough space on the disk", "disk quota exceeded")


@dataclass(frozen=True)
class Pip:
    """The pip of one interpreter. `logs` gets the whole output of every call; `inherit` are descriptors to pass on."""

    python: Path
    logs: Path
    reporter: Reporter
    inherit: tuple[int, ...] = ()

    def run(self, arguments: Sequence[str], *, name: str, label: str, what: str) -> None:
        """Run pip. `what` says in words what is being fetched. Raises HostError, with what to do, where pip failed."""
        log = self.logs / f"{name}.log"
        command = [str(self.python), "-m", "pip", *arguments]
        outcome = run_logged(
            command,
            log=log,
            reporter=self.reporter,
            label=label,
            env=pip_environment(os.environ),
            pass_fds=self.inherit,
        )
        if outcome.code != 0:
            raise HostError(explain_failure(log.read_text(encoding="utf-8", errors="replace"), what=what, log=log))


def pip_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for pip: the user's settings stay, output is made for a log, `--user` cannot apply."""
    result = {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_PROGRESS_BAR": "off",
        "PIP_NO_INPUT": "1",
        **clean_python_environment(env),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "PIP_USER": "0",
    }
    result.pop("PIP_TARGET", None)
    result.pop("PIP_PREFIX", None)
    return result


def explain_failure(output: str, *, what: str, log: Path) -> str:
    """pip's failure for the person at the terminal: what could not be had, why, what to do."""
    low = output.lower()
    again = "Run the same command again: finished stages are kept."
    if any(sign in low for sign in _DISK_FULL):
        free = shutil.disk_usage(log.parent).free / 1e9
        return (
            f"The disk is full: {what} did not fit ({free:.1f} GB free at {log.parent}). Free some space, or set "
            f"{CACHE_VARIABLE} to a folder on a larger disk. {again}"
        )
    unfound = _UNFOUND.search(output)
    package = next((name for name in unfound.groups() if name), "") if unfound else ""
    if any(sign in low for sign in _NO_CONNECTION):
        missing = f"{package} (for {what})" if package else what
        return (
            f"Could not fetch {missing}: the package index did not answer. Check the network and pip's own "
            f"configuration (`pip config list`). {again} pip's output is in {log}."
        )
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if package and "(from versions: none)" in low:
        return (
            f"Could not fetch {package} (for {what}): the package index offered no version of it at all. Either it "
            f"was not reached (check the network and `pip config list`), or it has nothing for {here} (3.10 to 3.13 "
            f"are built for). {again} pip's output is in {log}."
        )
    if package:
        return (
            f"pip finds no {package} for {here}, needed for {what}. Use a Python that it is built for (3.10 to 3.13), "
            f"or pass your own ComfyUI with --comfyui. pip's output, with the versions there are, is in {log}."
        )
    tail = "\n".join("  " + line for line in output.strip().splitlines()[-10:])
    return f"pip could not install {what}. {again} The whole output is in {log}; it ends with\n{tail}"


def quoted(command: Sequence[str]) -> str:
    """A command as a person would type it."""
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)

"""pip of one interpreter: run under the user's own configuration, its failures put into words."""

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

_NO_CONNECTION = re.compile(
    r"connection broken by|failed to establish a new connection|max retries exceeded|timed out|connecttimeouterror"
    r"|name or service not known|name resolution|getaddrinfo failed|proxyerror|incompleteread|connection reset by peer",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"no space left on device|not enough space on the disk|disk quota exceeded", re.IGNORECASE)
_UNFOUND = re.compile(r"No matching distribution found for ([^\s(]+)|for requirement ([^\s(]+) \(from versions: none\)")
_OTHER_HASH = re.compile(r"DO NOT MATCH THE HASHES.*?\n\s+(\S+).*?Got\s+(\w+)", re.DOTALL)


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
        code, output = run_logged(
            [str(self.python), "-m", "pip", *arguments],
            log=log,
            reporter=self.reporter,
            label=label,
            env=pip_environment(os.environ),
            pass_fds=self.inherit,
        )
        if code != 0:
            raise HostError(failure_text(output, what=what, log=log))


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
    return {name: value for name, value in result.items() if name not in ("PIP_TARGET", "PIP_PREFIX")}


def failure_text(output: str, *, what: str, log: Path) -> str:
    """pip's failure for the person at the terminal: what could not be had, why, what to do."""
    again = f"Run the same command again: finished stages are kept. pip's output is in {log}."
    if _DISK_FULL.search(output):
        free = shutil.disk_usage(log.parent).free / 1e9
        return (
            f"The disk is full: {what} did not fit ({free:.1f} GB free at {log.parent}). Free some space, or set "
            f"{CACHE_VARIABLE} to a folder on a larger disk. {again}"
        )
    if found := _OTHER_HASH.search(output):
        return (
            f"The file fetched for {found[1]} ({what}) has sha256 {found[2]}, which is not the one that this pack "
            "names. It was damaged on its way or is not the published one. Check which package index pip uses (`pip "
            f"config list`) and empty pip's cache (`pip cache purge`). {again}"
        )
    unfound = _UNFOUND.search(output)
    package = f"{unfound[1] or unfound[2]} (for {what})" if unfound else what
    if _NO_CONNECTION.search(output):
        return (
            f"Could not fetch {package}: the package index did not answer. Check the network and pip's own "
            f"configuration (`pip config list`). {again}"
        )
    if unfound:
        here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        return (
            f"Could not fetch {package}: the package index has none for {here}. Check the network and which index pip "
            "uses (`pip config list`); use a Python that it is built for (3.10 to 3.14), or pass your own ComfyUI with "
            f"--comfyui. {again}"
        )
    tail = "\n".join("  " + line for line in output.strip().splitlines()[-10:])
    return f"pip could not install {what}. {again} It ends with\n{tail}"


def requirement_lines(text: str) -> list[str]:
    """The requirements of a requirements file, without comments, blank lines and options."""
    lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def quoted(command: Sequence[str]) -> str:
    """A command as a person would type it."""
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)

"""Installed packages, read from their own records: what is there, and what is whole.

pip inside a virtual environment, under the user's own pip configuration, with its failures put into words.
"""

from __future__ import annotations

import csv
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

_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True)
class Package:
    """One installed package. `fault` is empty, or says what is missing of it."""

    name: str
    version: str
    info: Path
    fault: str


def normalise(name: str) -> str:
    """The form of a package name in which two spellings of it are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(line: str) -> str:
    """The normalised name a requirement line asks for; "" where it has none."""
    found = _NAME.match(line)
    return normalise(found[1]) if found else ""


def requirement_lines(text: str) -> list[str]:
    """The requirements of a requirements file, without comments, blank lines and options."""
    lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def site_packages(environment: Path) -> Path | None:
    """The folder of a virtual environment that holds its packages, None where there is none."""
    candidates = [environment / "Lib" / "site-packages", *sorted(environment.glob("lib/python*/site-packages"))]
    return next((path for path in candidates if path.is_dir()), None)


def installed(folder: Path | None) -> dict[str, Package]:
    """Every package in a site-packages folder by normalised name, each checked file by file against its record."""
    if folder is None:
        return {}
    found = (_read(folder, info) for info in sorted(folder.glob("[!~]*.dist-info")))
    return {package.name: package for package in found}


def remove_broken(folder: Path | None) -> list[str]:
    """Take away the records of half-installed packages, so that pip lays them anew instead of believing them.

    Also clears what an interrupted pip renamed to `~name`. Returns what was broken, in words.
    """
    if folder is None:
        return []
    broken = [package for package in installed(folder).values() if package.fault]
    for package in broken:
        shutil.rmtree(package.info)
    for remains in folder.glob("~*"):
        if remains.is_dir():
            shutil.rmtree(remains)
        else:
            remains.unlink()
    return [f"{package.name} ({package.fault})" for package in broken]


def _read(folder: Path, info: Path) -> Package:
    name, _, version = info.name[: -len(".dist-info")].partition("-")
    fault = _fault(folder, info / "RECORD") if (info / "METADATA").is_file() else "no METADATA"
    return Package(normalise(name), version, info, fault)


def _fault(folder: Path, record: Path) -> str:
    """The first file of a record that is missing or has another size. Compiled files come and go, and do not count."""
    try:
        with record.open(encoding="utf-8", newline="") as rows:
            for row in csv.reader(rows):
                if len(row) != 3 or row[0].endswith(".pyc"):
                    continue
                try:
                    size = os.stat(os.path.join(folder, row[0])).st_size  # noqa: PTH116,PTH118 - 40 000 of them
                except OSError:
                    return f"{row[0]} is missing"
                if row[2].isdigit() and int(row[2]) != size:
                    return f"{row[0]} has {size} of {row[2]} bytes"
    except FileNotFoundError:
        return "no RECORD"
    return ""


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

"""Installed packages, read from their own records: what is there, and what is whole."""

from __future__ import annotations

import csv
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

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

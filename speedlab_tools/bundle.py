"""`run.py bundle`: what is kept compiled on this machine as one file, and back out of it on another of the same kind.

A zip of the user folder's `speedlab/`, and a manifest: what the machine is, and each file's size and sha256. Compiled
code is run as it is, so that a bundle of another CPU or of other versions, or one that is not as it was written, is
refused as a whole. What then is missing is compiled at first use, as without a bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import runpy
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from speedlab.common.cpu import instructions, instructions_word
from speedlab.common.errors import SpeedLabError

from .host.base import cache_root, from_environment

SCHEMA = 1
MANIFEST = "manifest.json"
# Of whose version what is kept depends, beside Python and PyTorch, by how the names of folders begin.
_PACKAGES = {
    "inductor": ("triton",),
    "cudagraphs": ("triton",),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, TypeError, RuntimeError,
    RecursionError,
)  # fmt: skip
_MOST_OF_MANIFEST = 64 << 20
_BLOCK = 1 << 20


class BundleError(SpeedLabError):
    """A bundle cannot be made, or is not taken; the message says why."""


@dataclass(frozen=True)
class Machine:
    """What a bundle is for. `versions` are of Python and of packages."""

    system: str
    instructions: Sequence[str]
    versions: Mapping[str, str]

    def words(self) -> str:
        """For people."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.system}, {versions}, and CPUs of these: {' '.join(self.instructions)}"

    def other_than(self, other: Machine) -> list[str]:
        """In which words `other`, this machine, is another one than that of a bundle; none where it is the same."""
        there, here = set(self.instructions), set(other.instructions)
        versions = [
            f"{name} {self.versions[name]} there and {other.versions.get(name, 'none')} here"
            for name in self.versions
            if self.versions[name] != other.versions.get(name, "none")
        ]
        system = [] if self.system == other.system else [f"{self.system} there and {other.system} here"]
        return [
            *system,
            *([f"this CPU lacks {', '.join(sorted(there - here))}"] if there - here else []),
            *([f"that CPU lacks {', '.join(sorted(here - there))}"] if here - there else []),
            *versions,
        ]


def machine(backends: Sequence[str]) -> Machine:
    """This one, with the versions that these backends depend on."""
    packages = ["torch", *(name for backend in backends for name in _PACKAGES.get(backend, ()))]
    versions = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", **{name: _version(name) for name in packages}}
    return Machine(sys.platform, instructions(), versions)


def run(options: argparse.Namespace) -> int:
    """Pack or unpack."""
    if options.user is not None and not options.user.is_dir():
        raise BundleError(f"--user: {options.user} is no folder.")
    user = _user_folder() if options.user is None else options.user
    if options.what == "pack":
        files, made_for = pack(user, options.file)
        print(f"{options.file}: {_listed(files)}, for {made_for.words()}.")
        print("It holds compiled code, which is run as it is: unpack bundles only of people whom you trust.")
        return 0
    placed, there = unpack(options.file, user)
    print(f"{user / 'speedlab'}: {_listed(placed)} placed; {len(there)} were there already and stay.")
    return 0


def pack(user: Path, file: Path) -> tuple[dict[str, int], Machine]:
    """Write a bundle of what is kept in a user folder for this machine; returns its files' sizes and what it is for.
    Raises BundleError where nothing is kept, or the file cannot be written."""
    root = user / "speedlab"
    found = [path for path in sorted(root.rglob("*")) if _is_kept(path, root)]
    if not found:
        raise BundleError(
            f"Nothing is kept in {root} for this PyTorch and CPU yet. Run an image with Compile Model first, or name "
            "the user folder of another ComfyUI with --user."
        )
    listed: dict[str, dict[str, Any]] = {}
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for path in found:
                name = path.relative_to(root).as_posix()
                with path.open("rb") as source, archive.open(name, "w", force_zip64=True) as target:
                    listed[name] = _copied(source, target)
            made_for = machine(sorted({_backend_of(name) for name in listed}))
            text = json.dumps({"schema": SCHEMA, "machine": asdict(made_for), "files": listed}, indent=1)
            archive.writestr(MANIFEST, text)
        partial.replace(file)
    except OSError as error:
        raise BundleError(f"{file} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return {name: entry["size"] for name, entry in listed.items()}, made_for


def unpack(file: Path, user: Path) -> tuple[dict[str, int], list[str]]:
    """Put a bundle's files into a user folder; returns sizes of those that were placed, and names of those that were
    there before and stay. Raises BundleError, with nothing placed, for a bundle that is not for this machine, is
    damaged, or names a place elsewhere."""
    root = user / "speedlab"
    try:
        with zipfile.ZipFile(file) as archive:
            listed = _checked(file, archive, root)
            user.mkdir(parents=True, exist_ok=True)
            # On the same disk, so that a file is whole once it has its name.
            with tempfile.TemporaryDirectory(dir=user, prefix=".speedlab-bundle-") as folder:
                for number, (name, entry) in enumerate(listed.items()):
                    with archive.open(name) as source, (Path(folder) / str(number)).open("wb") as target:
                        if _copied(source, target, entry["size"]) != entry:
                            raise BundleError(f"{file} is damaged: {name} is not what was packed. {_INSTEAD}")
                return _placed(Path(folder), listed, root)
    except OSError as error:
        raise BundleError(f"{file} cannot be unpacked into {root}: {error}") from error
    except BundleError:
        raise
    except _UNREADABLE as error:
        raise BundleError(f"{file} is damaged, or no bundle ({error}). {_INSTEAD}") from error


_INSTEAD = "Nothing of it is used: what is missing is compiled here at first use."


def _checked(file: Path, archive: zipfile.ZipFile, root: Path) -> dict[str, dict[str, Any]]:
    """The files of a bundle that is for this machine, and names places below `root` alone."""
    with archive.open(MANIFEST) as source:
        manifest = json.loads(source.read(_MOST_OF_MANIFEST))
    if manifest["schema"] != SCHEMA:
        raise BundleError(f"{file} was made by another version of this pack. {_INSTEAD}")
    listed = {str(name): {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()}
    made_for = Machine(**manifest["machine"])
    other = made_for.other_than(machine(sorted({_backend_of(name) for name in listed})))
    if other:
        raise BundleError(f"{file} is for another machine: {'; '.join(other)}. {_INSTEAD}")
    inside = root.resolve()
    for name in listed:
        path, windows = PurePosixPath(name), PureWindowsPath(name)
        plain = path.parts == windows.parts and ".." not in path.parts and not path.is_absolute() and ":" not in name
        if not plain or str(path) != name or not (root / path).resolve().is_relative_to(inside):
            raise BundleError(f"{file} names a place outside of its folder: {name!r}. {_INSTEAD}")
    if sorted(archive.namelist()) != sorted([*listed, MANIFEST]):
        raise BundleError(f"{file} is damaged: its files are not those that its manifest lists. {_INSTEAD}")
    return listed


def _placed(folder: Path, listed: Mapping[str, Mapping[str, Any]], root: Path) -> tuple[dict[str, int], list[str]]:
    placed: dict[str, int] = {}
    for number, (name, entry) in enumerate(listed.items()):
        target = root / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / str(number)).replace(target)
            placed[name] = entry["size"]
    return placed, [name for name in listed if name not in placed]


def _copied(source: IO[bytes], target: IO[bytes], most: int | None = None) -> dict[str, Any]:
    """Size and sha256 of what was copied, and no more than a byte above `most`."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        size += len(block)
        if most is not None and size > most:
            break
        digest.update(block)
        target.write(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _is_kept(path: Path, root: Path) -> bool:
    """Whether a file is one of those that this machine would take: no lock, and of no other PyTorch or CPU."""
    parts = path.relative_to(root).parts
    if not path.is_file() or path.is_symlink() or path.suffix in (".tmp", ".lock") or "__pycache__" in parts:
        return False
    if parts[0] != "compiled":
        return True
    torch = re.sub(r"[^a-z0-9.]+", "-", _version("torch").lower())
    other_cpu = re.search(r"-cpu(-|$)", parts[1]) and not parts[1].endswith(f"-cpu-{instructions_word()}")
    return f"-torch{torch}-" in parts[1] and not other_cpu


def _backend_of(name: str) -> str:
    """`openvino` of `compiled/openvino-torch2.12.1-cpu-1a2b3c4d/....graph`."""
    return name.partition("/")[2].partition("-torch")[0]


def _version(package: str) -> str:
    """With PyTorch's the build, as in `2.12.1+cu130`, which the package's own data leaves out."""
    try:
        spec = importlib.util.find_spec(package) if package == "torch" else None
        if spec is not None and spec.origin is not None:
            return str(runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"])
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _user_folder() -> Path:
    host = from_environment()
    return cache_root() / "serve" / "user" if host.managed else host.comfyui / "user"


def _listed(sizes: Mapping[str, int]) -> str:
    return f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB"

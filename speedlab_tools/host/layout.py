"""The folders of a server: its base directory, this pack inside it, and the models it may read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import ServerError

PACK_FOLDER = "ComfyUI-SpeedLab"
KINDS = (
    "checkpoints",
    "configs",
    "loras",
    "vae",
    "vae_approx",
    "text_encoders",
    "diffusion_models",
    "clip_vision",
    "controlnet",
    "embeddings",
    "upscale_models",
)
# Folder names of older trees, and the kind they hold today.
_OLD_KINDS = {"clip": "text_encoders", "unet": "diffusion_models", "t2i_adapter": "controlnet"}
_COPY_MARK = ".copied-by-speedlab"


def make_base(base: Path) -> None:
    """Make the folders ComfyUI expects in a base directory. Raises ServerError that names the one that fails."""
    for name in (*(f"models/{kind}" for kind in KINDS), "input", "output", "temp", "user", "custom_nodes"):
        folder = base / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(f"The folder {folder} cannot be made ({error.strerror}).") from error


def bring_pictures(comfyui: Path, base: Path) -> None:
    """Copy the pictures that ComfyUI ships for Load Image into the base directory's input, where they are missing."""
    for picture in (comfyui / "input").glob("*.png"):
        target = base / "input" / picture.name
        if not target.exists():
            try:
                shutil.copyfile(picture, target)
            except OSError as error:
                raise ServerError(f"The file {target} cannot be written ({error.strerror}).") from error


def link_pack(pack: Path, base: Path) -> Path:
    """Make the pack appear in the base directory's custom_nodes, once. Returns where it appears.

    A symbolic link, on Windows a junction, and a copy where neither can be made.
    """
    nodes = base / "custom_nodes"
    source = pack.resolve()
    for entry in nodes.iterdir():
        if entry.resolve() == source:
            return entry
    target = nodes / PACK_FOLDER
    if target.is_symlink() or _is_junction(target):
        _unlink(target)
    elif (target / _COPY_MARK).is_file():
        shutil.rmtree(target)
    elif target.exists():
        raise ServerError(
            f"{target} is already there and is another copy of the pack. Move it away, or start that one."
        )
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        if not _junction(target, source):
            _copy(source, target)
    return target


def models_config(trees: Mapping[str, Path]) -> str:
    """An extra-model-paths file for models trees by section name: the kinds each tree has. JSON, which is YAML too."""
    config = {name: _kinds_of(tree) for name, tree in trees.items()}
    return json.dumps({name: kinds for name, kinds in config.items() if kinds}, indent=2, ensure_ascii=False)


def _kinds_of(tree: Path) -> dict[str, str]:
    if not tree.is_dir():
        raise ServerError(f"The models folder {tree} does not exist.")
    folders: dict[str, list[str]] = {}
    for folder in sorted(tree.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            # Absolute and without base_path: ComfyUI expands $NAMES in that one.
            folders.setdefault(_OLD_KINDS.get(folder.name, folder.name), []).append(str(folder.absolute()))
    return {kind: "\n".join(paths) for kind, paths in folders.items()}


def _is_junction(path: Path) -> bool:
    if sys.platform != "win32":
        return False
    try:
        return bool(path.readlink())
    except OSError:
        return False


def _unlink(path: Path) -> None:
    if sys.platform == "win32":
        path.rmdir()  # takes a junction or a link to a folder away and leaves what it points to
    else:
        path.unlink()


def _junction(target: Path, source: Path) -> bool:
    if sys.platform != "win32":
        return False
    command: Sequence[str] = ("cmd", "/c", "mklink", "/J", str(target), str(source))
    return subprocess.run(command, capture_output=True).returncode == 0


def _copy(source: Path, target: Path) -> None:
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", "output", "tests")
    try:
        shutil.copytree(source, target, ignore=ignored)
        (target / _COPY_MARK).touch()
    except OSError as error:
        raise ServerError(f"The pack could not be linked or copied to {target} ({error}).") from error

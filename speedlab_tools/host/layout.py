"""The folders of a server: its base directory, this pack inside it, and the models it may read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .base import ServerError

PACK_FOLDER = "ComfyUI-SpeedLab"
KINDS = (
    "checkpoints", "configs", "loras", "vae", "vae_approx", "text_encoders", "diffusion_models", "clip_vision",
    "controlnet", "embeddings", "upscale_models",
)  # fmt: skip
# Folder names of older trees, and the kind they hold today.
_OLD_KINDS = {"clip": "text_encoders", "unet": "diffusion_models", "t2i_adapter": "controlnet"}
_COPY_MARK = ".copied-by-speedlab"


def make_base(comfyui: Path, base: Path) -> None:
    """Make a base directory: the folders ComfyUI expects, and the images it ships for Load Image.

    Raises ServerError that names what cannot be made.
    """
    try:
        for name in (*(f"models/{kind}" for kind in KINDS), "input", "output", "temp", "user", "custom_nodes"):
            target = base / name
            target.mkdir(parents=True, exist_ok=True)
        for image in (comfyui / "input").glob("*.png"):
            target = base / "input" / image.name
            if not target.exists():
                shutil.copyfile(image, target)
    except OSError as error:
        raise ServerError(f"{target} cannot be made ({error.strerror}).") from error


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
    if _is_link(target):
        # On Windows a link to a folder goes like a folder; what it points to stays.
        target.rmdir() if sys.platform == "win32" else target.unlink()
    elif (target / _COPY_MARK).is_file():
        shutil.rmtree(target)
    elif target.exists():
        raise ServerError(
            f"{target} is already there and is another copy of the pack. Move it away, or start that one."
        )
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        junction = ("cmd", "/c", "mklink", "/J", str(target), str(source))
        if sys.platform != "win32" or subprocess.run(junction, capture_output=True).returncode != 0:
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


def _is_link(path: Path) -> bool:
    try:
        return bool(path.readlink())  # reads junctions too
    except OSError:
        return False


def _copy(source: Path, target: Path) -> None:
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", "output", "tests")
    try:
        shutil.copytree(source, target, ignore=ignored)
        (target / _COPY_MARK).touch()
    except OSError as error:
        raise ServerError(f"The pack could not be linked or copied to {target} ({error}).") from error

"""What a worker finds on its own machine: a ComfyUI, the Python that runs it, and the model files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ..client.files import link_model
from ..client.session import kept_models
from ..host.base import COMFYUI_VARIABLE, Host, HostError, cache_root, is_comfyui
from ..host.managed import ManagedHost
from .messages import ModelFile, WorkerSpec


def find_host(spec: WorkerSpec) -> Host:
    """The ComfyUI to run here: the driver's paths where they exist, COMFYUI_PATH, else the managed one.

    Nothing is installed. Raises HostError that says what to do on this machine.
    """
    comfyui, python = Path(spec.comfyui), Path(spec.python)
    if is_comfyui(comfyui) and python.is_file():
        return Host(comfyui, python, spec.managed, "where the driver has it")
    own = os.environ.get(COMFYUI_VARIABLE, "").strip()
    if own:
        if not is_comfyui(Path(own)):
            raise HostError(f"{COMFYUI_VARIABLE} names {own}, which is no ComfyUI.")
        return Host(Path(own), Path(sys.executable), False, f"from {COMFYUI_VARIABLE}")
    managed = ManagedHost(cache_root())
    reason = managed.missing()
    if reason:
        raise HostError(
            f"There is no ComfyUI at {comfyui} as on the driver's machine, {COMFYUI_VARIABLE} is not set, and the "
            f"managed one in {managed.root} is not ready ({reason}). Run `python run.py setup` there, or set "
            f"{COMFYUI_VARIABLE} before `ray start`."
        )
    return managed.host()


def show_models(files: Iterable[ModelFile], host: Host, base: Path) -> None:
    """Make the model files appear below `base`/models. Raises HostError that names the one that is not here.

    A file is the driver's where the same path has the same size; else one of that name and size in a models folder of
    this machine is taken, which the server reads by itself.
    """
    places = [kept_models(), *([] if host.managed else [host.comfyui / "models"])]
    for file in files:
        path = Path(file.path)
        known = [path, *(place / file.folder / path.name for place in places)]
        found = next((entry for entry in known if _size(entry) == file.size), None)
        if found is None:
            told = ", ".join(f"{entry} ({_in_words(_size(entry))})" for entry in known)
            raise HostError(f"The model file {path.name} of {file.size} bytes is not on this machine: {told}. Copy it.")
        link_model(found, base / "models" / file.folder)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _in_words(size: int | None) -> str:
    return "not there" if size is None else f"{size} bytes"

"""What was timed once on this machine, kept on disk: the next start takes the same way, so that a seed repeats.

One file in ComfyUI's user folder for each CPU, number of threads, PyTorch and version of this pack. It can be read: a
user who writes another of the choices into it has that one from the next start on, and one who deletes it has all
timed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from .. import __version__
from .cpu import cpu_name, instructions_word
from .errors import first_line

log = logging.getLogger(__name__)

T = TypeVar("T", str, int)


def measured_once(what: str, measure: Callable[[], T], choices: Collection[T]) -> T:
    """What `measure` found for `what` on this machine's CPU, now or in an earlier process: one of `choices`."""
    path = _file()
    if path is None:
        return measure()
    known = _read(path).get(what)
    choice = _one_of(choices, known)
    if choice is not None:
        log.info("SpeedLab: %s: %s, as measured before (%s).", what, choice, path)
        return choice
    if known is not None:
        log.warning("SpeedLab: %s has %r for %s, which is none of %s: it is measured anew.", path, known, what, choices)
    found = measure()
    held = _read(path)
    choice = _one_of(choices, held.get(what))
    if choice is not None:
        log.info("SpeedLab: %s: %s, as another process measured meanwhile (%s).", what, choice, path)
        return choice
    _write(path, {**held, what: found})
    return found


def _one_of(choices: Collection[T], known: Any) -> T | None:
    return next((choice for choice in choices if type(known) is type(choice) and known == choice), None)


def folder() -> Path | None:
    """Where the files lie; None where no ComfyUI is loaded."""
    paths = sys.modules.get("folder_paths")
    return None if paths is None else Path(paths.get_user_directory()) / "speedlab" / "measured"


def _machine() -> dict[str, str]:
    import torch

    return {
        "cpu": cpu_name(),
        "instructions": instructions_word(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "speedlab": __version__,
    }


def _file() -> Path | None:
    root, machine = folder(), _machine()
    if root is None:
        return None
    name = re.sub(r"[^a-z0-9.]+", "-", f"{machine['cpu']}-torch{machine['torch']}".lower())
    return root / f"{name}-{hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:8]}.json"


def _read(path: Path) -> dict[str, Any]:
    """The choices in a file; none where there is no file, or another one under this name."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["machine"] == _machine():
            return dict(held["choices"])
        problem = "it is of another machine or other versions"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = first_line(error)
    log.warning("SpeedLab: what was measured before in %s is not taken (%s); it is measured anew.", path, problem)
    return {}


def _write(path: Path, choices: dict[str, Any]) -> None:
    held = {"machine": _machine(), "choices": choices}
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(held, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        log.warning("SpeedLab: %s cannot be written, so that it is measured anew after a restart: %s", path, error)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)

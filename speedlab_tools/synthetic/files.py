"""Writing safetensors files tensor by tensor, so that a checkpoint larger than the free memory can be made."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .weights import Weight, draw

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""

# Part of every file's description: raise it when the same spec begins to give other numbers.
RECIPE = 1
ABOUT = "Made by SpeedLab: random weights, for tests and benchmarks. Pictures made with it are noise."
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def describe(kind: str, **fields: object) -> dict[str, str]:
    """Metadata of a synthetic file: what it is, and the key by which an equal one is recognised."""
    identity = json.dumps({"kind": kind, "recipe": RECIPE, **fields}, sort_keys=True)
    return {
        "speedlab": identity,
        "modelspec.title": f"SpeedLab {kind} (random weights)",
        "modelspec.description": ABOUT,
    }


def is_current(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a complete file with exactly this metadata lies at `path`."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:  # refuses a truncated file
            found = file.metadata() or {}
    except SafetensorError:
        log.info("%s is damaged and will be written again", path)
        return False
    return dict(found) == dict(metadata)


def write_weights(
    path: Path,
    weights: Mapping[str, Weight],
    seed: int,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> Path:
    """Draws every weight and writes it; the file appears under its name only when it is whole.

    An equal complete file is left alone. Raises OSError, with the path and a remedy, when it cannot be written.
    """
    if is_current(path, metadata):
        log.info("%s is already there", path)
        return path
    header, total = _header(weights, dtype, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path, len(header) + total)
        with _appearing_whole(path) as file:
            file.write(header)
            done = 0
            for name, weight in weights.items():
                tensor = draw(name, weight, seed, dtype, "cpu")
                done += file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write {path}: {reason}. Free some space or choose another folder") from error
    return path


@contextmanager
def _appearing_whole(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name beside `path`, renamed at the end; nothing is left after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        try:
            yield file
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
    temporary.replace(path)


def _header(weights: Mapping[str, Weight], dtype: torch.dtype, metadata: Mapping[str, str]) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, weight in weights.items():
        stored = torch.int64 if weight.integer else dtype
        end = offset + math.prod(weight.shape) * stored.itemsize
        entries[name] = {"dtype": _NAMES[stored], "shape": list(weight.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text, offset


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")

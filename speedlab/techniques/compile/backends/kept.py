"""Graphs of networks, and what was measured of networks, kept on disk and found again by what they were made from.

A file is named by a hash of structure, code, shapes, types and versions; it holds that name and a digest too, so that a
file that is damaged, or another one's under this name, is noticed and made anew. Weights are never in it: a LoRA or
another checkpoint of the family takes the same graph.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from . import CompileOptions

log = logging.getLogger(__name__)

_SCHEMA = 4
GRAPH = "graph"
_DIGEST = hashlib.sha256().digest_size


class Kept(NamedTuple):
    """A graph, or what was measured, as bytes, and whether it was on disk."""

    data: bytes
    from_disk: bool = False


def weights_of(target: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every weight of a network by its name in a graph."""
    return {name: tensor.detach() for name, tensor in (*target.named_parameters(), *target.named_buffers())}


def digest_of(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of every bit of weights in the CPU's memory."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept_or_made(
    target: torch.nn.Module,
    options: CompileOptions,
    versions: Mapping[str, str],
    make: Callable[[], bytes],
    kind: str = GRAPH,
) -> Kept:
    """What `make` gives. From `options.folder` where it was made before with these versions, else put there. `kind`
    ends the file's name."""
    if options.folder is None:
        return Kept(make())
    key = _key(target, options, versions)
    path = options.folder / f"{key}.{kind}"
    known = _read(path, key.encode())
    if known is not None:
        return Kept(known, from_disk=True)
    data = make()
    _write(path, key.encode(), data)
    return Kept(data)


def forget(target: torch.nn.Module, options: CompileOptions, versions: Mapping[str, str]) -> None:
    """Remove the graph that `kept_or_made` would read: one that is whole, and that its library cannot read all the
    same."""
    if options.folder is not None:
        (options.folder / f"{_key(target, options, versions)}.{GRAPH}").unlink(missing_ok=True)


def _read(path: Path, key: bytes) -> bytes | None:
    """What a file holds; None where there is none, or one that is not as it was written under this name."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("SpeedLab: what is kept in %s cannot be read (%s); it is made anew.", path, error)
        return None
    held, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(key + held).digest() != digest:
        log.warning("SpeedLab: what is kept in %s is damaged, or another one's; it is made anew.", path)
        return None
    return held


def _write(path: Path, key: bytes, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data + hashlib.sha256(key + data).digest())
        partial.replace(path)
    except OSError as error:
        log.warning("SpeedLab: %s cannot be written, so that it is made anew after a restart: %s", path, error)
    finally:
        partial.unlink(missing_ok=True)


def _key(target: torch.nn.Module, options: CompileOptions, versions: Mapping[str, str]) -> str:
    """A hash of what a graph depends on: structure and code, shapes and types of weights and inputs, and versions."""
    identity = {
        "schema": _SCHEMA,
        "versions": {"torch": torch.__version__, **versions},
        "structure": str(target),
        "code": _code_of(target),
        "settings": [_plain_values(module) for module in target.modules()],
        "weights": [(name, str(t.dtype), list(t.shape)) for name, t in weights_of(target).items()],
        "inputs": [(name, str(t.dtype), t.ndim) for name, t in zip(options.names, options.example, strict=False)],
        "fixed": [
            [n for d, n in enumerate(t.shape) if d not in c]
            for t, c in zip(options.example, options.changing, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _code_of(target: torch.nn.Module) -> list[str]:
    """Hashes of the files that define the layers and what else is traced, those of PyTorch left out."""
    kinds = {type(module) for module in target.modules() if not type(module).__module__.startswith("torch.")}
    files = {inspect.getsourcefile(kind) for kind in (*kinds, *getattr(target, "CODE", ()))}
    return sorted(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file)


def _plain_values(module: torch.nn.Module) -> list[tuple[str, str]]:
    """Sizes, heads, groups and switches of a module, which `str(module)` leaves out."""
    values = ((name, value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str)))
    return sorted((name, str(value)) for name, value in values)

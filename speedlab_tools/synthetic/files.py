"""Parameters by shape and scale, and the deterministic draw that turns one into a tensor.

Writing safetensors files tensor by tensor, so that a checkpoint larger than the free memory can be made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from speedlab.common.errors import SpeedLabError

Adjust = Callable[[torch.Tensor], None]

# Gains that keep a unit-variance signal at unit variance behind each activation (1 / rms of the activation of a
# standard normal variable).
AFTER_SILU = 1.677
AFTER_GELU = 1.533
AFTER_RELU = math.sqrt(2.0)
# Standard deviation that a residual branch adds to a stream of about 1: deep stacks stay finite in half precision.
RESIDUAL = 0.4
# Query and key gain: logits spread enough for attention to choose tokens rather than to average them.
SHARP = 1.25


@dataclass(frozen=True)
class Weight:
    """One parameter: drawn uniformly with this mean and standard deviation, then edited in place by `adjust`."""

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    adjust: Adjust | None = None
    integer: bool = False  # a table of positions 0, 1, 2, ... instead of a draw


class Layout(dict[str, Weight]):
    """Parameter names of a network in file order, filled layer by layer."""

    def linear(self, name: str, fan_in: int, fan_out: int, gain: float = 1.0, bias: bool = True) -> None:
        """A fully connected layer whose output has `gain` times the rms of its input."""
        self._layer(name, (fan_out, fan_in), fan_in, gain, bias)

    def conv(self, name: str, fan_in: int, fan_out: int, kernel: int = 3, gain: float = 1.0, bias: bool = True) -> None:
        """A square 2D convolution, scaled like `linear`."""
        self._layer(name, (fan_out, fan_in, kernel, kernel), fan_in * kernel * kernel, gain, bias)

    def norm(self, name: str, channels: int) -> None:
        """A normalisation with an affine part near identity."""
        self[f"{name}.weight"] = Weight((channels,), std=0.05, mean=1.0)
        self[f"{name}.bias"] = Weight((channels,), std=0.02)

    def add(self, prefix: str, other: Layout) -> None:
        """Every parameter of `other`, below `prefix`."""
        self.update({prefix + name: weight for name, weight in other.items()})

    def _layer(self, name: str, shape: tuple[int, ...], fan_in: int, gain: float, bias: bool) -> None:
        self[f"{name}.weight"] = Weight(shape, std=gain / math.sqrt(fan_in))
        if bias:
            self[f"{name}.bias"] = Weight(shape[:1], std=0.02)


def draw(name: str, weight: Weight, seed: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """The tensor of one parameter, the same for the same (name, seed) on the same kind of device.

    Uniform rather than normal numbers: they come from the generator's integers by exact arithmetic, so the bytes do
    not depend on the thread count, the CPU's vector width or a library's logarithm.
    """
    if weight.integer:
        return torch.arange(math.prod(weight.shape), device=device).reshape(weight.shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    tensor = torch.rand(weight.shape, generator=generator, device=device, dtype=torch.float32)
    tensor.sub_(0.5).mul_(weight.std * math.sqrt(12.0)).add_(weight.mean)
    if weight.adjust is not None:
        weight.adjust(tensor)
    return tensor.to(dtype)


log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""

# Part of every file's description: raise it when the same spec begins to give other numbers.
RECIPE = 1
ABOUT = "Made by SpeedLab: random weights, for tests and benchmarks. Images made with it are noise."
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


def refuse_foreign(path: Path) -> None:
    """Raise SpeedLabError where a model of somebody else lies at `path`, which would be lost."""
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            ours = "speedlab" in (file.metadata() or {})
    except SafetensorError:
        ours = path.suffix == ".safetensors"  # one of ours that was cut off
    if not ours:
        raise SpeedLabError(
            f"{path} is there and was not made by this pack: it would be lost. Choose another folder or name."
        )


def write_weights(
    path: Path,
    weights: Mapping[str, Weight],
    seed: int,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> Path:
    """Draws every weight and writes it; the file appears under its name only when it is whole.

    An equal complete file is left alone. Raises OSError, with the path and a remedy, when it cannot be written, and
    SpeedLabError where a model lies there that this pack did not make.
    """
    if is_current(path, metadata):
        log.info("%s is already there", path)
        return path
    refuse_foreign(path)
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

"""What each way of offloading will need at its peak, phase by phase, before anything runs."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..vae.precision import starting_dtype
from .activations import PictureSize, decode_bytes, sampling_bytes, text_bytes
from .layers import streamed_bytes, weight_bytes
from .placement import Offload

OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")  # from the fastest on
_TABLE = Path(__file__).with_name("activations.csv")


@dataclass(frozen=True)
class Part:
    """One model of a plan and its phase. Bytes; `streamed` is what sequential offload keeps of the weights."""

    phase: str
    weights: int
    streamed: int
    activations: int
    on_device: bool = True


@dataclass(frozen=True)
class Phase:
    """What is on the device at the worst moment of a phase, in bytes."""

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Prediction:
    """A way of offloading, and each of its phases in order."""

    offload: Offload
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        return max(phase.total for phase in self.phases)

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def parts_of(model: Any, clip: Any | None, vae: Any | None, size: PictureSize) -> tuple[Part, ...]:
    """Count weights by their dtypes and activations for `size`. A part on another device than the UNet needs nothing.

    Sampling is counted with guidance: cond and uncond of all pictures in one forward.
    """
    device = model.load_device
    parts = []
    if clip is not None:
        stage = clip.cond_stage_model
        parts.append(
            _part("text encoding", "text", stage, text_bytes(clip), device, clip.patcher.load_device == device)
        )
    parts.append(_part("sampling", "unet", model.model, sampling_bytes(model, size), device))
    if vae is not None:
        # VAE Decode may run a second module of these weights in another dtype.
        dtype = starting_dtype(vae, "auto")
        counted = decode_bytes(vae, size, dtype)
        part = _part("decoding", "vae", vae.first_stage_model, counted, device, vae.device == device)
        share = dtype.itemsize / vae.vae_dtype.itemsize
        parts.append(replace(part, weights=round(part.weights * share), streamed=round(part.streamed * share)))
    return tuple(parts)


def _part(phase: str, kind: str, module: Any, counted: int, device: Any, on_device: bool = True) -> Part:
    activations = round(counted * measured_factor(device.type, kind, counted))
    return Part(phase, weight_bytes(module), streamed_bytes(module), activations, on_device)


def predict(parts: Iterable[Part], offload: Offload) -> Prediction:
    """The phases of a plan. With `none` all weights stay; with the others each phase has its own alone."""
    here = [part for part in parts if part.on_device]
    together = sum(part.weights for part in here)
    weights = {
        "none": lambda part: together,
        "model": lambda part: part.weights,
        "sequential": lambda part: min(part.streamed, part.weights),
    }[offload]
    return Prediction(offload, tuple(Phase(part.phase, weights(part), part.activations) for part in here))


@lru_cache(maxsize=1)
def _measured() -> Mapping[tuple[str, str], tuple[tuple[float, float], ...]]:
    """(device, part) -> pairs of log(counted bytes) and measured / counted, in order."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with _TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            counted, measured = int(row["counted_bytes"]), int(row["measured_bytes"])
            found.setdefault((row["device"], row["part"]), []).append((math.log(counted), measured / counted))
    return {key: tuple(sorted(rows)) for key, rows in found.items()}


def is_measured(device_type: str) -> bool:
    """Whether the committed table has measurements of this kind of device."""
    return any(device == device_type for device, _ in _measured())


def measured_factor(device_type: str, part: str, counted: int) -> float:
    """What was measured over what is counted, for a part on a kind of device; 1 where the table has nothing.

    Kernels take workspace that counting tensors does not see; oneDNN on a CPU re-orders what convolutions read and
    write. Between two sizes of the table the factor is interpolated, outside of it the nearest holds.
    """
    rows = _measured().get((device_type, part))
    if not rows or counted <= 0:
        return 1.0
    at = math.log(counted)
    if at <= rows[0][0]:
        return rows[0][1]
    for (left, low), (right, high) in itertools.pairwise(rows):
        if at <= right:
            return low + (high - low) * (at - left) / max(right - left, 1e-9)
    return rows[-1][1]

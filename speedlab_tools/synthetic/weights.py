"""Parameters by shape and scale, and the deterministic draw that turns one into a tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

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
    not depend on the thread count, the processor's vector width or a library's logarithm.
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

"""The compile backends, one file each, imported on use.

Every file has `NAME`, `SUPPORTED_MODES`, `REMEDY` (what to do where it fails), `available() -> (bool, reason)` and
`compile(target, options)`. Those of TENSOR_PROGRAMS take a module of tensors in, tensor out and compile it as a whole;
they say whether a program follows weights that change (`FOLLOWS_WEIGHTS`), whether it is of one size (`FIXED_SHAPES`),
whether it may have more inputs than the network and several results, then given as a tuple (`SEVERAL_TENSORS`), and may
freeze weights (`CAN_FREEZE`) and compute in 8 bits (`CAN_QUANTISE`). Those of GRAPH_BY_GRAPH compile Python functions
graph by graph and so know patches, ControlNet and weights that change; they have `uses_cuda_graphs(options)`, and
`compile` gets the kind of the module too. FOR_VAE are those that Compile VAE offers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..rounding import Range

NAMES = (
    "inductor",
    "cudagraphs",
    "jit_trace",
    "onnxruntime",
    "openvino",
    "onediff_nexfort",
    "onediff_oneflow",
    "stable_fast",
    "tensorrt",
)
GRAPH_BY_GRAPH = ("inductor", "cudagraphs")
TENSOR_PROGRAMS = tuple(name for name in NAMES if name not in GRAPH_BY_GRAPH)
FOR_VAE = ("inductor", "onnxruntime", "jit_trace")
QUANTIZE = ("off", "int8")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Picture:
    """What a tensor [B, C, H, W] of a program looks like beside the first input: its channels, and its height and width
    by that one's, so many times as large or halved so often."""

    channels: int
    times: int = 1
    halved: int = 0

    def shape(self, like: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Its shape where the first input is of shape `like`; each halving rounds up."""
        height, width = (-(-side * self.times // 2**self.halved) for side in like[2:])
        return like[0], self.channels, height, width


@dataclass(frozen=True)
class CompileOptions:
    """What a backend gets: the node's settings, the device and type to compute in, and for tensor programs the
    inputs to trace with, their names and dimensions that may change, those among them that follow the first one's
    size, what the results look like, and a folder to keep files in. `ranges` are of the inputs of layers that run in
    8 bits, by their weights' names; `computes_in` is a type to compute in that is not the network's."""

    mode: str = "default"
    dynamic: bool | None = None
    freeze: bool = False
    device: Any = None
    dtype: Any = None
    example: tuple[Any, ...] = ()
    changing: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ("x", "timesteps", "context", "y")
    following: Mapping[str, Picture] = field(default_factory=dict)
    results: tuple[Picture, ...] = (Picture(4),)
    folder: Path | None = None
    quantize: str = "off"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    computes_in: Any = None


def load(name: str) -> ModuleType:
    """The backend's module. Raises ValueError for a name that is none of NAMES."""
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(NAMES)}")
    return importlib.import_module(f".{name}", __name__)


def usable(backend: ModuleType, options: CompileOptions) -> tuple[bool, str]:
    """Whether a backend can do here what is asked of it, else why not and what to do."""
    able, reason = backend.available()
    uses_cuda_graphs = getattr(backend, "uses_cuda_graphs", None)
    if not able or uses_cuda_graphs is None or not uses_cuda_graphs(options):
        return able, reason
    from .dynamo import graphs_refused

    reason = graphs_refused(options.device)
    return not reason, f"{reason}, or choose inductor in the mode default" if reason else ""

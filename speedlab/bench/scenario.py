"""What a scenario is made of: the types behind the table in `scenarios.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .graph import Graph
from .plans import Plan

SOURCES = {
    "S0": "a ComfyUI timing and Nsight study of an SDXL checkpoint",
    "S1": '"Ultimate guide to optimizing Stable Diffusion XL"',
    "S2": "a GPU and CPU benchmark of Stable Diffusion",
    "S3": "the diffusers memory guide",
    "S4": "a general guide to faster Stable Diffusion",
}
FAMILIES = ("sd15", "sdxl", "refiner")


@dataclass(frozen=True)
class NeededFile:
    """A model file. `kind` is what a substitution replaces, `default` the name in the shipped graph."""

    kind: str
    folder: str
    default: str
    where: str
    optional: bool = False


@dataclass(frozen=True)
class Prompt:
    """A text with its seed. `negative` None means no negative prompt: zeroed conditioning."""

    name: str
    text: str
    seed: int
    negative: str | None = None


@dataclass(frozen=True)
class Settings:
    """What is sampled: sizes in pixels, `detail` and `decoder` as the nodes name them."""

    prompts: tuple[Prompt, ...]
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg: float = 8.0
    sampler: str = "euler"
    scheduler: str = "normal"
    batch: int = 1
    detail: str = "timing"
    warmup: int = 0
    repeats: int = 1
    chart: bool = False


@dataclass(frozen=True)
class Published:
    """A figure of the source and the device it was measured on."""

    figure: str
    device: str


@dataclass(frozen=True)
class Scenario:
    """One row of the table: a drag-in workflow, the same graph headless, and what both need.

    `packages` are Python modules beside ComfyUI's own that it cannot run without.
    """

    id: str
    source: str
    title: str
    shows: str
    family: str
    files: tuple[NeededFile, ...]
    settings: Settings
    published: tuple[Published, ...]
    plan: Plan
    build: Callable[[Scenario], Graph]
    packages: tuple[str, ...] = ()

    def graph(self) -> Graph:
        """The scenario's graph with its own settings."""
        return self.build(self)

    def with_settings(self, settings: Settings) -> Scenario:
        """The same scenario with other settings."""
        return replace(self, settings=settings)

    def file(self, kind: str) -> NeededFile | None:
        """The needed file of that kind, or None."""
        return next((entry for entry in self.files if entry.kind == kind), None)

"""Command-line settings laid over a scenario's own: sizes, steps, seed and model files."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ..client.errors import BenchError
from .scenario import NeededFile, Scenario, Settings

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Overrides:
    """What the user changed; None keeps the scenario's value."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    batch: int | None = None
    seed: int | None = None
    repeats: int | None = None
    warmup: int | None = None

    def check(self) -> None:
        """BenchError for a value that no node would take, before anything is started."""
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (value < 64 or value % 8):
                raise BenchError(f"--{name} {value}: sizes are multiples of 8 from 64 on")
        for name, least in (("steps", 1), ("batch", 1), ("repeats", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BenchError(f"--{name} {value}: {least} is the least")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise BenchError(f"--seed {self.seed}: seeds run from 0 to {MAX_SEED}")


def _with_overrides(settings: Settings, overrides: Overrides) -> Settings:
    changed = {
        name: getattr(overrides, name)
        for name in ("width", "height", "steps", "batch", "repeats", "warmup")
        if getattr(overrides, name) is not None
    }
    if overrides.seed is not None:
        changed["prompts"] = tuple(dataclasses.replace(prompt, seed=overrides.seed) for prompt in settings.prompts)
    return dataclasses.replace(settings, **changed)


def with_file(scenario: Scenario, kind: str, name: str) -> Scenario:
    """The scenario with another model file of that kind; a kind it does not need yet is added."""
    known = scenario.file(kind)
    if known is None:
        extra = NeededFile(kind, f"models/{kind}", name, "given on the command line")
        return dataclasses.replace(scenario, files=(*scenario.files, extra))
    files = tuple(dataclasses.replace(entry, default=name) if entry is known else entry for entry in scenario.files)
    return dataclasses.replace(scenario, files=files)


def adapt(
    scenario: Scenario, overrides: Overrides, checkpoint: str | None = None, others: Mapping[str, str] | None = None
) -> Scenario:
    """The scenario as the user wants it run, with model files that the server knows by these names.

    `others` are by kind. A VAE takes the place of any checkpoint's own; other kinds go where a scenario needs them.
    """
    scenario = scenario.with_settings(_with_overrides(scenario.settings, overrides))
    if checkpoint is not None:
        scenario = with_file(scenario, "checkpoint", checkpoint)
    for kind, name in (others or {}).items():
        if kind == "vae" or scenario.file(kind) is not None:
            scenario = with_file(scenario, kind, name)
    return scenario


def overrides_of(args: argparse.Namespace) -> Overrides:
    """The checked settings of the command line."""
    overrides = Overrides(args.width, args.height, args.steps, args.batch, args.seed, args.repeats, args.warmup)
    overrides.check()
    return overrides

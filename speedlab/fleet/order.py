"""What one call asks for: tasks, model files and settings, from the command line."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bench.models import ModelChoice, choose_models
from ..bench.overrides import Overrides, adapt, overrides_of
from ..bench.scenario import Scenario
from ..bench.scenarios import find
from ..bench.small import MARK
from .errors import FleetError
from .messages import ModelFile
from .prompts import read_prompts
from .tasks import Work, cell_work, prompt_work

_SETTINGS = ("width", "height", "steps", "batch", "cfg", "sampler", "scheduler", "warmup", "repeats")


@dataclass(frozen=True)
class Order:
    """`asked` names, for a reader, all that the results depend on."""

    work: Work
    files: tuple[ModelFile, ...]
    asked: dict[str, Any]
    notes: tuple[str, ...]


def order_of(args: argparse.Namespace) -> Order:
    """Read and check everything that needs no cluster. Raises FleetError, BenchError, UnknownScenarioError."""
    scenario, overrides = find(args.scenario), overrides_of(args)
    prompts_seed = overrides.seed if args.prompts is not None else None
    if prompts_seed is not None:
        overrides = replace(overrides, seed=None)
    args.server = None
    choice = choose_models(args, [scenario])
    wanted = adapt(scenario, overrides, choice.checkpoints.get(scenario.id), choice.others)
    files = _files(choice)
    models = {f"{file.folder}/{Path(file.path).name}": _identity(file) for file in files}
    asked = {
        "scenario": scenario.id + (MARK if args.small else ""),
        **_settings(wanted, overrides),
        "models": models,
    }
    if args.cells:
        if args.negative is not None:
            raise FleetError("--negative goes with --prompts; --cells runs the scenario's own prompts.")
        return Order(
            cell_work(wanted, models=models, small=args.small), files, {**asked, "prompts": None}, choice.notes
        )
    first = wanted.settings.prompts[0]
    seed = first.seed if prompts_seed is None else prompts_seed
    negative = first.negative if args.negative is None else args.negative
    prompts = read_prompts(args.prompts, seed=seed, negative=negative)
    work = prompt_work(wanted, prompts, models=models, small=args.small)
    told = {"seed": seed, "negative": negative, "prompts": args.prompts.name, "prompts_sha256": _sha256(args.prompts)}
    return Order(work, files, {**asked, **told}, choice.notes)


def _settings(scenario: Scenario, overrides: Overrides) -> Mapping[str, Any]:
    settings = scenario.settings
    named = {name: getattr(settings, name) for name in _SETTINGS}
    return named if overrides.seed is None else {**named, "seed": overrides.seed}


def _files(choice: ModelChoice) -> tuple[ModelFile, ...]:
    return tuple(
        ModelFile(folder, str(path), path.stat().st_size) for folder, some in choice.files.items() for path in some
    )


def _identity(file: ModelFile) -> list[int]:
    """Size and time of change: a file that was written anew is another one."""
    return [file.size, Path(file.path).stat().st_mtime_ns]


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FleetError(f"--prompts: cannot read {path}: {error.strerror or error}") from error

"""What one call asks for: tasks, model files and settings, from the command line.

The prompts of a fleet: a text file with one a line, or JSON lines that may name a negative prompt and a seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bench.models import ModelChoice, choose_models
from ..scenarios.catalog import find
from ..scenarios.overrides import MARK, MAX_SEED, Overrides, adapt, overrides_of
from ..scenarios.scenario import Prompt, Scenario
from .messages import FleetError, ModelFile
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


JSON_SUFFIXES = (".jsonl", ".ndjson")
FIELDS = ("prompt", "negative", "seed")
MOST_PROMPTS = 1_000_000


def read_prompts(path: Path, *, seed: int, negative: str | None) -> tuple[Prompt, ...]:
    """The prompts of a file in order. Blank lines do not count. Raises FleetError that names the line.

    A prompt without a seed of its own gets `seed` plus its place (from 0), one without a negative prompt `negative`.
    A blank negative prompt is none: zeroed conditioning.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FleetError(f"--prompts: {path} is no UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise FleetError(f"--prompts: cannot read {path}: {error.strerror or error}") from error
    # Not splitlines(): that would also split at separators which may stand inside a prompt.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise FleetError(f"--prompts: {path} holds no prompt. Write one on each line.")
    if len(lines) > MOST_PROMPTS:
        raise FleetError(f"--prompts: {path} holds {len(lines)} prompts; a fleet takes up to {MOST_PROMPTS}.")
    as_json = path.suffix.lower() in JSON_SUFFIXES
    prompts = []
    for place, (number, line) in enumerate(lines):
        given: dict[str, Any] = _fields(line, f"{path}, line {number}") if as_json else {"prompt": line}
        own = given.get("negative", negative)
        prompts.append(
            Prompt(
                name=f"{place + 1:05d}",
                text=given["prompt"],
                seed=given.get("seed", (seed + place) % (MAX_SEED + 1)),
                negative=own if own and own.strip() else None,
            )
        )
    return tuple(prompts)


def _fields(line: str, where: str) -> dict[str, Any]:
    """One JSON line, checked."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FleetError(f'{where}: this is no JSON object: write {{"prompt": "a lighthouse", "seed": 1}}.') from error
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str) or not given["prompt"].strip():
        raise FleetError(f'{where}: "prompt" is missing or no text.')
    if not isinstance(given.get("negative"), (str, type(None))):
        raise FleetError(f'{where}: "negative" is a text, or null for none.')
    if not _is_text(given["prompt"]) or not _is_text(given.get("negative") or ""):
        raise FleetError(f"{where}: half a character (a lone surrogate) is no text.")
    unknown = sorted(set(given) - set(FIELDS))
    if unknown:
        raise FleetError(f"{where}: there is no field {unknown[0]!r}; a line has {', '.join(FIELDS)}.")
    seed = given.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise FleetError(f'{where}: "seed" is a whole number from 0 to {MAX_SEED}.')
    return given


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

"""The prompts of a fleet: a text file with one a line, or JSON lines that may name a negative prompt and a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..bench.overrides import MAX_SEED
from ..bench.scenario import Prompt
from .errors import FleetError

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

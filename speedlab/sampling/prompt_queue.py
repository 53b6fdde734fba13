"""Many prompts as one list, so that a graph encodes all of them before it samples the first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.core import core_nodes, progress_bar
from ..common.errors import SpeedLabError
from ..measure.timeline import phase
from ..models.text import device_of, encode, require_clip

LARGEST_SEED = 2**64 - 1
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class QueueText:
    """What the user wrote, read: a seed for every prompt; `negative` None means zeroed conditioning."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str | None


@dataclass(frozen=True)
class EncodedQueue:
    """CONDITIONING and seed of every prompt, in order."""

    positive: list[Any]
    negative: list[Any]
    seeds: list[int]


def read_queue(prompts: str, negative: str, seeds: str) -> QueueText:
    """Read the three texts. Raises SpeedLabError that names the line of what cannot be used."""
    lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
    if not lines:
        raise SpeedLabError("Prompt Queue has no prompts: write one on each line.")
    return QueueText(lines, _seed_for_each(lines, _read_seeds(seeds)), negative if negative.strip() else None)


def encode_queue(clip: Any, text: QueueText) -> EncodedQueue:
    """Encode all prompts, each exactly as alone; cancels between two prompts. The text encoder is not changed."""
    import comfy.model_management as mm

    require_clip(clip)
    progress = progress_bar(len(text.prompts))
    positive: list[Any] = []
    negative: list[Any] = []
    shared: Any | None = None
    for index, prompt in enumerate(text.prompts):
        mm.throw_exception_if_processing_interrupted()
        # The profile of image n takes the time of item n. The one negative prompt is encoded with the first.
        with phase("text_encode", device_of(clip), list_index=index):
            positive.append(encode(clip, prompt))
            if text.negative is None:
                negative.append(zeroed(positive[-1]))
            else:
                shared = encode(clip, text.negative) if shared is None else shared
                negative.append(shared)
        progress.update(1)
    return EncodedQueue(positive, negative, list(text.seeds))


def zeroed(conditioning: Sequence[Any]) -> list[Any]:
    """Conditioning with embedding and pooled output set to zero, as core's ConditioningZeroOut makes it."""
    return list(core_nodes().ConditioningZeroOut().zero_out(conditioning)[0])


def _read_seeds(text: str) -> tuple[int, ...]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word:
            continue
        # Python refuses to read numbers of thousands of digits; no seed has more than twenty.
        if not _WHOLE_NUMBER.fullmatch(word) or len(word) > 40:
            raise SpeedLabError(
                f"seeds, line {number}: '{word[:40]}' is not a whole number. Write one seed for all prompts, or one on "
                "each line."
            )
        seed = int(word)
        if not 0 <= seed <= LARGEST_SEED:
            raise SpeedLabError(f"seeds, line {number}: {seed} is out of range; seeds run from 0 to {LARGEST_SEED}.")
        found.append(seed)
    if not found:
        raise SpeedLabError("Prompt Queue has no seed: write one for all prompts, or one on each line.")
    return tuple(found)


def _seed_for_each(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[int, ...]:
    if len(seeds) == 1:
        return tuple(seeds) * len(prompts)
    if len(seeds) != len(prompts):
        raise SpeedLabError(
            f"Prompt Queue has {len(prompts)} prompts and {len(seeds)} seeds: write one seed for all prompts, or as "
            "many as there are prompts."
        )
    return tuple(seeds)

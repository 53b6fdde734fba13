"""DeepCache's memory for one sampling run: deep features, filed so that none can be mistaken for another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...patching.position import Position, StepFinder
from ...patching.wrappers import SharedState
from .schedule import DeepCacheConfig, sources


@dataclass
class Evaluation:
    """One model evaluation with guidance: the step it belongs to, and how often each chunk was evaluated so far.

    Features of steps before `keep_from` serve no evaluation that is still to come.
    """

    step: int
    source: int | None
    keep_from: int = 0
    seen: Counter[Hashable] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Entry:
    step: int
    features: torch.Tensor


@dataclass
class Run(SharedState):
    """State of one run, reachable through `patching.state_of` until the run ends."""

    config: DeepCacheConfig
    finder: StepFinder = field(default_factory=StepFinder)
    current: Evaluation | None = None
    warned: bool = False
    clamped: str | None = None
    # Whether an evaluation of this run was answered from features.
    reused: bool = False
    stepped_aside: bool = False
    _plan: tuple[int | None, ...] = ()
    _entries: dict[Hashable, tuple[_Entry, ...]] = field(default_factory=dict)

    @contextmanager
    def evaluating(self, position: Position) -> Iterator[None]:
        """Everything inside belongs to the step at `position`."""
        if len(self._plan) != position.steps:
            self._plan = sources(self.config, position.steps, position.part)
        if position.went_back:
            # Noise came on top since: what was kept belongs to another image.
            self._entries.clear()
        source = self._plan[min(position.reached, position.step)]
        keep_from = position.step if source is None else source
        outer, self.current = self.current, Evaluation(position.step, self._plan[position.step], keep_from)
        try:
            yield
        finally:
            self.current = outer

    def clear(self) -> None:
        """Let go of all features."""
        self._entries.clear()
        self.current = None

    def store(self, keys: Sequence[Hashable], evaluation: Evaluation, features: torch.Tensor) -> None:
        """Keep `features` [chunks * B, C, H, W], one chunk a key, as those of the evaluation's step.

        Each chunk is copied: what a CUDA graph returns is overwritten by its next replay. A sampler that looks ahead
        (Heun++ does, by two steps) comes back to the steps between, which take the features that were there before.
        """
        step = evaluation.step
        for key, chunk in zip(keys, features.chunk(len(keys)), strict=True):
            others = (e for e in self._entries.get(key, ()) if e.step != step and e.step >= evaluation.keep_from)
            self._entries[key] = (*others, _Entry(step, chunk.clone()))

    def recall(self, keys: Sequence[Hashable], evaluation: Evaluation) -> torch.Tensor | None:
        """The features of all `keys` as one new tensor [chunks * B, C, H, W], or None if one of them has none.

        Features count only if they are no older than the evaluation's full step, and not from a later step, which a
        sampler that looks ahead has evaluated before.
        """
        if evaluation.source is None:
            return None
        found = []
        for key in keys:
            sound = [e for e in self._entries.get(key, ()) if evaluation.source <= e.step <= evaluation.step]
            if not sound:
                return None
            found.append(max(sound, key=lambda entry: entry.step).features)
        return torch.cat(found)


def chunk_keys(x: torch.Tensor, options: Mapping[str, Any], evaluation: Evaluation) -> tuple[Hashable, ...] | None:
    """One key for each chunk of `x` [chunks * B, C, H, W], or None where ComfyUI did not name the chunks.

    A key holds the cond's uuid, the chunk's shape, dtype and device, the context window, the set of replaced attention
    layers, and how often this evaluation has asked for the same before: perturbed-attention guidance evaluates one
    cond a second time, with other attention, and must not meet the features of the first.
    """
    uuids = options.get("uuids")
    if not uuids or x.shape[0] % len(uuids):
        return None
    shape = (x.shape[0] // len(uuids), *x.shape[1:])
    window = tuple(getattr(options.get("context_window"), "index_list", ()))
    replaced = frozenset(
        (kind, place) for kind, places in options.get("patches_replace", {}).items() for place in places
    )
    keys = []
    for uuid in uuids:
        identity = (uuid, shape, x.dtype, x.device, window, replaced)
        keys.append((*identity, evaluation.seen[identity]))
        evaluation.seen[identity] += 1
    return tuple(keys)

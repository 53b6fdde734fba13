"""DeepCache's memory for one sampling run: deep features, filed so that none can be mistaken for another's."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...patching.position import Position, StepFinder
from ...patching.wrappers import SharedState
from ..error_control import CLOSEST, Anchor, continued, lasting
from .adaptive import ErrorControl, Missed
from .schedule import DeepCacheConfig, sources


@dataclass
class Evaluation:
    """One model evaluation with guidance: the step it belongs to, and how often each chunk was evaluated so far.

    Features of steps before `keep_from` serve no evaluation that is still to come. `previous` is the full step before
    this one, where what caching would miss here is to be measured.
    """

    step: int
    source: int | None
    keep_from: int = 0
    log_snr: float = 0.0
    previous: int | None = None
    seen: Counter[Hashable] = field(default_factory=Counter)
    missed: Missed = field(default_factory=Missed)


@dataclass(frozen=True)
class _Entry:
    """Features at one step. `lasts` and `holds` are one number a latent, where a line was measured: how much of its
    slope lasts, and whether it came closer than a copy."""

    step: int
    features: torch.Tensor
    log_snr: float = 0.0
    lasts: torch.Tensor | None = None
    holds: torch.Tensor | None = None

    def anchor(self, as_it_holds: bool = True) -> Anchor:
        lasts = self.lasts if self.holds is None or self.lasts is None or not as_it_holds else self.lasts * self.holds
        return Anchor(self.log_snr, self.features, lasts)


class Expected(NamedTuple):
    """What stands for features [chunks * B, C, H, W], over the distance `reach` from those that it is made from.

    A line through two of them, which lay at least `base` apart; a copy without.
    """

    features: torch.Tensor
    reach: float
    base: float | None


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
    # Of the network's rows all, those of the outer blocks alone, and those that measured.
    rows: int = 0
    cached_rows: int = 0
    control: ErrorControl | None = field(init=False)
    _plan: list[int | None] = field(default_factory=list)
    _entries: dict[Hashable, tuple[_Entry, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.control = ErrorControl(self.config) if self.config.is_adaptive else None

    @contextmanager
    def evaluating(
        self, position: Position, cfg: float | None = None, options: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """Everything inside belongs to the step at `position`; `cfg` is that of ComfyUI's own guider, if it is one."""
        if len(self._plan) != position.steps:
            self._plan = list(sources(self.config, position.steps, position.part))
        if position.went_back:
            # Noise came on top since: what was kept belongs to another image.
            self._entries.clear()
        step, now = position.step, min(position.reached, position.step)
        if self.control is not None:
            self.control.decide(step, self._plan, self.finder.sigmas, options or {})
        source = self._plan[now]
        keep_from = step if source is None else source
        if self._looks_back:
            keep_from = min([keep_from, *self._full_before(now)[-self._looks_back :]])
        log_snr = -math.log(max(position.sigma, 1e-12))
        outer, self.current = self.current, Evaluation(step, self._plan[step], keep_from, log_snr)
        if self.control is not None and self.control.may_cache_behind(step, self._plan):
            self.current.previous = next(iter(self._full_before(step)[-1:]), None)
        self.current.missed.cfg = cfg
        try:
            yield
        finally:
            self.current = outer

    @property
    def _looks_back(self) -> int:
        """How many full steps before the one that the sampler has come to are needed there."""
        return 2 if self.config.features == "extrapolate" else int(self.config.is_adaptive)

    def _full_before(self, step: int) -> list[int]:
        decided = range(step) if self.control is None else sorted(self.control.decided)
        return [full for full in decided if full < step and self._plan[full] == full]

    def evaluate_in_full(self, evaluation: Evaluation) -> None:
        """Make the step of `evaluation` a full one, whatever was decided."""
        if evaluation.source is not None:
            evaluation.source = self._plan[evaluation.step] = evaluation.step

    def clear(self) -> None:
        """Release all features."""
        self._entries.clear()
        self.current = None

    def store(self, keys: Sequence[Hashable], evaluation: Evaluation, features: torch.Tensor) -> None:
        """Keep `features` [chunks * B, C, H, W], one chunk a key, as those of the evaluation's step.

        Each chunk is copied: what a CUDA graph returns is overwritten by its next replay. A sampler that looks ahead
        (Heun++ does, by two steps) comes back to the steps between, which take the features that were there before.
        """
        step = evaluation.step
        for key, chunk in zip(keys, features.chunk(len(keys)), strict=True):
            others = [e for e in self._entries.get(key, ()) if e.step != step and e.step >= evaluation.keep_from]
            measured = self._measured(others, evaluation, chunk) if self.config.features == "extrapolate" else ()
            self._entries[key] = (*others, _Entry(step, chunk.clone(), evaluation.log_snr, *measured))

    def _measured(self, others: Sequence[_Entry], evaluation: Evaluation, found: torch.Tensor) -> tuple:
        """What a line through the features of the two steps before would have been worth."""
        pair = _line([e for e in others if e.step < evaluation.step], evaluation.log_snr)
        if pair is None or found.shape != pair[1].features.shape:
            return ()
        older, newer = (entry.anchor(as_it_holds=False) for entry in pair)
        true = found.float()
        line, copy = continued(older, newer, evaluation.log_snr), newer.prediction.float()
        by_line, by_copy = ((true - guess).flatten(1).norm(dim=1) for guess in (line, copy))
        return lasting(older, newer, true, evaluation.log_snr), (by_line < by_copy).float()

    def recall(self, keys: Sequence[Hashable], evaluation: Evaluation) -> torch.Tensor | None:
        """The features of all `keys` as one new tensor [chunks * B, C, H, W], or None if one of them has none.

        Features count only if they are no older than the evaluation's full step, and not from a later step, which a
        sampler that looks ahead has evaluated before.
        """
        if evaluation.source is None:
            return None
        found = []
        for key in keys:
            entries = self._entries.get(key, ())
            sound = [e for e in entries if evaluation.source <= e.step <= evaluation.step]
            if not sound:
                return None
            found.append(self._features(sound, entries, evaluation).features)
        return torch.cat(found)

    def is_new(self, keys: Sequence[Hashable], evaluation: Evaluation) -> bool:
        """Whether one of `keys` is of no step before, while others are."""
        earlier = any(entry.step < evaluation.step for entries in self._entries.values() for entry in entries)
        return earlier and any(key not in self._entries for key in keys)

    def expected(self, keys: Sequence[Hashable], evaluation: Evaluation) -> Expected | None:
        """What `recall` would give if the full step of `evaluation` were a cached one."""
        found = []
        for key in keys:
            entries = self._entries.get(key, ())
            sound = [e for e in entries if (evaluation.previous or 0) <= e.step < evaluation.step]
            if evaluation.previous is None or not sound:
                return None
            found.append(self._features(sound, entries, evaluation))
        if min(one.reach for one in found) < CLOSEST:
            return None
        bases = [one.base for one in found if one.base is not None]
        base = min(bases) if len(bases) == len(found) else None
        return Expected(torch.cat([one.features for one in found]), min(one.reach for one in found), base)

    def _features(self, sound: Sequence[_Entry], entries: Sequence[_Entry], evaluation: Evaluation) -> Expected:
        """From the newest of the `sound` ones, and the one before it where that gives a line."""
        newest = max(sound, key=lambda entry: entry.step)
        reach = evaluation.log_snr - newest.log_snr
        if self.config.features == "extrapolate":
            near = [e for e in entries if evaluation.keep_from <= e.step <= newest.step]
            pair = _line(near, evaluation.log_snr)
            if pair is not None:
                older, newer = (entry.anchor() for entry in pair)
                line = continued(older, newer, evaluation.log_snr).to(newest.features.dtype)
                return Expected(line, reach, newer.log_snr - older.log_snr)
        return Expected(newest.features, reach, None)


def _line(entries: Sequence[_Entry], log_snr: float) -> tuple[_Entry, _Entry] | None:
    """The last two of `entries` where they lie one behind the other and before `log_snr`, and are of one shape.

    A node may compute the inner blocks at another size for a part of the run, as Kohya's Deep Shrink does.
    """
    last = sorted(entries, key=lambda entry: entry.step)[-2:]
    places = [*(entry.log_snr for entry in last), log_snr]
    in_order = all(later - earlier > CLOSEST for earlier, later in itertools.pairwise(places))
    alike = len({entry.features.shape for entry in last}) == 1
    return (last[0], last[1]) if len(last) == 2 and in_order and alike else None


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

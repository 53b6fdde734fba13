"""What Tune is asked: settings, prompts, a limit and a budget, read from the texts of the node and the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .axes import CellSettings, whole_number, written_values
from .cell import Prompt
from .plan_text import SweepTextError

HELD_OUT = 2
_SEED_STEP = 1000003


@dataclass(frozen=True)
class TuneRequest:
    """What Tune was asked. `candidates`: plan lines in place of the whole space; `steps` and `samplers` open axes."""

    base: CellSettings
    prompts: tuple[Prompt, ...]
    quality: str = "close"
    minutes: float = 10.0
    budget_gb: float = 0.0
    candidates: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    samplers: tuple[tuple[str, str], ...] = ()

    def all_prompts(self) -> tuple[Prompt, ...]:
        """Those of the choice, at least two, then the held-out ones: the same texts with other seeds."""
        texts = self.prompts if len(self.prompts) > 1 else (*self.prompts, _other(self.prompts[0], 1))
        return (*texts, *(_other(texts[n % len(texts)], n + 2) for n in range(HELD_OUT)))


def _other(prompt: Prompt, number: int) -> Prompt:
    return replace(prompt, seed=(prompt.seed + number * _SEED_STEP) % 2**64)


def request_of(
    base: CellSettings, prompts: tuple[Prompt, ...], quality: str, minutes: float, budget_gb: float,
    candidates: str, steps: str, samplers: str,
) -> TuneRequest:  # fmt: skip
    """The request of texts as the node and the command line take them. Raises SweepTextError."""
    lines = tuple(line.strip() for line in candidates.splitlines() if line.strip())
    counts: list[int] = []
    for text in written_values("steps", steps):
        first, colon, last = text.partition(":")
        low = whole_number(first, "steps")
        high = whole_number(last, "steps") if colon else low
        if not 1 <= low <= high or high - low > 1000:
            raise SweepTextError(f"'{text}' is no range of steps: write 20:30, or 20, 25, 30.")
        # A range is five counts: the images of every one would take the minutes of the search.
        counts += sorted({low + (high - low) * part // 4 for part in range(5)})
    named = []
    for text in written_values("sampler", samplers):
        if "@" in text:
            raise SweepTextError(f"'{text}': numbers of steps stand in the axis of steps, not behind a sampler.")
        sampler, _, scheduler = text.partition("/")
        named.append((sampler, scheduler or base.scheduler))
    return TuneRequest(
        base, prompts, quality, minutes, budget_gb, lines, tuple(dict.fromkeys(counts)), tuple(dict.fromkeys(named))
    )

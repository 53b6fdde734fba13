"""What a server's process holds while it is soaked, and how much of it may grow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..client.client import ComfyClient
from .cancels import TIMEOUT_S, node

Measures = Mapping[str, float]
# How many readings are put together at either end.
_TOGETHER = 3


@dataclass(frozen=True)
class Bound:
    """What may grow: so much at once, and so much more with each prompt."""

    once: float
    each: float = 0.0

    def after(self, prompts: int) -> float:
        """The most that may be added by so many prompts."""
        return self.once + self.each * prompts


BOUNDS: Mapping[str, Bound] = {
    "rss_mb": Bound(150.0, 0.05),  # oneDNN keeps its last 1,024 kernels, one for each size that it met
    "open_files": Bound(2),
    "threads": Bound(4),
    "python_threads": Bound(0),
    "device_mb": Bound(16.0),
    "dynamo_graphs": Bound(64),
    "compiled_networks": Bound(2),
    "modules": Bound(0),
    "tensors": Bound(64),
    "objects": Bound(20_000, 2.0),
}


@dataclass(frozen=True)
class Growth:
    """One thing that was counted: after the warm-up, at the end, and what may lie between."""

    what: str
    start: float
    end: float
    bound: float

    @property
    def broken(self) -> bool:
        return self.end - self.start > self.bound

    def __str__(self) -> str:
        return f"{self.what} grew from {self.start:.0f} to {self.end:.0f}, by more than {self.bound:.0f}"


async def read(client: ComfyClient) -> Measures:
    """What the process holds once the server has let go of models, results and history."""
    await client.forget()
    await client.free()
    # A prompt that is queued before the server sees the request runs first: one that does nothing.
    await client.run({"1": node("SpeedLabStressDigest")}, timeout_s=TIMEOUT_S)
    result = await client.run({"1": node("SpeedLabStressMeasures")}, timeout_s=TIMEOUT_S)
    measures: dict[str, float] = json.loads(result.outputs["1"]["text"][0])
    return measures


def growths(readings: Sequence[Measures], prompts: int) -> list[Growth]:
    """What grew between the first readings and the last ones, in `prompts` prompts."""
    together = min(_TOGETHER, len(readings) // 2)
    return [
        Growth(
            what,
            median(reading[what] for reading in readings[:together]),
            median(reading[what] for reading in readings[-together:]),
            bound.after(prompts),
        )
        for what, bound in BOUNDS.items()
    ]

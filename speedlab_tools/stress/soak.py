"""A soak: many random prompts on one server, which may not grow by it, each with a result or a message to read.

Some of them are run again in a fresh process afterwards and have to give the same bits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from ..client.client import ComfyClient
from ..client.errors import BenchError, ExecutionFailed, PromptRejected, ServerGone
from ..client.graph import ApiGraph
from .cancels import TIMEOUT_S
from .soak_builder import Kit
from .soak_prompts import SoakPrompt, SoakPrompts
from .soak_watch import Growth, Measures, growths, read

LEAST_PROMPTS = 20
WARM_UP_SHARE, LEAST_WARM_UP = 0.2, 8
REPEATED_SHARE, LEAST_REPEATED = 0.03, 3
MOST_READINGS, LEAST_READINGS, _PROMPTS_A_READING = 20, 4, 6
_REPORTED_EVERY = 100


@dataclass
class SoakTally:
    """What a soak did. `digests`: prompt number -> its result's digest, for prompts that may be run again."""

    prompts: int = 0
    fine: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed_in_core: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    nodes: Counter[str] = field(default_factory=Counter)
    readings: list[Measures] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    repeated: int = 0
    unequal: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def broken(self) -> list[str]:
        """Everything that should not have been."""
        return [*self.unreadable, *(str(growth) for growth in self.growths if growth.broken), *self.unequal]


def soak(url: str, kit: Kit, count: int, seed: int, say: Callable[[str], None]) -> SoakTally:
    """Run `count` prompts on the server at `url`, which has the probe. Raises ServerGone where it dies of one."""
    return asyncio.run(_soak(url, kit, count, seed, say))


async def _soak(url: str, kit: Kit, count: int, seed: int, say: Callable[[str], None]) -> SoakTally:
    tally, started = SoakTally(), time.perf_counter()
    warm_up = min(max(LEAST_WARM_UP, int(count * WARM_UP_SHARE)), count)
    readings = min(max(count // _PROMPTS_A_READING, LEAST_READINGS), MOST_READINGS)
    marks = {round(warm_up + (count - warm_up) * part / (readings - 1)) for part in range(readings)}
    async with ComfyClient(url) as client:
        prompts = SoakPrompts(await client.object_info(), kit, seed)
        for graph in prompts.first():
            with contextlib.suppress(ExecutionFailed):  # a backend that cannot run here
                await client.run(graph, timeout_s=TIMEOUT_S)
        for number in range(count):
            if number in marks:
                tally.readings.append(await read(client))
            await _run(client, prompts, number, tally, say)
            if tally.prompts % _REPORTED_EVERY == 0:
                say(f"    {tally.prompts} prompts, {tally.prompts - tally.fine} refused")
        tally.readings.append(await read(client))
    tally.growths = growths(tally.readings, count - warm_up)
    tally.seconds = time.perf_counter() - started
    return tally


async def _run(
    client: ComfyClient, prompts: SoakPrompts, number: int, tally: SoakTally, say: Callable[[str], None]
) -> None:
    prompt = prompts.prompt(number)
    tally.prompts += 1
    tally.nodes.update(name for name in prompt.classes if name.startswith("SpeedLab"))
    try:
        digest = await _digest(client, prompt)
    except ServerGone:
        say(f"    prompt {prompt.number} ended the server")
        raise
    except (ExecutionFailed, PromptRejected) as error:
        if is_readable(error):
            tally.refused[_reason(error)] += 1
        elif await _fails_in_core(client, prompts.stock_twin(prompt), error):
            tally.failed_in_core[_reason(error)] += 1
        else:
            tally.unreadable.append(f"prompt {prompt.number}: {_reason(error)}")
            say(f"    {tally.unreadable[-1]}"[:400])
    except BenchError as error:
        tally.unreadable.append(f"prompt {prompt.number}: {error}")
    else:
        tally.fine += 1
        if prompt.repeatable:
            tally.digests[prompt.number] = digest


async def _digest(client: ComfyClient, prompt: SoakPrompt) -> str:
    result = await client.run(prompt.graph, timeout_s=TIMEOUT_S)
    (node,) = (number for number, n in prompt.graph.items() if n["class_type"] == "SpeedLabStressDigest")
    return "\n".join(result.outputs[node]["text"])


def is_readable(error: BenchError) -> bool:
    """Whether a prompt ended with a message that was written for its user: one of this pack's, or lack of memory."""
    if isinstance(error, PromptRejected):
        return True
    if not isinstance(error, ExecutionFailed) or not error.reason.strip() or "Traceback" in error.reason:
        return False
    return ".speedlab." in error.kind or "OutOfMemory" in error.kind


async def _fails_in_core(client: ComfyClient, twin: ApiGraph | None, error: BenchError) -> bool:
    """Whether core's own sampler says the very same of these settings without anything of this pack on the model."""
    if twin is None or not isinstance(error, ExecutionFailed):
        return False
    try:
        await client.run(twin, timeout_s=TIMEOUT_S)
    except ExecutionFailed as other:
        return (other.kind, other.reason) == (error.kind, error.reason)
    return False


def _reason(error: BenchError) -> str:
    if not isinstance(error, ExecutionFailed):
        return str(error).splitlines()[0]
    return (
        f"{error.class_type}: {error.kind.rpartition('.')[2]}: {error.reason.splitlines()[0] if error.reason else ''}"
    )


def sample(tally: SoakTally, seed: int) -> list[int]:
    """The numbers of the prompts that are to be run again."""
    wanted = max(LEAST_REPEATED, int(tally.prompts * REPEATED_SHARE))
    return Random(seed).sample(sorted(tally.digests), min(wanted, len(tally.digests)))


def repeat(url: str, kit: Kit, numbers: Sequence[int], seed: int, tally: SoakTally) -> None:
    """Run the prompts `numbers` once more on a fresh server and compare; the outcome goes into `tally`."""
    asyncio.run(_repeat(url, kit, numbers, seed, tally))


async def _repeat(url: str, kit: Kit, numbers: Sequence[int], seed: int, tally: SoakTally) -> None:
    async with ComfyClient(url) as client:
        prompts = SoakPrompts(await client.object_info(), kit, seed)
        for prompt in sorted(map(prompts.prompt, numbers), key=lambda prompt: prompt.loads):
            tally.repeated += 1
            try:
                digest = await _digest(client, prompt)
            except BenchError as error:
                tally.unequal.append(f"prompt {prompt.number} fails in a fresh process: {_reason(error)}")
                continue
            if digest != tally.digests[prompt.number]:
                tally.unequal.append(f"prompt {prompt.number} gives another result in a fresh process")

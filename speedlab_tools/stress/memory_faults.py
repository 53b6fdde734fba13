"""Memory that runs out at a random tensor operation of a prompt on a real server; afterwards nothing may be left.

The prompt ends with an error that says so, or goes on in smaller pieces where a node knows how; its record tells.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from random import Random

from ..client.client import ComfyClient
from ..client.errors import BenchError, ExecutionFailed
from .cancels import TIMEOUT_S, differences, left_on_disk, look, node, stressed
from .writers import FaultTally

_CHECK_EVERY = 10
_SURVIVED, _TOLD = "went on", "told"


def run_out_of_memory(url: str, output: Path, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Let the memory run out so many times. `output` is the server's output folder. Raises BenchError."""
    return asyncio.run(_all_on_memory(url, output, checkpoint, faults, rng))


async def _all_on_memory(url: str, output: Path, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    tally, ended = FaultTally("out of memory"), Counter[str]()
    started = time.perf_counter()
    async with ComfyClient(url) as client:
        await client.run(stressed(checkpoint, seed=0), timeout_s=TIMEOUT_S)
        before = await look(client, checkpoint)
        operations = await _count(client, checkpoint)
        for number in range(faults):
            # A third of them loads anew, so that loading and encoding have their share.
            if number % 3 == 0:
                await client.free()
            await _arm(client, rng.randint(1, operations))
            ended[await _run(client, checkpoint, number + 1)] += 1
            tally.faults += 1
            if tally.faults % _CHECK_EVERY == 0 or tally.faults == faults:
                await _arm(client, -1)
                tally.broken += differences(before, await look(client, checkpoint), tally.faults)
    tally.broken += [f"{count} prompts: {what}" for what, count in ended.items() if what not in (_SURVIVED, _TOLD)]
    tally.halves, tally.runs = ended[_TOLD], sum(ended.values())
    tally.broken += left_on_disk(output)
    tally.seconds = time.perf_counter() - started
    return tally


async def _count(client: ComfyClient, checkpoint: str) -> int:
    """Tensor operations of a prompt that loads anew."""
    await client.free()
    await _arm(client, 0)
    await client.run(stressed(checkpoint, seed=0), timeout_s=TIMEOUT_S)
    return await _arm(client, -1)


async def _arm(client: ComfyClient, at: int) -> int:
    """Let operation `at` of what follows fail (0: none, only count; -1: stop); returns the count until now."""
    result = await client.run({"1": node("SpeedLabStressMemory", at=at)}, timeout_s=TIMEOUT_S)
    return int(result.outputs["1"]["text"][0])


async def _run(client: ComfyClient, checkpoint: str, seed: int) -> str:
    try:
        await client.run(stressed(checkpoint, seed=seed), timeout_s=TIMEOUT_S)
    except ExecutionFailed as error:
        told = "OutOfMemory" in error.kind or "memory" in error.reason.lower()
        return _TOLD if told else f"{error.kind}: {error}"
    except BenchError as error:
        return f"{type(error).__name__}: {error}"
    return _SURVIVED

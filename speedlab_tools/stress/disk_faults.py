"""A server whose output folder lies on a real disk that fills up, or that can only be read.

Prompts then end with a sentence that names the path, and once there is room again they work; every run that was told
to be written is whole, and none is there twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from ..client.client import ComfyClient
from ..client.errors import BenchError, ExecutionFailed
from .cancels import TIMEOUT_S, stressed
from .small_disk import SmallDisk
from .writers import FaultTally, check_written

# From nothing at all to room for the record but not for the picture, or for both but not for the row.
_LEAST_FREE, _MOST_FREE = 0, 60_000
_END_OF_PNG = b"IEND\xaeB`\x82"


def fill_real_disk(url: str, disk: SmallDisk, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Run so many prompts with less room than a run may need. `disk` holds the server's output folder."""

    def spoil() -> None:
        disk.fill(rng.randint(_LEAST_FREE, _MOST_FREE))

    return asyncio.run(_all(FaultTally("real disk full"), url, disk, checkpoint, faults, (spoil, disk.empty)))


def make_read_only(url: str, disk: SmallDisk, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Run so many prompts while nothing can be written. `disk` holds the server's output folder."""

    def spoil() -> None:
        disk.set_writable(False)

    def mend() -> None:
        disk.set_writable(True)

    return asyncio.run(_all(FaultTally("read-only folder"), url, disk, checkpoint, faults, (spoil, mend)))


async def _all(
    tally: FaultTally,
    url: str,
    disk: SmallDisk,
    checkpoint: str,
    faults: int,
    around: tuple[Callable[[], None], Callable[[], None]],
) -> FaultTally:
    spoil, mend = around
    told: list[str] = []
    started = time.perf_counter()
    ended = Counter[str]()
    async with ComfyClient(url) as client:
        await _write(client, checkpoint, told)
        for _ in range(faults):
            spoil()
            try:
                ended[await _write(client, checkpoint, told)] += 1
            finally:
                mend()
            tally.faults += 1
        after = await _write(client, checkpoint, told)
    if after:
        tally.broken.append(f"with room again a prompt ends with {after}")
    tally.broken += [f"{count} prompts: {what}" for what, count in ended.items() if not _is_told(what, disk.path)]
    tally.halves = sum(ended.values()) - ended[""]
    tally.seconds = time.perf_counter() - started
    halves, checked = tally.halves, check_written(tally, disk.path, told)
    checked.broken += [f"{path.name} is cut off" for path in disk.path.rglob("*.png") if not _is_whole(path)]
    checked.broken += [f"{checked.halves} rows are no whole rows"] if checked.halves else []
    checked.halves = halves
    return checked


async def _write(client: ComfyClient, checkpoint: str, told: list[str]) -> str:
    """Run a prompt that leaves a record; "" and its run noted in `told`, or how it failed."""
    graph: dict[str, Any] = stressed(checkpoint, seed=len(told))
    graph["5"]["inputs"]["steps"] = 2
    try:
        result = await client.run(graph, timeout_s=TIMEOUT_S)
    except ExecutionFailed as error:
        return error.reason.strip()
    except BenchError as error:
        return f"{type(error).__name__}: {error}"
    told.append(result.outputs["7"]["speedlab"][0]["run_id"])
    return ""


def _is_whole(picture: Path) -> bool:
    return picture.read_bytes().endswith(_END_OF_PNG)


def _is_told(what: str, path: Path) -> bool:
    return not what or ("cannot write to" in what and str(path) in what)

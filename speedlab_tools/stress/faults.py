"""All kinds of faults, with a server of their own where one is needed.

A server whose output folder lies on a real disk that fills up, or that can only be read.

Prompts then end with a sentence that names the path, and once there is room again they work; every run that was told
to be written is whole, and none is there twice.

Memory that runs out at a random tensor operation of a prompt on a real server; afterwards nothing may be left.

The prompt ends with an error that says so, or goes on in smaller pieces where a node knows how; its record tells.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from ..client.client import ComfyClient
from ..client.errors import BenchError, ExecutionFailed
from ..client.files import demo_checkpoint
from .cancels import TIMEOUT_S, cancel_at_random, differences, left_on_disk, look, node, stressed
from .host import stressed_server
from .small_disk import NoSmallDiskError, SmallDisk, small_disk
from .writers import FaultTally, check_written, fill_small_disk, fill_the_disk, kill_while_writing, write_at_once

_RUNS_A_WRITER = 50
_DISK_MB = 64
# URL, output folder, checkpoint's name, number of faults.
OnServer = Callable[[str, Path, str, int, Random], FaultTally]
OnDisk = Callable[[str, SmallDisk, str, int, Random], FaultTally]


def run_faults(folder: Path, faults: int, seed: int, say: Callable[[str], None]) -> list[FaultTally]:
    """So many faults of each kind, told as they end. Raises SpeedLabError where there is no server to stress."""
    kinds: dict[str, Callable[[], FaultTally]] = {
        "kill": lambda: kill_while_writing(folder / "killed", faults, Random(seed)),
        "writers": lambda: write_at_once(folder / "together", 4, _RUNS_A_WRITER),
        "cancel": lambda: _on_server(folder / "cancelled", cancel_at_random, faults, seed),
        "memory": lambda: _on_server(folder / "memory", run_out_of_memory, faults, seed),
        "small": lambda: _write_on_small_disk(folder / "small", faults, seed),
        "disk": lambda: _on_small_disk(folder / "disk", fill_real_disk, faults, seed),
        "read-only": lambda: _on_small_disk(folder / "read-only", make_read_only, faults, seed),
    }
    if sys.platform != "win32":  # which has no limit of file sizes
        kinds["full"] = lambda: fill_the_disk(folder / "full", faults, Random(seed))
    tried = [attempt(make, say) for make in kinds.values()]
    return [tally for tally in tried if tally is not None]


def attempt(make: Callable[[], FaultTally], say: Callable[[str], None]) -> FaultTally | None:
    """One kind of fault, told; None, told as well, where this system has no small disk for it."""
    try:
        tally = make()
    except NoSmallDiskError as error:
        say(f"NOT TRIED: {error}")
        return None
    say(tally.line())
    for line in tally.broken[:20]:
        say(f"    {line[:400]}")
    return tally


def _on_server(base: Path, make: OnServer, faults: int, seed: int) -> FaultTally:
    checkpoint = demo_checkpoint("sd15")
    with stressed_server(base, {"checkpoints": [checkpoint]}) as server:
        return make(server.url, base / "output", checkpoint.name, faults, Random(seed))


def _write_on_small_disk(path: Path, faults: int, seed: int) -> FaultTally:
    with small_disk(path, _DISK_MB) as disk:
        return fill_small_disk(disk, faults, Random(seed))


def _on_small_disk(base: Path, make: OnDisk, faults: int, seed: int) -> FaultTally:
    """Raises NoSmallDiskError where none can be mounted."""
    checkpoint = demo_checkpoint("sd15")
    models = {"checkpoints": [checkpoint]}
    with small_disk(base / "small", _DISK_MB) as disk, stressed_server(base, models, disk.path) as server:
        return make(server.url, disk, checkpoint.name, faults, Random(seed))


# From nothing at all to room for the record but not for the image, or for both but not for the row.
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

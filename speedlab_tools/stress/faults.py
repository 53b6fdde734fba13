"""All kinds of faults, with a server of their own where one is needed; afterwards nothing of them may be left.

* Writers that are killed, that write at once, or on a disk without room (`writers`).
* Prompts cancelled at random moments of each phase: loading, encoding, preparing, compiling, the first, a cached and
  the last step, decoding, writing.
* Memory that runs out at a random tensor operation of a prompt. The prompt ends with an error that says so, or goes on
  in smaller pieces where a node knows how; its record tells.
* An output folder on a real disk that fills up, or that can only be read. Prompts then end with a sentence that names
  the path, and once there is room again they work; every run that was reported as written is whole, and none is there
  twice.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ..client.client import ComfyClient
from ..client.errors import BenchError, ExecutionFailed, ExecutionInterrupted
from ..client.events import Event
from ..client.files import demo_checkpoint
from .server import TIMEOUT_S, compiled, differences, left_on_disk, look, node, stressed, stressed_server
from .small_disk import NoSmallDiskError, SmallDisk, small_disk
from .writers import FaultTally, check_written, fill_small_disk, fill_the_disk, kill_while_writing, write_at_once

# Phase -> the node whose start, or the sampler's step whose end, opens it.
PHASES: dict[str, tuple[str, int | None]] = {
    "load": ("1", None),
    "text encoding": ("2", None),
    "preparing": ("5", None),
    "compiling": ("5", None),
    "first step": ("5", 1),
    "cached step": ("5", 2),
    "last step": ("5", 7),
    "decoding": ("6", None),
    "writing": ("7", None),
}
_RUNS_A_WRITER = 50
_DISK_MB = 64
# URL, output folder, checkpoint's name, number of faults.
OnServer = Callable[[str, Path, str, int, Random], FaultTally]
OnDisk = Callable[[str, SmallDisk, str, int, Random], FaultTally]


def run_faults(folder: Path, faults: int, seed: int, say: Callable[[str], None]) -> list[FaultTally]:
    """So many faults of each kind, reported as they end. Raises SpeedLabError where there is no server to stress."""
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
    """One kind of fault, reported; None, reported as well, where this system has no small disk for it."""
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


_CHECK_EVERY = 10
_SOON_S = 0.15
_CANCELLED, _FINISHED, _SURVIVED, _REPORTED = "cancelled", "finished", "went on", "reported"
# Makes one fault; how the prompt ended.
Make = Callable[[int], Awaitable[str]]


async def _watched(
    tally: FaultTally,
    server: tuple[str, Path, str],
    faults: int,
    prepare: Callable[[ComfyClient], Awaitable[Make]],
    good: Sequence[str],
) -> FaultTally:
    """Make so many faults on one server, which has to be as it was before, every few of them and in the end.

    `server`: its URL, its output folder and the name of its checkpoint. `good` are the ends that are right; `halves`
    counts those of the first kind.
    """
    url, output, checkpoint = server
    started, ended = time.perf_counter(), Counter[str]()
    async with ComfyClient(url) as client:
        await client.run(stressed(checkpoint, seed=0), timeout_s=TIMEOUT_S)
        make = await prepare(client)
        before = await look(client, checkpoint)
        for number in range(faults):
            ended[await make(number)] += 1
            tally.faults += 1
            if tally.faults % _CHECK_EVERY == 0 or tally.faults == faults:
                tally.broken += differences(before, await look(client, checkpoint), tally.faults)
    tally.broken += [f"{count} prompts ended so: {what}" for what, count in ended.items() if what not in good]
    tally.halves, tally.runs = ended[good[0]], sum(ended.values())
    tally.broken += left_on_disk(output)
    tally.seconds = time.perf_counter() - started
    return tally


def cancel_at_random(url: str, output: Path, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Cancel so many prompts, the phases in turn. `output` is the server's output folder. Raises BenchError."""

    async def prepare(client: ComfyClient) -> Make:
        compiling_s = await _time_compiling(client, checkpoint)

        async def cancel(number: int) -> str:
            phase = list(PHASES)[number % len(PHASES)]
            if phase == "load":
                await client.free()
            graph, longest_s = stressed(checkpoint, seed=number + 1), _SOON_S
            if phase == "compiling":
                graph, longest_s = compiled(checkpoint, number + 1, _side(rng), _side(rng)), compiling_s
            return await _cancel(client, graph, phase, rng.uniform(0.0, longest_s))

        return cancel

    server = url, output, checkpoint
    return asyncio.run(_watched(FaultTally("cancelled"), server, faults, prepare, (_CANCELLED, _FINISHED)))


async def _time_compiling(client: ComfyClient, checkpoint: str) -> float:
    """Seconds from the sampler's start to the end of its first step, for a size that was not compiled before."""
    graph = compiled(checkpoint, 0, 72, 72)
    events = (await client.run(graph, timeout_s=TIMEOUT_S)).log.events
    started = next(event.time_s for event in events if event.kind == "executing" and event.node == "5")
    return next(event.time_s for event in events if event.kind == "progress" and event.node == "5") - started


def _side(rng: Random) -> int:
    """An image's side: jit_trace compiles every size for itself, and keeps few."""
    return 64 + 8 * rng.randrange(9)


async def _cancel(client: ComfyClient, graph: dict[str, Any], phase: str, delay_s: float) -> str:
    """Run a prompt and interrupt it so long after its phase began; how it ended."""
    opening, step = PHASES[phase]
    reached = asyncio.Event()

    def listen(event: Event) -> None:
        if event.node == opening and (event.kind == "executing" if step is None else event.value >= step):
            reached.set()

    async def interrupt() -> None:
        await reached.wait()
        await asyncio.sleep(delay_s)
        await client.interrupt()

    waiting = asyncio.create_task(interrupt())
    try:
        await client.run(graph, listener=listen, timeout_s=TIMEOUT_S)
        return _FINISHED
    except ExecutionInterrupted:
        return _CANCELLED
    except BenchError as error:
        return f"{phase}: {error}"
    finally:
        if reached.is_set():
            await waiting
        waiting.cancel()


def run_out_of_memory(url: str, output: Path, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Let the memory run out so many times. `output` is the server's output folder. Raises BenchError."""

    async def prepare(client: ComfyClient) -> Make:
        operations = await _count(client, checkpoint)

        async def run_out(number: int) -> str:
            # A third of them loads again, so that loading and encoding have their share.
            if number % 3 == 0:
                await client.free()
            await _count_and_fail_at(client, rng.randint(1, operations))
            how = await _run(client, checkpoint, number + 1)
            await _count_and_fail_at(client, -1)
            return how

        return run_out

    server = url, output, checkpoint
    return asyncio.run(_watched(FaultTally("out of memory"), server, faults, prepare, (_REPORTED, _SURVIVED)))


async def _count(client: ComfyClient, checkpoint: str) -> int:
    """Tensor operations of a prompt that loads again."""
    await client.free()
    await _count_and_fail_at(client, 0)
    await client.run(stressed(checkpoint, seed=0), timeout_s=TIMEOUT_S)
    return await _count_and_fail_at(client, -1)


async def _count_and_fail_at(client: ComfyClient, at: int) -> int:
    """Let operation `at` of what follows fail (0: none, only count; -1: stop); returns the count until now."""
    result = await client.run({"1": node("SpeedLabStressMemory", at=at)}, timeout_s=TIMEOUT_S)
    return int(result.outputs["1"]["text"][0])


async def _run(client: ComfyClient, checkpoint: str, seed: int) -> str:
    try:
        await client.run(stressed(checkpoint, seed=seed), timeout_s=TIMEOUT_S)
    except ExecutionFailed as error:
        says_so = "OutOfMemory" in error.kind or "memory" in error.reason.lower()
        return _REPORTED if says_so else f"{error.kind}: {error}"
    except BenchError as error:
        return f"{type(error).__name__}: {error}"
    return _SURVIVED


# From nothing at all to room for the record but not for the image, or for both but not for the row.
_LEAST_FREE, _MOST_FREE = 0, 60_000
_END_OF_PNG = b"IEND\xaeB`\x82"


def fill_real_disk(url: str, disk: SmallDisk, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Run so many prompts with less room than a run may need. `disk` holds the server's output folder."""

    def cause() -> None:
        disk.fill(rng.randint(_LEAST_FREE, _MOST_FREE))

    return asyncio.run(_all(FaultTally("real disk full"), url, disk, checkpoint, faults, (cause, disk.empty)))


def make_read_only(url: str, disk: SmallDisk, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Run so many prompts while nothing can be written. `disk` holds the server's output folder."""

    def cause() -> None:
        disk.set_writable(False)

    def repair() -> None:
        disk.set_writable(True)

    return asyncio.run(_all(FaultTally("read-only folder"), url, disk, checkpoint, faults, (cause, repair)))


async def _all(
    tally: FaultTally,
    url: str,
    disk: SmallDisk,
    checkpoint: str,
    faults: int,
    around: tuple[Callable[[], None], Callable[[], None]],
) -> FaultTally:
    cause, repair = around
    run_ids: list[str] = []
    started = time.perf_counter()
    ended = Counter[str]()
    async with ComfyClient(url) as client:
        await _write(client, checkpoint, run_ids)
        for _ in range(faults):
            cause()
            try:
                ended[await _write(client, checkpoint, run_ids)] += 1
            finally:
                repair()
            tally.faults += 1
        after = await _write(client, checkpoint, run_ids)
    if after:
        tally.broken.append(f"with room again a prompt ends with {after}")
    tally.broken += [
        f"{count} prompts: {what}" for what, count in ended.items() if not _names_the_path(what, disk.path)
    ]
    tally.halves = sum(ended.values()) - ended[""]
    tally.seconds = time.perf_counter() - started
    halves, checked = tally.halves, check_written(tally, disk.path, run_ids)
    checked.broken += [f"{path.name} is cut off" for path in disk.path.rglob("*.png") if not _is_whole(path)]
    checked.broken += [f"{checked.halves} rows are no whole rows"] if checked.halves else []
    checked.halves = halves
    return checked


async def _write(client: ComfyClient, checkpoint: str, run_ids: list[str]) -> str:
    """Run a prompt that leaves a record; "" and its run noted in `run_ids`, or how it failed."""
    graph: dict[str, Any] = stressed(checkpoint, seed=len(run_ids))
    graph["5"]["inputs"]["steps"] = 2
    try:
        result = await client.run(graph, timeout_s=TIMEOUT_S)
    except ExecutionFailed as error:
        return error.reason.strip()
    except BenchError as error:
        return f"{type(error).__name__}: {error}"
    run_ids.append(result.outputs["7"]["speedlab"][0]["run_id"])
    return ""


def _is_whole(image: Path) -> bool:
    return image.read_bytes().endswith(_END_OF_PNG)


def _names_the_path(what: str, path: Path) -> bool:
    return not what or ("cannot write to" in what and str(path) in what)

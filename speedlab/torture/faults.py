"""All kinds of faults, with a server of their own where one is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from ..bench.files import demo_checkpoint, link_model
from ..host.base import from_environment, pack_root
from ..host.server import ComfyServer
from .cancels import bring_probe, cancel_at_random
from .memory_faults import run_out_of_memory
from .writers import FaultTally, fill_the_disk, kill_while_writing, write_at_once

_RUNS_A_WRITER = 50
# URL, output folder, checkpoint's name, number of faults.
OnServer = Callable[[str, Path, str, int, Random], FaultTally]


def run_faults(folder: Path, faults: int, seed: int, say: Callable[[str], None]) -> list[FaultTally]:
    """So many faults of each kind, told as they end. Raises SpeedLabError where there is no server to torture."""
    kinds: dict[str, Callable[[], FaultTally]] = {
        "kill": lambda: kill_while_writing(folder / "killed", faults, Random(seed)),
        "writers": lambda: write_at_once(folder / "together", 4, _RUNS_A_WRITER),
        "cancel": lambda: _on_server(folder / "cancelled", cancel_at_random, faults, seed),
        "memory": lambda: _on_server(folder / "memory", run_out_of_memory, faults, seed),
    }
    if sys.platform != "win32":  # which has no limit of file sizes
        kinds["full"] = lambda: fill_the_disk(folder / "full", faults, Random(seed))
    tallies = []
    for make in kinds.values():
        tally = make()
        tallies.append(tally)
        say(tally.line())
        for line in tally.broken[:20]:
            say(f"    {line[:400]}")
    return tallies


def _on_server(base: Path, make: OnServer, faults: int, seed: int) -> FaultTally:
    with _server(base) as (server, checkpoint):
        return make(server.url, base / "output", checkpoint, faults, Random(seed))


@contextmanager
def _server(base: Path) -> Iterator[tuple[ComfyServer, str]]:
    """A server on the processor with the demo checkpoint and the probe."""
    checkpoint = link_model(demo_checkpoint("sd15"), base / "models" / "checkpoints")
    bring_probe(base)
    with ComfyServer(from_environment(), pack=pack_root(), base=base, cpu=True) as server:
        yield server, checkpoint

"""All kinds of faults, with a server of their own where one is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from ..client.files import demo_checkpoint
from .cancels import cancel_at_random
from .disk_faults import fill_real_disk, make_read_only
from .memory_faults import run_out_of_memory
from .server import stressed_server
from .small_disk import NoSmallDiskError, SmallDisk, small_disk
from .writers import FaultTally, fill_small_disk, fill_the_disk, kill_while_writing, write_at_once

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

"""The figures of a run as tables in `benchmarks/results`."""

from __future__ import annotations

import csv
import io
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..profiling.store import cannot_write, write_atomically
from .fuzz import Tally
from .writers import FaultTally

_ABOUT = ("seed", "speedlab", "torch", "python", "system", "date")
FUZZ_COLUMNS = ("reader", "inputs", "fine", "refused", "defects", "seconds", *_ABOUT)
FAULT_COLUMNS = ("fault", "faults", "runs", "halves", "broken", "seconds", *_ABOUT)


def write_fuzz(folder: Path, tallies: Sequence[Tally], seed: int) -> Path:
    """One row a reader, in place of an earlier table of that day. Raises ResultsError naming the path."""
    rows = [
        (t.target, t.inputs, *(t.counts[verdict] for verdict in ("fine", "refused", "defect")), f"{t.seconds:.1f}")
        for t in tallies
    ]
    return _write(folder, "torture-fuzz", FUZZ_COLUMNS, rows, seed)


def write_faults(folder: Path, tallies: Sequence[FaultTally], seed: int) -> Path:
    """One row a kind of fault, in place of an earlier table of that day. Raises ResultsError naming the path."""
    rows = [(t.fault, t.faults, t.runs, t.halves, len(t.broken), f"{t.seconds:.1f}") for t in tallies]
    return _write(folder, "torture-faults", FAULT_COLUMNS, rows, seed)


def _write(folder: Path, what: str, columns: Sequence[str], rows: Sequence[Sequence[object]], seed: int) -> Path:
    import torch

    from ..profiling.environment import device_name

    date, version = time.strftime("%Y-%m-%d"), torch.__version__.split("+")[0]
    device = device_name(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    words = "-".join("".join(c if c.isalnum() or c == "." else " " for c in device).split()).lower()
    path = folder / f"{words}_torch{version}_{date}_{what}.csv"
    about = (seed, __version__, version, platform.python_version(), platform.system(), date)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows((*row, *about) for row in rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.getvalue().encode())
    except OSError as error:
        raise cannot_write(path, error) from error
    return path

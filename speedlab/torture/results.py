"""The figures of a run as a table in `benchmarks/results`."""

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

COLUMNS = ("reader", "inputs", "fine", "refused", "defects", "seconds", "seed", "speedlab", "python", "system", "date")


def write_results(folder: Path, tallies: Sequence[Tally], seed: int) -> Path:
    """Write `<date>_torture-fuzz.csv`, in place of an earlier one of that day. Raises ResultsError naming the path."""
    date = time.strftime("%Y-%m-%d")
    path = folder / f"{date}_torture-fuzz.csv"
    about = (seed, __version__, platform.python_version(), platform.system(), date)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for tally in tallies:
        counts = [tally.counts[verdict] for verdict in ("fine", "refused", "defect")]
        writer.writerow((tally.target, tally.inputs, *counts, f"{tally.seconds:.1f}", *about))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.getvalue().encode())
    except OSError as error:
        raise cannot_write(path, error) from error
    return path

"""The figures of a run as tables in `benchmarks/results`."""

from __future__ import annotations

import csv
import io
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from speedlab import __version__
from speedlab.measure.store import cannot_write, write_atomically

from .fuzz import Tally
from .soak import SoakTally
from .writers import FaultTally

_ABOUT = ("seed", "speedlab", "torch", "python", "system", "date")
FUZZ_COLUMNS = ("reader", "inputs", "fine", "refused", "defects", "seconds", *_ABOUT)
FAULT_COLUMNS = ("fault", "faults", "runs", "halves", "broken", "seconds", *_ABOUT)
# `start` is after the warm-up; `bound` is the most that may lie between start and end, or that a count may be.
SOAK_COLUMNS = ("what", "count", "start", "end", "bound", *_ABOUT)


def write_fuzz(folder: Path, tallies: Sequence[Tally], seed: int) -> Path:
    """One row a reader, in place of an earlier table of that day. Raises ResultsError naming the path."""
    rows = [
        (t.target, t.inputs, *(t.counts[verdict] for verdict in ("fine", "refused", "defect")), f"{t.seconds:.1f}")
        for t in tallies
    ]
    return _write(folder, "stress-fuzz", FUZZ_COLUMNS, rows, seed)


def write_faults(folder: Path, tallies: Sequence[FaultTally], seed: int) -> Path:
    """One row a kind of fault, in place of an earlier table of that day. Raises ResultsError naming the path."""
    rows = [(t.fault, t.faults, t.runs, t.halves, len(t.broken), f"{t.seconds:.1f}") for t in tallies]
    return _write(folder, "stress-faults", FAULT_COLUMNS, rows, seed)


def soak_rows(tally: SoakTally) -> list[tuple[str, str, str, str, str]]:
    """What a soak did, as the rows of its table: counts, what may grow, and how many prompts had each node."""
    counts = (
        ("prompts", tally.prompts, ""),
        ("with a result", tally.fine, ""),
        ("refused with a message", tally.refused.total(), ""),
        ("failed as core does by itself", tally.failed_in_core.total(), ""),
        ("errors without one", len(tally.unreadable), "0"),
        ("run again in a fresh process", tally.repeated, ""),
        ("unequal there", len(tally.unequal), "0"),
        ("seconds", round(tally.seconds), ""),
    )
    return [
        *((what, str(count), "", "", bound) for what, count, bound in counts),
        *((g.what, "", f"{g.start:.1f}", f"{g.end:.1f}", f"{g.bound:.1f}") for g in tally.growths),
        *((name, str(count), "", "", "") for name, count in sorted(tally.nodes.items())),
    ]


def write_soak(folder: Path, tally: SoakTally, seed: int) -> Path:
    """Counts and growths, in place of an earlier table of that day. Raises ResultsError naming the path."""
    return _write(folder, "stress-soak", SOAK_COLUMNS, soak_rows(tally), seed)


def _write(folder: Path, what: str, columns: Sequence[str], rows: Sequence[Sequence[object]], seed: int) -> Path:
    import torch

    from speedlab.measure.environment import device_name

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

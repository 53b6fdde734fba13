"""`run.py stress`: prints what was tried and what broke, and keeps the figures in `benchmarks/results`."""

from __future__ import annotations

import argparse
import csv
import io
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from speedlab import __version__
from speedlab.common.errors import SpeedLabError
from speedlab.common.tables import growing_row
from speedlab.measure.environment import device_name, result_stem
from speedlab.measure.store import cannot_write, write_atomically

from ..cli.arguments import UsageError
from ..host.base import from_environment
from ..host.inprocess import enter
from .faults import run_faults
from .fuzz import HEADER, Tally, Target, fuzz, shares
from .readers import model_targets, pure_targets, trap_works
from .soak import LEAST_PROMPTS, SoakTally, run_soak
from .web_routes import route_targets
from .writers import FAULT_HEADER, FaultTally

_ABOUT = ("seed", "speedlab", "torch", "python", "system", "date")
FUZZ_COLUMNS = ("reader", "inputs", "fine", "refused", "defects", "seconds", *_ABOUT)
FAULT_COLUMNS = ("fault", "faults", "runs", "halves", "broken", "seconds", *_ABOUT)
# `start` is after the warm-up; `bound` is the most that may lie between start and end, or that a count may be.
SOAK_COLUMNS = ("what", "count", "start", "end", "bound", *_ABOUT)


def run(options: argparse.Namespace) -> int:
    """The command: 1 where something broke. Raises UsageError, SpeedLabError."""
    numbers = (options.inputs, options.faults, options.soak)
    if min(numbers) < 0 or not any(numbers):
        raise UsageError("--inputs, --faults and --soak take numbers from 0 on, and not 0 all three")
    if 0 < options.soak < LEAST_PROMPTS:
        raise UsageError(f"--soak takes 0 or at least {LEAST_PROMPTS} prompts: fewer tell nothing about growth")
    options.out = options.out.absolute()
    logging.getLogger().setLevel(logging.ERROR)
    # ComfyUI reads the command line when it is imported.
    sys.argv = sys.argv[:1]
    with tempfile.TemporaryDirectory(prefix="speedlab-stress-") as folder:
        read = fuzz_all(Path(folder), options.inputs, options.seed, options.only) if options.inputs else []
        faults = _faults(Path(folder), options) if options.faults and not options.only else []
        soaked = _soak(Path(folder), options) if options.soak and not options.only else None
    return _report(read, faults, soaked, options)


def fuzz_all(folder: Path, inputs: int, seed: int, only: str) -> list[Tally]:
    """Every reader with its share of the inputs, printed as it ends. Raises SpeedLabError."""
    enter(from_environment().comfyui, folder / "base", on_cpu=True)
    if not trap_works():
        raise SpeedLabError("The trap for pickles does not work here, so the inputs would test nothing.")
    with route_targets(folder / "base" / "secret.txt") as routes:
        targets = [
            t for t in (*pure_targets(folder), *model_targets(folder / "base" / "models"), *routes) if only in t.name
        ]
        if not targets:
            raise SpeedLabError(f"No reader's name holds '{only}'.")
        return _run(targets, inputs, seed)


def _run(targets: Sequence[Target], inputs: int, seed: int) -> list[Tally]:
    _say(HEADER)
    tallies = []
    for target, share in zip(targets, shares(targets, inputs), strict=True):
        tally = fuzz(target, share, seed)
        tallies.append(tally)
        _say(tally.line())
        for reason, (first, count) in tally.defects.items():
            _say(f"    {count} x, first at input {first}: {reason}")
    return tallies


def _faults(folder: Path, options: argparse.Namespace) -> list[FaultTally]:
    _say(FAULT_HEADER)
    return run_faults(folder / "faults", options.faults, options.seed, _say)


def _soak(folder: Path, options: argparse.Namespace) -> SoakTally:
    _say(f"{options.soak} random prompts on one server")
    tally = run_soak(folder / "soak", options.soak, options.seed, _say)
    for row in (SOAK_COLUMNS[:5], *soak_rows(tally)):
        _say(growing_row(*row))
    for what in tally.broken[:20]:
        _say(f"    {what[:400]}")
    return tally


def _report(
    read: Sequence[Tally], faults: Sequence[FaultTally], soaked: SoakTally | None, options: argparse.Namespace
) -> int:
    defects = sum(tally.counts["defect"] for tally in read)
    broken = sum(len(tally.broken) for tally in faults) + (len(soaked.broken) if soaked else 0)
    _say(
        f"{sum(tally.inputs for tally in read)} inputs, {defects} defects; "
        f"{sum(tally.faults for tally in faults)} faults, {soaked.prompts if soaked else 0} prompts, "
        f"{broken} things lost or left (seed {options.seed})"
    )
    # A part of the readers is a look at them, no figure to keep.
    if read and not options.only:
        _say(str(write_fuzz(options.out, read, options.seed)))
    if faults:
        _say(str(write_faults(options.out, faults, options.seed)))
    if soaked is not None:
        _say(str(write_soak(options.out, soaked, options.seed)))
    return 1 if defects or broken else 0


def _say(text: str) -> None:
    # A reason may quote letters that no terminal can show.
    sys.stdout.write(text.encode("ascii", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


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

    date, version = time.strftime("%Y-%m-%d"), torch.__version__.split("+")[0]
    device = device_name(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    path = folder / f"{result_stem(device, version)}{date}_{what}.csv"
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

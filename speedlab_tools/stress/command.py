"""`run.py stress`: prints what was tried and what broke, and keeps the figures."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from speedlab.common.errors import SpeedLabError
from speedlab.common.tables import growing_row

from ..cli.arguments import UsageError
from ..host.base import from_environment
from ..host.inprocess import enter
from .faults import run_faults
from .fuzz import HEADER, Tally, Target, fuzz, shares
from .readers import model_targets, pure_targets, trap_springs
from .results import SOAK_COLUMNS, soak_rows, write_faults, write_fuzz, write_soak
from .soak import LEAST_PROMPTS, SoakTally, run_soak
from .web_routes import route_targets
from .writers import FAULT_HEADER, FaultTally


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
    if not trap_springs():
        raise SpeedLabError("The trap for pickles does not work here, so nothing would be proved.")
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

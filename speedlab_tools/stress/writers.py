"""Faults while results are written: a process killed, a disk that is full, several writers at once."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from speedlab.common.errors import ResultsError
from speedlab.common.tables import growing_row
from speedlab.measure.record import CSV_COLUMNS
from speedlab.measure.store import RunStore
from speedlab.web.library import RunLibrary

from ..host.base import pack_root
from .small_disk import SmallDisk

_CHILD = Path(__file__).with_name("writer_child.py")
_ENDS_WITHIN_S = 120.0


@dataclass
class FaultTally:
    """Faults of one kind: how many were made, what was written around them, and what was lost or left."""

    fault: str
    faults: int = 0
    runs: int = 0
    halves: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """One line of the printed table."""
        return growing_row(self.fault, self.faults, self.runs, self.halves, len(self.broken), self.seconds)


FAULT_HEADER = growing_row("fault", "faults", "runs", "halves", "broken", "seconds")


def kill_while_writing(folder: Path, faults: int, rng: Random) -> FaultTally:
    """SIGKILL a writer at a random moment, again and again in one folder: what it said is written has to be there."""
    tally, run_ids = FaultTally("killed while writing"), []
    started = time.perf_counter()
    for _ in range(faults):
        with _child(folder, 10_000) as child:
            _until_ready(child)
            time.sleep(rng.uniform(0.0, 0.1))
            child.kill()
            run_ids += _ids(child.communicate(timeout=_ENDS_WITHIN_S)[0])
        tally.faults += 1
    tally.seconds = time.perf_counter() - started
    return check_written(tally, folder, run_ids)


def fill_the_disk(folder: Path, faults: int, rng: Random) -> FaultTally:
    """Writers that may write only so large a file: each ends with a sentence that names the file."""
    table = RunStore(folder).csv_path

    def limit() -> int:
        # Now the record is cut, now the row: both are larger than what is let through.
        size = table.stat().st_size if table.is_file() else 0
        return size + rng.randrange(1, 4000) if rng.random() < 0.7 else rng.randrange(1, 1500)

    tally, run_ids = _without_room(FaultTally("disk full"), folder, faults, limit)
    return check_written(tally, folder, run_ids)


def fill_small_disk(disk: SmallDisk, faults: int, rng: Random) -> FaultTally:
    """Writers on a real disk with a little room: each ends with a sentence that names the file."""
    folder = disk.path / "written"
    folder.mkdir(exist_ok=True)

    def no_limit() -> None:
        disk.fill(rng.randrange(16_384, 65_536))

    tally, run_ids = _without_room(FaultTally("writers, real disk full"), folder, faults, no_limit)
    disk.empty()
    return check_written(tally, folder, run_ids)


def _without_room(
    tally: FaultTally, folder: Path, faults: int, limit: Callable[[], int | None]
) -> tuple[FaultTally, list[str]]:
    """One writer after another, and the runs that they wrote. `limit` is called before each, and gives the size of file
    that it may write.
    """
    run_ids: list[str] = []
    started = time.perf_counter()
    for _ in range(faults):
        most = limit()
        with _child(folder, 10_000, most) as child:
            text = child.communicate(timeout=_ENDS_WITHIN_S)[0]
        run_ids += _ids(text)
        last = text.splitlines()[-1] if text.strip() else ""
        if child.returncode != 3 or "cannot write to" not in last:
            # A limit below the first probe of the folder is refused before anything is written.
            tally.broken.append(f"limit {most}: code {child.returncode}, {last!r}")
        tally.faults += 1
    tally.seconds = time.perf_counter() - started
    return tally, run_ids


def write_at_once(folder: Path, writers: int, runs: int) -> FaultTally:
    """Several processes write into one folder: each row stands in the table once."""
    tally, run_ids = FaultTally("writers at once", faults=writers), []
    started = time.perf_counter()
    children = [_start(folder, runs) for _ in range(writers)]
    try:
        for child in children:
            run_ids += _ids(child.communicate(timeout=_ENDS_WITHIN_S)[0])
    finally:
        for child in children:
            _end(child)
    if len(run_ids) != writers * runs:
        tally.broken.append(f"{writers * runs - len(run_ids)} runs were not written")
    tally.seconds = time.perf_counter() - started
    return check_written(tally, folder, run_ids)


def check_written(tally: FaultTally, folder: Path, run_ids: Sequence[str]) -> FaultTally:
    """Every run that was reported as written is whole in its file and once in the table; halves are read past."""
    store = RunStore(folder)
    tally.runs = len(run_ids)
    for run_id in run_ids:
        try:
            store.read(run_id)
        except ResultsError as error:
            tally.broken.append(f"{run_id}: {error}")
    rows = _rows(store.csv_path) if store.csv_path.is_file() else []
    whole = [row for row in rows if len(row) == len(CSV_COLUMNS) and row[CSV_COLUMNS.index("status")] == "ok"]
    times = Counter(row[CSV_COLUMNS.index("run_id")] for row in whole)
    tally.broken += [f"{run_id} is {times[run_id]} times in the table" for run_id in run_ids if times[run_id] != 1]
    tally.halves = len(rows) - len(whole)
    page = RunLibrary(store).page(limit=1)
    if page.skipped:
        tally.broken.append(f"{page.skipped} files are no whole records")
    left = [path.name for path in store.root.rglob("*.tmp")]
    if len(left) > tally.faults:
        tally.broken.append(f"{len(left)} temporary files are left by {tally.faults} faults")
    return tally


def _rows(table: Path) -> list[list[str]]:
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [row for row in rows[1:] if row]


def _start(folder: Path, count: int, limit: int | None = None) -> subprocess.Popen[str]:
    arguments = [str(pack_root()), str(folder), str(count), *([] if limit is None else [str(limit)])]
    command = [sys.executable, "-B", str(_CHILD), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextmanager
def _child(folder: Path, count: int, limit: int | None = None) -> Iterator[subprocess.Popen[str]]:
    child = _start(folder, count, limit)
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _until_ready(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    line = child.stdout.readline()
    if line.strip() != "ready":
        raise ResultsError(f"the writing process did not start: {line}{child.stdout.read()}")


def _ids(text: str) -> list[str]:
    """The run ids of whole lines; a line that was cut by the kill says nothing."""
    lines = text.split("\n")[:-1]
    return [line for line in lines if line and line != "ready" and not line.startswith("refused") and line[0].isdigit()]

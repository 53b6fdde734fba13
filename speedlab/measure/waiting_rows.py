"""Rows that results.csv could not take, for a spreadsheet held it: a small file a run, until it can be written again.

All of this happens under the table's lock. A row's file goes only after the table holds the row on disk, and a row that
the table holds already is not added again, so that a crash between the two neither loses a row nor writes it twice.
"""

from __future__ import annotations

import csv
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from .record import CSV_COLUMNS, RUN_ID

log = logging.getLogger(__name__)

_RUN_ID_PLACE = CSV_COLUMNS.index("run_id")


@dataclass(frozen=True)
class WaitingRow:
    """One row as the table takes it, with its line break, and the file where it waits."""

    path: Path
    line: bytes

    @property
    def run_id(self) -> str:
        """The run that the row is of."""
        return self.path.stem


def row_path(folder: Path, run_id: str) -> Path:
    """Where the row of a run waits."""
    return folder / f"{run_id}.csv"


def waiting_ids(folder: Path) -> tuple[str, ...]:
    """The runs whose rows wait, the earliest first. Raises OSError."""
    try:
        with os.scandir(folder) as entries:
            names = [Path(entry.name) for entry in entries if entry.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return ()
    return tuple(sorted(name.stem for name in names if name.suffix == ".csv" and RUN_ID.fullmatch(name.stem)))


def waiting_rows(folder: Path) -> list[WaitingRow]:
    """The rows that this version of the table can take. What is no such row stays where it is, with a warning."""
    rows = []
    for run_id in waiting_ids(folder):
        path = row_path(folder, run_id)
        try:
            header, line, rest = [*path.read_bytes().split(b"\r\n", 2), b"", b""][:3]
        except PermissionError as error:  # this file too may be open in a program; its turn comes later
            log.warning("SpeedLab: %s cannot be read and waits on: %s", path, error)
            continue
        if _cells(header) != list(CSV_COLUMNS) or _run_id_of(line) != run_id or rest:
            log.warning("SpeedLab: %s is no row of this version's table; it is left as it is.", path)
            continue
        rows.append(WaitingRow(path, line + b"\r\n"))
    return rows


def run_ids_in(table: Path) -> set[str]:
    """The runs that have a whole row in the table. Raises OSError."""
    try:
        lines = table.read_bytes().split(b"\n")[:-1]  # what stands behind the last line break is half a row
    except FileNotFoundError:
        return set()
    return {run_id for line in lines if (run_id := _run_id_of(line)) is not None}


def _run_id_of(line: bytes) -> str | None:
    cells = _cells(line)
    return cells[_RUN_ID_PLACE] if len(cells) == len(CSV_COLUMNS) else None


def _cells(line: bytes) -> list[str]:
    # No cell of ours holds a line break, so a row is a line, also behind half a row with an open quote.
    try:
        return next(csv.reader([line.decode("utf-8-sig", "replace").rstrip("\r\n")]), [])
    except csv.Error:
        return []

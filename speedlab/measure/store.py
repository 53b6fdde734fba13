"""Where records live: one JSON a run, one CSV for all, under ComfyUI's output folder.

A JSON appears under its name only when it is whole (temporary file, flush, rename). A CSV row is one append under a
lock; an append that fails half-way is cut off again, so earlier rows stay whole. Where another program holds the table
(a spreadsheet on Windows does) or keeps it locked, the row waits in a file of its own, and the next row that can be
written takes it in.

Only a row that waits for the lock is kept without it; all else happens under the table's lock. A row's file goes only
after the table holds the row on disk, and a row that the table holds already is not added again, so that a crash
between the two neither loses a row nor writes it twice.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ..common.errors import ResultsError, first_line
from .record import CSV_COLUMNS, RUN_ID, RunRecord, csv_row, from_json

log = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 30
_KEPT_APPENDED = 4096


_STAMP = "%Y%m%d-%H%M%S"
_last_stamp = ""
_stamp_lock = threading.Lock()


def new_run_id() -> str:
    """A sortable id that is unique without a look at the disk, also while the clock goes backwards."""
    global _last_stamp
    with _stamp_lock:
        stamp = time.strftime(_STAMP)
        if stamp < _last_stamp:
            stamp = (datetime.strptime(_last_stamp, _STAMP) + timedelta(seconds=1)).strftime(_STAMP)
        _last_stamp = stamp
    return f"{stamp}-{secrets.token_hex(4)}"


class RunStore:
    """Reads and writes the records under `<output>/speedlab`."""

    _appended: OrderedDict[str, None] = OrderedDict()
    _appended_lock = threading.Lock()

    def __init__(self, output: Path) -> None:
        self.root = output / "speedlab"
        self.runs = self.root / "runs"
        self.csv_path = self.root / "results.csv"
        self.waiting = self.root / "waiting"

    def json_path(self, run_id: str) -> Path:
        """The file of a run. Raises ResultsError for an id that is not one of ours, so it cannot hold a path."""
        if not RUN_ID.fullmatch(run_id):
            raise ResultsError(f"'{run_id}' is not a run id (YYYYMMDD-HHMMSS and eight hex digits).")
        return self.runs / f"{run_id}.json"

    def trace_path(self, run_id: str) -> Path:
        """The trace of a run, beside its record. Raises ResultsError as `json_path` does."""
        return self.json_path(run_id).with_suffix(".trace.json.gz")

    def check_writable(self) -> None:
        """Fail before minutes of sampling, not after. Raises ResultsError naming the path.

        A table that another program holds is no reason to: its row can wait.
        """
        try:
            self.refuse_symlink_out()
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs) as probe:
                probe.write(b"speedlab")
            try:
                if self.csv_path.exists():
                    with self.csv_path.open("ab"):
                        pass
                self._check_header()
            except PermissionError as error:
                if not self._is_held(error):
                    raise
                self.waiting.mkdir(exist_ok=True)
                log.warning("SpeedLab: %s", self._held_text(f"new rows wait in {self.waiting}"))
        except OSError as error:
            raise cannot_write(self.root, error) from error

    def write(self, record: RunRecord) -> Path:
        """Write or replace a run's JSON. Raises ResultsError naming the path; an earlier version then stays."""
        path = self.json_path(record.run_id)
        try:
            self.refuse_symlink_out()
            self.runs.mkdir(parents=True, exist_ok=True)
            write_atomically(path, record.to_json().encode())
            self._make_newest(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path

    def read(self, run_id: str) -> RunRecord:
        """Read a run back. Raises ResultsError for an unknown id or a file that is not whole."""
        path = self.json_path(run_id)
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"cannot read {path}: {first_line(error)}") from error
        except UnicodeDecodeError as error:
            raise ResultsError(f"{path} is not a record: it is no UTF-8 text") from error

    def keep(self, record: RunRecord) -> RunRecord:
        """Write a run's JSON and its row. The record comes back as it lies on disk; see `add_row`."""
        self.write(record)
        return self.add_row(record)

    def add_row(self, record: RunRecord) -> RunRecord:
        """Append the row of a run whose JSON is written; where the row has to wait, the JSON gets a warning.

        Raises ResultsError naming the path.
        """
        self.append_csv(record)
        if not self.is_waiting(record.run_id):
            return record
        note = self._held_text(f"the row of this run waits in {row_path(self.waiting, record.run_id)}")
        record = record.changed(warnings=(*record.warnings, note))
        self.write(record)
        return record

    def append_csv(self, record: RunRecord) -> bool:
        """Append the run's row once, and before it those that wait; False if this process appended it before.

        A row that the table cannot take, for another program holds or locks it, waits: see `is_waiting`. Raises
        ResultsError naming the path.
        """
        with self._appended_lock:
            if record.run_id in self._appended:
                return False
        self._add_rows(record)
        with self._appended_lock:
            self._appended[record.run_id] = None
            while len(self._appended) > _KEPT_APPENDED:
                self._appended.popitem(last=False)
        return True

    def take_in(self) -> None:
        """Add the rows that wait to the table, if it can be written now. Raises ResultsError naming the path."""
        if self.waiting_ids():
            self._add_rows(None)

    def is_waiting(self, run_id: str) -> bool:
        """Whether the run's row is not in the table yet."""
        return run_id in self.waiting_ids()

    def waiting_ids(self) -> tuple[str, ...]:
        """The runs whose rows wait for the table. Raises ResultsError naming the path."""
        try:
            self.refuse_symlink_out()
            return waiting_ids(self.waiting)
        except OSError as error:
            raise cannot_write(self.waiting, error) from error

    def _add_rows(self, record: RunRecord | None) -> None:
        from filelock import FileLock, Timeout

        try:
            self.refuse_symlink_out()
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(str(self.root / "results.csv.lock"), timeout=_LOCK_TIMEOUT_S):
                    self._add_rows_locked(record)
            except Timeout:
                if record is None:
                    raise
                self._let_wait(record)
        except Timeout as error:
            raise ResultsError(
                f"{self.csv_path} has been locked by another process for {_LOCK_TIMEOUT_S} s; the rows in "
                f"{self.waiting} wait on. Close that process, or delete the .lock file beside it if there is none."
            ) from error
        except OSError as error:
            raise cannot_write(self.csv_path, error) from error

    def _add_rows_locked(self, record: RunRecord | None) -> None:
        row = b"" if record is None else _csv_line(csv_row(record))
        try:
            self._check_header()
            waited = waiting_rows(self.waiting)
            # Only a crash leaves a row in both places, and only then the whole table has to be read.
            known = run_ids_in(self.csv_path) if waited else set()
            lines = b"".join(waiting.line for waiting in waited if waiting.run_id not in known) + row
            if lines:
                _append(self.csv_path, lines, _header_line())
        except PermissionError as error:
            if not self._is_held(error):
                raise
            if record is not None:
                self._let_wait(record)
            return
        for waiting in waited:
            with contextlib.suppress(PermissionError):  # open in a program itself: it is known as written next time
                waiting.path.unlink(missing_ok=True)

    def _let_wait(self, record: RunRecord) -> None:
        """Keep the row in a file of its own, which needs no lock. Raises OSError."""
        self.waiting.mkdir(exist_ok=True)
        write_atomically(row_path(self.waiting, record.run_id), _header_line() + _csv_line(csv_row(record)))
        log.warning("SpeedLab: %s", self._held_text(f"the row of run {record.run_id} waits in {self.waiting}"))

    def _is_held(self, error: PermissionError) -> bool:
        """Whether the table is there and this is about it, not about the folder that it lies in."""
        return self.csv_path.is_file() and str(error.filename or self.csv_path) == str(self.csv_path)

    def _held_text(self, what: str) -> str:
        return (
            f"{self.csv_path} cannot be written; is it open in another program, such as Excel, or locked by one? So "
            f"{what}, and the next run that can write the table adds it. Nothing is lost: close that program."
        )

    def _check_header(self) -> None:
        try:
            with self.csv_path.open(encoding="utf-8-sig", newline="") as file:
                header = next(csv.reader(file), None)
        except FileNotFoundError:
            return
        except (UnicodeDecodeError, csv.Error) as error:
            raise ResultsError(f"{self.csv_path} is not a results table. Move it away; it was not touched.") from error
        if header is not None and tuple(header) != CSV_COLUMNS:
            raise ResultsError(
                f"{self.csv_path} has other columns than this version of SpeedLab writes. Rename it, so that a new "
                "table can be started; it was not touched."
            )

    def folder(self, name: str) -> Path:
        """A folder for records, images or charts, made if it is not there. Raises ResultsError naming it."""
        path = self.root / name
        self.refuse_symlink_out()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path

    def was_reported(self, run_id: str) -> bool:
        """Whether this process wrote the run's row."""
        with self._appended_lock:
            return run_id in self._appended

    def refuse_symlink_out(self) -> None:
        """Raises ResultsError where a folder or table is a link that leads out of the output folder, or to itself."""
        base = self.root.parent.resolve()
        names = ("runs", "images", "charts", "waiting", "results.csv", "results.csv.lock")
        for path in (self.root, *(self.root / name for name in names)):
            if not leads_into(base, path):
                raise ResultsError(f"{path} is a link that leads out of {base}; SpeedLab does not write through it.")

    def _make_newest(self, path: Path) -> None:
        """Let a record be younger than all before it, for the oldest are deleted first: clocks go backwards."""
        with contextlib.suppress(OSError):  # then it is as old as its clock says
            with os.scandir(self.runs) as entries:
                others = (entry.stat(follow_symlinks=False).st_mtime_ns for entry in entries if entry.name != path.name)
                newest = max(others, default=0)
            if path.stat().st_mtime_ns <= newest:
                os.utime(path, ns=(newest + 1, newest + 1))


def leads_into(base: Path, path: Path) -> bool:
    """Whether a path, links followed, lies in a folder that has no link in its own path."""
    try:
        return path.resolve().is_relative_to(base)
    except (OSError, RuntimeError):  # before Python 3.13 a link to itself is a RuntimeError
        return False


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to disk, rename over it; on failure nothing of it is left. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_image(path: Path, image: Any, **options: Any) -> None:
    """Write a PIL image as PNG; on failure nothing of it is left. Raises ResultsError naming the path."""
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    try:
        path.write_bytes(data.getvalue())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def _append(path: Path, line: bytes, header: bytes) -> None:
    """Append whole lines; whatever a failing write left of it is cut off again."""
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            line = header + line
        else:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                log.warning("SpeedLab: %s ends in half a row, left by a crash; new rows start on a new line.", path)
                # A quote that the half row left open would join it with the rows after it.
                line = (b'"' if _last_line(file, end).count(b'"') % 2 else b"") + b"\r\n" + line
        try:
            if file.write(line) != len(line):
                raise OSError("the disk is full")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _last_line(file: Any, end: int) -> bytes:
    """What stands behind the last line break, of the last 64 KiB."""
    start = max(end - 65536, 0)
    file.seek(start)
    return bytes(file.read(end - start).rpartition(b"\n")[2])


def _header_line() -> bytes:
    return _csv_line({name: name for name in CSV_COLUMNS})


def _csv_line(row: dict[str, str]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, CSV_COLUMNS).writerow(row)
    return text.getvalue().encode()


def cannot_write(path: Path, error: OSError) -> ResultsError:
    """The error of a file that cannot be written, with what to do."""
    return ResultsError(
        f"SpeedLab cannot write to {path}: {error.strerror or first_line(error)}. Free some space, close a program "
        "that holds the file, or start ComfyUI with --output-directory on a folder that can be written."
    )


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

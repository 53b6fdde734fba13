"""The output folder of a fleet: what it was begun with, the rows as they came, the pictures, and the ordered manifest.

`fleet.json` says what was asked, `fleet.jsonl` has a row as soon as its pictures are whole (the last row of a task
counts), `manifest.jsonl` the same rows in the order of the prompts. A picture stands under its task's number, so that
whatever is made again takes the place of what was there.

Turns an answer into what stays: pictures, records, a row of results.csv and a row of the manifest.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from speedlab.common.errors import ResultsError
from speedlab.measure.record import RunRecord, from_json
from speedlab.measure.store import RunStore, cannot_write, write_atomically

from ..client.files import prepare_output
from .messages import Done, FleetError
from .pool import HandOut
from .tasks import ERROR, LOST, OK, PictureFile, Row, Task, row_of

PICTURES = "pictures"
_SHOWN = 60
# Behind the name of a picture that is on its way to another place.
_MOVING = ".moving"


class FleetFolder:
    """One fleet's folder. Use as a context manager: no second fleet writes there meanwhile. Raises FleetError."""

    def __init__(self, out: Path) -> None:
        self.out = prepare_output(out)
        self.begun = self.out / "fleet.json"
        self.journal = self.out / "fleet.jsonl"
        self.manifest = self.out / "manifest.jsonl"
        self.rows: dict[int, Row] = {}
        self._lock: Any = None

    def __enter__(self) -> FleetFolder:
        from filelock import FileLock, Timeout

        self._lock = FileLock(str(self.out / "fleet.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FleetError(f"Another fleet writes into {self.out}. Wait for it, or name another --out.") from error
        (self.out / PICTURES).mkdir(exist_ok=True)
        if not (self.out / PICTURES).resolve().is_relative_to(self.out):
            self._lock.release()
            raise FleetError(f"{self.out / PICTURES} is a link that leads out of {self.out}. Take it away.")
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def open(self, asked: Mapping[str, Any], tasks: Sequence[Task], *, restart: bool, accept: bool) -> list[int]:
        """Begin, or go on with what is there. Returns the tasks that have no good result yet.

        `asked` says what was asked for, by name. Where the folder was begun with something else, FleetError tells what
        differs; `accept` keeps the rows that are still asked for, at whatever place, `restart` keeps none. ResultsError
        where the folder cannot be written.
        """
        wanted = {**asked, "keys": [task.key for task in tasks]}
        before = None if restart else self._begun_with()
        rows = self._read()
        if restart:
            self._drop(rows.values())
            rows = {}
        elif before is not None and not accept:
            self._refuse_other(before, wanted)
        try:
            self.rows = self._in_place(rows, tasks)
            write_atomically(self.begun, json.dumps(wanted).encode())
            # Only what counts, each task once: what a crash left half or twice ends here.
            write_atomically(self.journal, "".join(row.line() for row in self.rows.values()).encode())
        except OSError as error:
            raise cannot_write(self.out, error) from error
        return [task.index for task in tasks if task.index not in self.rows or self.rows[task.index].status != OK]

    def keep(self, row: Row) -> None:
        """Append a row, on disk when this returns. Its pictures have to lie there already. Raises OSError."""
        with self.journal.open("ab") as file:
            file.write(row.line().encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows[row.index] = row

    def write_manifest(self) -> Path:
        """Write the ordered manifest of what there is. Raises ResultsError that names it."""
        ordered = "".join(self.rows[index].line() for index in sorted(self.rows))
        try:
            write_atomically(self.manifest, ordered.encode())
        except OSError as error:
            raise cannot_write(self.manifest, error) from error
        return self.manifest

    def picture(self, task: Task, number: int) -> tuple[str, Path]:
        """Name (below the output folder) and path of a task's picture; the first has number 0."""
        name = f"{PICTURES}/{task.index + 1:05d}{f'-{number}' if number else ''}.png"
        return name, self.out / name

    def _begun_with(self) -> dict[str, Any] | None:
        try:
            data = json.loads(self.begun.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise FleetError(f"{self.begun} cannot be read. --restart begins anew, or name another --out.") from error
        return data if isinstance(data, dict) else {}

    def _read(self) -> dict[int, Row]:
        """The last row of each task. Half a row at the end, left by a crash, is no row."""
        try:
            text = self.journal.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        rows = (row_of(line) for line in text.split("\n"))
        return {row.index: row for row in rows if row is not None}

    def _in_place(self, rows: Mapping[int, Row], tasks: Sequence[Task]) -> dict[int, Row]:
        """The whole rows that are still asked for, each at its task's place; pictures of the others are deleted."""
        for left_over in (self.out / PICTURES).glob(f"*{_MOVING}"):
            left_over.unlink()
        keys = {task.index: task.key for task in tasks}
        kept = {index: row for index, row in rows.items() if keys.get(index) == row.key}
        free: dict[str, list[Task]] = {}
        for task in tasks:
            if task.index not in kept:
                free.setdefault(task.key, []).append(task)
        others = [row for index, row in rows.items() if index not in kept]
        moved = [(row, free[row.key].pop(0)) for row in others if free.get(row.key)]
        going = {row.index for row, _ in moved}
        self._drop((row for row in others if row.index not in going), keep_journal=True)
        kept.update((row.index, row) for row in self._moved(moved))
        return {index: row for index, row in kept.items() if self._is_whole(row)}

    def _moved(self, moves: Sequence[tuple[Row, Task]]) -> list[Row]:
        """Rows at their tasks' places, and their pictures with them. All are put aside first: places may be swapped."""
        rows, aside = [], []
        for row, task in moves:
            names = [self.picture(task, number)[0] for number in range(len(row.pictures))]
            for old, new in zip(row.pictures, names, strict=True):
                path = self.out / old.file
                if path.is_file():
                    aside.append((path.rename(path.with_name(path.name + _MOVING)), self.out / new))
            pictures = tuple(replace(old, file=new) for old, new in zip(row.pictures, names, strict=True))
            rows.append(replace(row, index=task.index, name=task.name, pictures=pictures))
        for path, target in aside:
            path.replace(target)
        return rows

    def _is_whole(self, row: Row) -> bool:
        """Whether a row's pictures lie there bit for bit; a row without pictures is whole by itself."""
        return all(_holds(self.out / picture.file, picture) for picture in row.pictures)

    def _drop(self, rows: Iterable[Row], keep_journal: bool = False) -> None:
        for row in rows:
            for picture in row.pictures:
                (self.out / picture.file).unlink(missing_ok=True)
        self.manifest.unlink(missing_ok=True)
        if not keep_journal:
            self.journal.unlink(missing_ok=True)

    def _refuse_other(self, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        told = differences(before, wanted)
        if told:
            listed = "\n".join(f"  {line}" for line in told)
            raise FleetError(
                f"{self.out} was begun with something else:\n{listed}\n"
                "Name another --out; or --accept-changes goes on and keeps every result that is still asked for; or "
                "--restart begins anew."
            )


def _holds(path: Path, picture: PictureFile) -> bool:
    if not path.is_file() or path.stat().st_size != picture.bytes:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == picture.sha256


def differences(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of a fleet's order has changed, a line each, for a reader. None where the same results are asked for."""
    if before.get("keys") == wanted["keys"]:
        return []
    told = []
    for name, value in wanted.items():
        if name == "keys" or before.get(name) == value:
            continue
        if name == "prompts_sha256":
            told.append(_changed_prompts(before, wanted))
        elif name != "prompts":
            told.append(f"{name.replace('_', ' ')}: {_short(before.get(name))} then, {_short(value)} now")
    if not told:
        told.append("the scenario's graph: this version of SpeedLab builds another one")
    return told


def _changed_prompts(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    old, new = before.get("keys"), wanted["keys"]
    name = wanted.get("prompts")
    if not isinstance(old, list):
        return f"the prompts file {name}: another one"
    same = sum(one == other for one, other in zip(old, new, strict=False))
    pairs = enumerate(zip(old, new, strict=False), start=1)
    first = next((number for number, (a, b) in pairs if a != b), min(len(old), len(new)) + 1)
    return (
        f"the prompts file {name}: {len(old)} prompts then, {len(new)} now; {same} are the same, the first that "
        f"differs is number {first}"
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@dataclass(frozen=True)
class Origin:
    """Where and when a task ran: `machine` of the worker, `began` as seconds of the epoch, `seconds` until its answer,
    `shared` how many workers that machine had.
    """

    machine: str | None
    began: float
    seconds: float
    shared: int


class Keeper:
    """Writes what the workers send below one output folder. Raises ResultsError that names the path."""

    def __init__(self, folder: FleetFolder) -> None:
        self.folder = folder
        self.store = RunStore(folder.out)
        self.store.check_writable()

    def mend(self) -> None:
        """Append the rows of results.csv that a crash came before: their runs are in the manifest."""
        self.store.take_in()
        written = _run_ids(self.store.csv_path).union(self.store.waiting_ids())
        for row in self.folder.rows.values():
            for run_id in row.run_ids:
                if run_id in written:
                    continue
                try:
                    record = self.store.read(run_id)
                except ResultsError:  # somebody took it away or changed it since
                    continue
                self.store.add_row(record)

    def done(self, task: Task, hand_out: HandOut, answer: Done, origin: Origin) -> Row:
        """Keep a task's result; a record that makes no sense is the task's error."""
        try:
            records = [_marked(from_json(text), origin.shared) for text in answer.records]
        except ResultsError as error:
            return self.failed(task, hand_out, f"what the worker sent is {error}", origin)
        failures = [record.error or record.status for record in records if record.status != "ok"]
        failed = bool(records) and len(failures) == len(records)
        pictures = self._pictures(task, answer.pictures)
        # The worker's own pictures and charts are gone; what the record names has to be here.
        artifacts = {"images": [picture.file for picture in pictures]} if len(records) == 1 else {}
        records = [record.changed(artifacts=artifacts) for record in records]
        for record in records:
            self.store.write(record)
        row = _row(
            task, hand_out, origin, ERROR if failed else OK,
            pictures=pictures, run_ids=tuple(record.run_id for record in records),
            device=str(records[0].env.get("device") or "") or None if records else None,
            comfyui_seconds=round(answer.seconds, 3), error=failures[0] if failed else None,
        )  # fmt: skip
        self._keep(row)
        # After the manifest's row: that one says that the task is done, and `mend` appends what is missing here.
        for record in records:
            self.store.add_row(record)
        return row

    def failed(self, task: Task, hand_out: HandOut, error: str, origin: Origin, lost: bool = False) -> Row:
        """Keep a row for a task without a result."""
        row = _row(task, hand_out, origin, LOST if lost else ERROR, error=error)
        self._keep(row)
        return row

    def _keep(self, row: Row) -> None:
        try:
            self.folder.keep(row)
        except OSError as error:
            raise cannot_write(self.folder.journal, error) from error

    def _pictures(self, task: Task, pictures: Sequence[bytes]) -> tuple[PictureFile, ...]:
        kept = []
        for number, data in enumerate(pictures):
            name, path = self.folder.picture(task, number)
            try:
                write_atomically(path, data)
            except OSError as error:
                raise cannot_write(path, error) from error
            kept.append(PictureFile(name, hashlib.sha256(data).hexdigest(), len(data)))
        return tuple(kept)


def _row(
    task: Task, hand_out: HandOut, origin: Origin, status: str, *, pictures: tuple[PictureFile, ...] = (),
    run_ids: tuple[str, ...] = (), device: str | None = None, comfyui_seconds: float | None = None,
    error: str | None = None,
) -> Row:  # fmt: skip
    started = datetime.fromtimestamp(origin.began).astimezone().isoformat(timespec="milliseconds")
    return Row(
        index=task.index, name=task.name, prompt=task.prompt, negative=task.negative, seed=task.seed, status=status,
        pictures=pictures, run_ids=run_ids, worker=hand_out.worker, machine=origin.machine, device=device,
        attempts=hand_out.attempt, started=started,
        seconds=round(origin.seconds, 3), comfyui_seconds=comfyui_seconds, error=error, key=task.key,
    )  # fmt: skip


def _marked(record: RunRecord, shared: int) -> RunRecord:
    """The record with a word on what its times are worth."""
    if shared < 2:
        return record
    note = f"{shared} workers of a fleet shared this machine while it ran: its times compare with nothing"
    return record.changed(warnings=[*record.warnings, note])


def _run_ids(path: Path) -> set[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: Iterable[dict[str, str]] = csv.DictReader(file)
            return {row.get("run_id") or "" for row in rows}
    except FileNotFoundError:
        return set()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(f"{path} cannot be read: {error}. Move it away.") from error

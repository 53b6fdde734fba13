"""Turns an answer into what stays: pictures, records, a row of results.csv and a row of the manifest."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from speedlab.common.errors import ResultsError
from speedlab.measure.record import RunRecord, from_json
from speedlab.measure.store import RunStore, cannot_write, write_atomically

from .folder import FleetFolder
from .ledger import HandOut
from .messages import Done
from .tasks import ERROR, LOST, OK, PictureFile, Row, Task


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

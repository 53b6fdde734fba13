"""The output folder: what was asked, the rows as they came, images, records, and the ordered manifest.

`fleet.json` says what was asked, `fleet.jsonl` has a row as soon as its images are whole (the last row of a task
counts), `manifest.jsonl` the same rows in the order of the prompts. An image stands under its task's number, so that
whatever is made again takes the place of what was there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from speedlab.common.errors import ResultsError
from speedlab.measure.record import UNKNOWN, RunRecord, from_json
from speedlab.measure.store import RunStore, cannot_write, run_ids_in, write_atomically

from ..client.files import prepare_output
from . import FleetError
from .tasks import Task
from .worker import Done

OK, ERROR, LOST = "ok", "error", "lost"
_IMAGES = "pictures"
_SHOWN = 60
_COLD = (
    "This was the first prompt of its worker, which brought the weights to the device: how long a repeat takes from "
    "text to image is not known."
)
_ONCE = "Each cell ran once, without a warm-up, for its quality: its times may hold loading and compiling."
# Behind the name of an image that is on its way to another place.
_MOVING = ".moving"
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class ImageFile:
    """An image: its path below the output folder, sha256 and size in bytes."""

    # A name that the fleet gives: nothing else in a manifest is ever opened or deleted.
    file: Annotated[str, Field(pattern=r"^pictures/[0-9]{5,7}(-[0-9]{1,4})?\.png$")]
    sha256: str
    bytes: int


@dataclass(frozen=True, config=_STRICT)
class Row:
    """What became of a task. `status` is ok, error (ComfyUI's own), or lost (every worker that had it was lost).

    `seconds` go from hand-out to answer, `comfyui_seconds` are what ComfyUI took of them; `started` is local time.
    """

    index: Annotated[int, Field(ge=0)]
    name: str
    prompt: str
    negative: str | None
    seed: int | None
    status: str
    pictures: tuple[ImageFile, ...]
    run_ids: tuple[str, ...]
    worker: str | None
    machine: str | None
    device: str | None
    attempts: int
    started: str | None
    seconds: float | None
    comfyui_seconds: float | None
    error: str | None
    key: str

    def line(self) -> str:
        """The row as one line of JSON, ASCII, so that no letter of a prompt can break a line."""
        return json.dumps(asdict(self)) + "\n"


_ROW = TypeAdapter(Row)


def row_of(line: str) -> Row | None:
    """Read a line back; None for what is no row. The file may have been changed by hand."""
    try:
        return _ROW.validate_json(line)
    except ValidationError:
        return None


@dataclass(frozen=True)
class Attempt:
    """Who ran a task, where and when, as the row says it; `shared` is how many workers the machine had."""

    worker: str
    machine: str | None
    attempts: int
    started: str
    seconds: float
    shared: int = 1


class Writer:
    """Writes one fleet's folder. As a context manager it keeps other fleets out. Raises FleetError, ResultsError."""

    def __init__(self, out: Path) -> None:
        self.out = prepare_output(out)
        self.begun, self.journal = self.out / "fleet.json", self.out / "fleet.jsonl"
        self.manifest = self.out / "manifest.jsonl"
        self.rows: dict[int, Row] = {}
        self._pairs = False
        self.store = RunStore(self.out)
        self._lock = FileLock(str(self.out / "fleet.lock"))

    def __enter__(self) -> Writer:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FleetError(f"Another fleet writes into {self.out}. Wait for it, or name another --out.") from error
        (self.out / _IMAGES).mkdir(exist_ok=True)
        if not (self.out / _IMAGES).resolve().is_relative_to(self.out):
            self._lock.release()
            raise FleetError(f"{self.out / _IMAGES} is a link that leads out of {self.out}. Take it away.")
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def open(self, asked: Mapping[str, Any], tasks: Sequence[Task], *, restart: bool, accept: bool) -> list[int]:
        """Begin, or go on with what is there. Returns the tasks that have no good result yet.

        `asked` says what was asked for, by name. Where the folder was begun with something else, FleetError tells what
        differs; `accept` keeps the rows that are still asked for, at whatever place, `restart` keeps none.
        """
        wanted = {**asked, "keys": [task.key for task in tasks]}
        self._pairs = bool(asked.get("quality"))
        before = None if restart else self._begun_with()
        changes = [] if accept or before is None else differences(before, wanted)
        if changes:
            listed = "\n".join(f"  {line}" for line in changes)
            raise FleetError(
                f"{self.out} was begun with something else:\n{listed}\n"
                "Name another --out; or --accept-changes goes on and keeps every result that is still asked for; or "
                "--restart starts over."
            )
        try:
            self.rows = self._placed(self._read(), [] if restart else tasks)
            # Only what counts, each task once: what a crash left half or twice ends here.
            write_atomically(self.journal, "".join(row.line() for row in self.rows.values()).encode())
            write_atomically(self.begun, json.dumps(wanted).encode())
        except OSError as error:
            raise cannot_write(self.out, error) from error
        self.store.check_writable()
        self._mend_table()
        return [task.index for task in tasks if task.index not in self.rows or self.rows[task.index].status != OK]

    def done(self, task: Task, answer: Done, attempt: Attempt) -> Row:
        """Keep a task's result; a record that makes no sense is the task's error."""
        try:
            records = [from_json(text) for text in answer.records]
        except ResultsError as error:
            return self.failed(task, f"what the worker sent is {error}", attempt)
        failures = [record.error or record.status for record in records if record.status != "ok"]
        # A search for the most that fits ends with a failure; beside a baseline each of the two is wanted.
        failed = bool(failures) and (self._pairs or len(failures) == len(records))
        images = tuple(self._image(task, number, data) for number, data in enumerate(answer.images))
        # The worker's own images and charts are gone; what the record names has to be here.
        artifacts = {"images": [image.file for image in images]} if len(records) == 1 else {}
        note = f"{attempt.shared} workers of a fleet shared this machine while it ran: its times compare with nothing"
        notes = [*([note] if attempt.shared > 1 else []), *([_ONCE] if self._pairs else [])]
        records = [record.changed(artifacts=artifacts, warnings=[*record.warnings, *notes]) for record in records]
        records = [_without_cold_time(record) if answer.cold else record for record in records]
        for record in records:
            self.store.write(record)
        row = self._keep(
            task, attempt, ERROR if failed else OK, failures[0] if failed else None, images,
            tuple(record.run_id for record in records), round(answer.seconds, 3),
            str(records[0].env.get("device") or "") or None if records else None,
        )  # fmt: skip
        # After the journal's row: that one says that the task is done, and `open` appends what is missing here.
        for record in records:
            self.store.add_row(record)
        return row

    def failed(self, task: Task, error: str, attempt: Attempt, status: str = ERROR) -> Row:
        """Keep a row for a task without a result."""
        return self._keep(task, attempt, status, error)

    def write_manifest(self) -> Path:
        """Write the journal's rows in order. Raises ResultsError that names the manifest."""
        try:
            self.rows = self._read()  # an interrupt may have come between a row on disk and the one in memory
            ordered = "".join(self.rows[index].line() for index in sorted(self.rows))
            write_atomically(self.manifest, ordered.encode())
        except OSError as error:
            raise cannot_write(self.manifest, error) from error
        return self.manifest

    def _keep(
        self, task: Task, attempt: Attempt, status: str, error: str | None, pictures: tuple[ImageFile, ...] = (),
        run_ids: tuple[str, ...] = (), comfyui_seconds: float | None = None, device: str | None = None,
    ) -> Row:  # fmt: skip
        """Append a row, on disk when this returns. Its images lie there already."""
        origin = {name: value for name, value in asdict(attempt).items() if name != "shared"}
        row = Row(
            **asdict(task), **origin, status=status, error=error, pictures=pictures, run_ids=run_ids,
            comfyui_seconds=comfyui_seconds, device=device,
        )  # fmt: skip
        try:
            with self.journal.open("ab") as file:
                file.write(row.line().encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as failure:
            raise cannot_write(self.journal, failure) from failure
        self.rows[row.index] = row
        return row

    def _image(self, task: Task, number: int, data: bytes) -> ImageFile:
        name = _image_name(task, number)
        try:
            write_atomically(self.out / name, data)
        except OSError as error:
            raise cannot_write(self.out / name, error) from error
        return ImageFile(name, hashlib.sha256(data).hexdigest(), len(data))

    def _begun_with(self) -> dict[str, Any] | None:
        try:
            data = json.loads(self.begun.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise FleetError(f"{self.begun} cannot be read. --restart starts over, or name another --out.") from error
        return data if isinstance(data, dict) else {}

    def _read(self) -> dict[int, Row]:
        """The last row of each task. Half a row at the end, left by a crash, is no row."""
        try:
            text = self.journal.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        rows = (row_of(line) for line in text.split("\n"))
        return {row.index: row for row in rows if row is not None}

    def _placed(self, rows: Mapping[int, Row], tasks: Sequence[Task]) -> dict[int, Row]:
        """The whole rows that are still asked for, each at its task's place; images of the others are deleted."""
        self.manifest.unlink(missing_ok=True)
        for left_over in (self.out / _IMAGES).glob(f"*{_MOVING}"):
            left_over.unlink()
        keys = {task.index: task.key for task in tasks}
        kept = {index: row for index, row in rows.items() if keys.get(index) == row.key}
        free = defaultdict(list)
        for index, row in rows.items():
            if index not in kept:
                free[row.key].append(row)
        moved = [(free[task.key].pop(0), task) for task in tasks if task.index not in kept and free[task.key]]
        for row in (row for some in free.values() for row in some):
            for image in row.pictures:
                (self.out / image.file).unlink(missing_ok=True)
        # All images are put aside first: places may be swapped.
        aside: list[tuple[Path, Path]] = []
        for row, task in moved:
            images = tuple(replace(image, file=_image_name(task, n)) for n, image in enumerate(row.pictures))
            for old, new in zip(row.pictures, images, strict=True):
                path = self.out / old.file
                if path.is_file():
                    aside.append((path.rename(path.with_name(path.name + _MOVING)), self.out / new.file))
            kept[task.index] = replace(row, index=task.index, name=task.name, pictures=images)
        for path, target in aside:
            path.replace(target)
        return {index: row for index, row in kept.items() if all(self._holds(image) for image in row.pictures)}

    def _holds(self, image: ImageFile) -> bool:
        """Whether an image lies there bit for bit."""
        path = self.out / image.file
        if not path.is_file() or path.stat().st_size != image.bytes:
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == image.sha256

    def _mend_table(self) -> None:
        """Append the rows of results.csv that a crash came before: their runs are in the journal."""
        self.store.take_in()
        try:
            written = run_ids_in(self.store.csv_path).union(self.store.waiting_ids())
        except OSError as error:
            raise ResultsError(f"{self.store.csv_path} cannot be read: {error}. Move it away.") from error
        for run_id in (run_id for row in self.rows.values() for run_id in row.run_ids if run_id not in written):
            try:
                record = self.store.read(run_id)
            except ResultsError:  # it was removed or changed since
                continue
            self.store.add_row(record)


def _without_cold_time(record: RunRecord) -> RunRecord:
    """The record of a worker's first prompt without a time from text to image; a benchmark has its own warm-up."""
    if record.phases_ms.get("total") is None or record.summary.get("totals_ms"):
        return record
    phases = {**record.phases_ms, "to_device": UNKNOWN, "total": None}
    return record.changed(
        phases_ms=phases, summary={**record.summary, "images_per_min": None}, warnings=(*record.warnings, _COLD)
    )


def _image_name(task: Task, number: int) -> str:
    """The name of a task's image below the output folder; the first has number 0."""
    return f"{_IMAGES}/{task.index + 1:05d}{f'-{number}' if number else ''}.png"


def differences(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of a fleet's order has changed, a line each, for a reader. None where the same results are asked for."""
    old, new = before.get("keys"), wanted["keys"]
    if old == new:
        return []
    changes = []
    for name, value in wanted.items():
        if name in ("keys", "prompts") or before.get(name) == value:
            continue
        if name != "prompts_sha256":
            changes.append(f"{name.replace('_', ' ')}: {_short(before.get(name))} then, {_short(value)} now")
        elif not isinstance(old, list):
            changes.append(f"the prompts file {wanted['prompts']}: another one")
        else:
            same = [one == other for one, other in zip(old, new, strict=False)]
            first = [*same, False].index(False) + 1
            changes.append(
                f"the prompts file {wanted['prompts']}: {len(old)} prompts then, {len(new)} now; {sum(same)} are the "
                f"same, the first that differs is number {first}"
            )
    return changes or ["the scenario's graph: this version of SpeedLab builds another one"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."

"""The suite's results: one JSON that is also what a later call goes on from, and one CSV of the same rows."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from speedlab.common.errors import ResultsError
from speedlab.measure.store import write_atomically

SCHEMA = 1
SUFFIX = "_gpu.json"
SUFFIX_SMALL = "_gpu-small.json"
# A measurement that ended the process this often is given up: its row says so.
_ATTEMPTS = 2

COLUMNS = (
    "id", "shows", "status", "model", "dtype", "plan", "width", "height", "batch", "steps", "n", "first_s",
    "picture_s", "picture_min_s", "picture_max_s", "sampling_s", "encode_s", "decode_s", "ratio", "sampling_ratio",
    "images_per_min", "tflops", "peak_share", "peak_allocated_gb", "peak_reserved_gb", "peak_rss_gb", "relative_error",
    "graphs", "graph_breaks", "recompiles", "overhead_percent", "steps_over_wall", "gb_per_s", "flop_per_step", "note",
    "error", "device", "torch", "comfyui", "timestamp",
)  # fmt: skip
DIED = "died"


class Journal:
    """Rows by id. Every change is on disk before the call returns."""

    def __init__(self, path: Path, env: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.path, self.env, self.settings = path, dict(env), dict(settings)
        self.rows: dict[str, dict[str, Any]] = {}
        self.started: dict[str, int] = {}
        self.complete = False

    @staticmethod
    def read(path: Path, into: Path | None = None) -> Journal:
        """The journal of an earlier call, to go on in `into`. Raises ResultsError for a file that is none."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            journal = Journal(path if into is None else into, found["env"], found["settings"])
            journal.rows = {str(row["id"]): dict(row) for row in found["rows"]}
            journal.started = {str(name): int(count) for name, count in found["started"].items()}
            journal.complete = bool(found["complete"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(
                f"{path} holds no results of this suite ({type(error).__name__}: {error}). Move it away."
            ) from error
        return journal

    def begin(self, row: str) -> None:
        """Note that a measurement starts: it may take the process with it."""
        self.started[row] = self.started.get(row, 0) + 1
        self.save()

    def withdraw(self, row: str) -> None:
        """What was begun was left in good order, whatever came of it."""
        left = self.started.get(row, 0) - 1
        self.started = {**self.started, row: left} if left > 0 else self._without(row)
        self.save()

    def write(self, row: str, fields: Mapping[str, Any]) -> None:
        """The result of a measurement; `status` is ok where `fields` name no other."""
        env = {"device": self.env.get("device"), "torch": self.env.get("torch"), "comfyui": self.env.get("comfyui")}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.rows[row] = {"id": row, "status": "ok", **fields, **env, "timestamp": stamp}
        self.started = self._without(row)
        self.save()

    def drop(self, rows: Iterable[str]) -> None:
        """Forget these rows and what belongs to them (`row-...`), to measure them anew."""
        gone = tuple(rows)
        gone = (*gone, *dict.fromkeys(_overrun(row.partition("/")[0]) for row in gone))
        beside = tuple(f"{row}-" for row in gone)

        def stays(name: str) -> bool:
            return name not in gone and not name.startswith(beside)

        self.rows = {name: row for name, row in self.rows.items() if stays(name)}
        self.started = {name: count for name, count in self.started.items() if stays(name)}
        self.complete = False

    def drop_others(self, stacks: Mapping[str, str]) -> None:
        """Forget the rows that were measured with another stack of techniques than the one given for them."""
        known = {name: row.get("plan") for name, row in self.rows.items()}
        self.drop([name for name, stack in stacks.items() if name in known and known[name] != stack])

    def give_up(self) -> None:
        """Rows for what ended the process as often as it was tried."""
        for row in [row for row, count in self.started.items() if count >= _ATTEMPTS and row not in self.rows]:
            self.write(row, {"status": DIED, "error": f"the process ended inside of it {_ATTEMPTS} times"})

    def overran(self, block: str) -> bool:
        """Note that a block had its time and came to no row. Whether that is to be the end."""
        name = _overrun(block)
        self.begin(name)
        over = self.started[name] >= _ATTEMPTS
        if over:
            self.progressed(block)
        return over

    def progressed(self, block: str) -> None:
        """A block came to a row: what was noted of it is past."""
        if _overrun(block) in self.started:
            self.started = self._without(_overrun(block))
            self.save()

    def value(self, row: str, field: str) -> float | None:
        """A number of a row that went well."""
        found = self.rows.get(row, {})
        value = found.get(field)
        return float(value) if found.get("status") == "ok" and isinstance(value, (int, float)) else None

    def save(self) -> None:
        """Write both files whole. Raises ResultsError naming the path."""
        document = {
            "schema": SCHEMA,
            "about": "Random weights: times and memory are those of real models, pictures are noise. first_s of "
            "pictures: an earlier call may have compiled for it; the blocks compile-* begin with nothing compiled.",
            "complete": self.complete,
            "env": self.env,
            "settings": self.settings,
            "started": self.started,
            "rows": list(self.rows.values()),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(document, indent=1, default=str).encode())
            write_atomically(self.path.with_suffix(".csv"), self._csv().encode())
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        return text.getvalue()

    def _without(self, row: str) -> dict[str, int]:
        return {name: count for name, count in self.started.items() if name != row}


def _overrun(block: str) -> str:
    return f"{block}/-overrun"


def open_journal(
    out: Path, earlier: Iterable[Path], env: Mapping[str, Any], settings: Mapping[str, Any], *, small: bool, again: bool
) -> Journal:
    """The journal to go on with: the newest of this device and torch in `out` or `earlier`, else a new one in `out`.

    `again` begins anew. What was found elsewhere goes on under its name in `out`.
    """
    words = "-".join("".join(c if c.isalnum() or c == "." else " " for c in str(env["device"])).split()).lower()
    stem = f"{words}_torch{str(env['torch']).split('+')[0]}_"
    suffix = SUFFIX_SMALL if small else SUFFIX
    if not again:
        folders = dict.fromkeys((out, *earlier))
        found = [path for folder in folders for path in folder.glob(f"{stem}*{suffix}")]
        if found:
            newest = max(found, key=lambda path: (path.name, path.stat().st_mtime))
            return Journal.read(newest, out / newest.name)
    return Journal(out / f"{stem}{time.strftime('%Y-%m-%d')}{suffix}", env, settings)

"""What a finished run left: rows, images and file names.

What a series has done so far, kept beside its results, so that an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedlab.common.errors import ResultsError
from speedlab.measure.record import csv_row, from_json
from speedlab.measure.store import RunStore, write_atomically

from ..client.client import ComfyClient, ImageRef, RunResult
from ..client.errors import BenchError
from ..client.files import save_image

REPORT = "SpeedLabProfileReport"
SWEEP = "SpeedLabBenchmark"
SAVE = "SaveImage"
RUNS = "speedlab/runs"


@dataclass
class Outcome:
    """What one scenario left: rows as in results.csv, images, record files, and what went wrong."""

    name: str
    rows: list[dict[str, str]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    records: list[Path] = field(default_factory=list)
    table: Path | None = None
    error: str | None = None
    recalled: int = 0


def report_ids(result: RunResult) -> list[str]:
    """The run ids that the Profile Reports and Benchmarks of a run wrote, in node order."""
    reports = [node for node in result.outputs if result.graph.get(node, {}).get("class_type") in (REPORT, SWEEP)]
    return [str(entry["run_id"]) for node in reports for entry in result.outputs[node].get("speedlab", [])]


async def fetch_records(client: ComfyClient, result: RunResult, out: Path, outcome: Outcome) -> None:
    """Add the rows of a run. Records of a server that writes elsewhere are copied into `out`.

    A cell of a sweep may fail: that is its row. The run itself has failed only where no row is sound.
    """
    store = RunStore(out)
    failures: list[str] = []
    run_ids = report_ids(result)
    for run_id in run_ids:
        try:
            record = from_json((await client.view(ImageRef(f"{run_id}.json", RUNS, "output"))).decode())
        except ResultsError as error:
            raise BenchError(f"the server's record of run {run_id} is {error}") from error
        path = store.json_path(record.run_id)
        if not path.is_file():
            store.keep(record)
        outcome.rows.append(csv_row(record))
        outcome.records.append(path)
        outcome.table = store.csv_path
        if record.status != "ok":
            failures.append(record.error or record.status)
    if not run_ids:
        outcome.error = "the server reports no run: is that a ComfyUI with SpeedLab's nodes?"
    elif len(failures) == len(run_ids):
        outcome.error = failures[0]


def shown_images(result: RunResult) -> list[ImageRef]:
    """What Benchmark, Profile Report, or else Save Image, saved."""
    sheets = [image for image in result.images(SWEEP) if image.type == "output"]
    return sheets or result.images(REPORT) or result.images(SAVE)


async def fetch_images(client: ComfyClient, result: RunResult, folder: Path, name: str) -> list[Path]:
    """Fetch what a run saved, as `<name>.png`, `<name>-1.png` ..."""
    return [save_image(folder, name, await client.view(image)) for image in shown_images(result)]


_KEY_DIGITS = 16


def series_key(what: Mapping[str, Any]) -> str:
    """The name of a series: equal for equal scenarios, settings and models."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


class Journal:
    """One series' finished parts: scenario and graph number -> the run ids and images that it left."""

    def __init__(self, out: Path, key: str) -> None:
        self.path = out / "speedlab" / "series" / f"{key}.json"
        self.done: dict[str, dict[str, list[str]]] = self._read()

    def _read(self) -> dict[str, dict[str, list[str]]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                str(part): {name: [str(item) for item in entry[name]] for name in ("runs", "pictures")}
                for part, entry in data.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # Without a whole journal nothing is known to be done; running again is safe.
            return {}

    def finished(self, part: str, runs: list[str], images: list[Path]) -> None:
        """Note a part whose rows are written. Raises OSError."""
        self.done[part] = {"runs": runs, "pictures": [str(path) for path in images]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.done, indent=1).encode())

    def recall(self, part: str, out: Path, outcome: Outcome) -> bool:
        """Add what a finished part left to `outcome`; False where it is not finished, or its records are gone."""
        entry = self.done.get(part)
        if entry is None:
            return False
        store = RunStore(out)
        try:
            records = [store.read(run_id) for run_id in entry["runs"]]
        except ResultsError:
            return False
        outcome.rows += [csv_row(record) for record in records]
        outcome.records += [store.json_path(record.run_id) for record in records]
        outcome.images += [Path(path) for path in entry["pictures"] if _is_file(path)]
        outcome.table = store.csv_path
        return True

    def close(self) -> None:
        """The series is whole: the same command starts a new one."""
        self.path.unlink(missing_ok=True)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # names that no file can have
        return False

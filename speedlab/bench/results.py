"""What a finished run left: rows, pictures and file names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..profiling.record import csv_row, from_json
from ..profiling.store import RunStore
from .client import ComfyClient, ImageRef, RunResult
from .files import save_picture

REPORT = "SpeedLabProfileReport"
SAVE = "SaveImage"
RUNS = "speedlab/runs"


@dataclass
class Outcome:
    """What one scenario left: rows as in results.csv, pictures, record files, and what went wrong."""

    name: str
    rows: list[dict[str, str]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    records: list[Path] = field(default_factory=list)
    table: Path | None = None
    error: str | None = None


def report_ids(result: RunResult) -> list[str]:
    """The run ids that the Profile Reports of a run wrote, in node order."""
    reports = [node for node in result.outputs if result.graph.get(node, {}).get("class_type") == REPORT]
    return [str(entry["run_id"]) for node in reports for entry in result.outputs[node].get("speedlab", [])]


async def fetch_records(client: ComfyClient, result: RunResult, out: Path, outcome: Outcome) -> None:
    """Add the rows of a run. Records of a server that writes elsewhere are copied into `out`."""
    store = RunStore(out)
    for run_id in report_ids(result):
        record = from_json((await client.view(ImageRef(f"{run_id}.json", RUNS, "output"))).decode())
        path = store.json_path(record.run_id)
        if not path.is_file():
            store.write(record)
            store.append_csv(record)
        outcome.rows.append(csv_row(record))
        outcome.records.append(path)
        outcome.table = store.csv_path
        if record.status != "ok":
            outcome.error = record.error or record.status


async def fetch_pictures(client: ComfyClient, result: RunResult, folder: Path, name: str) -> list[Path]:
    """Fetch what Profile Report, or else Save Image, saved into `folder` as `<name>.png`, `<name>-1.png` ..."""
    return [
        save_picture(folder, name, await client.view(image)) for image in result.images(REPORT) or result.images(SAVE)
    ]

"""A sweep in words: the articles' table in Markdown, with spread and quality, and the notes under it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..common.tables import HEADER, NOTHING, cells, seconds
from ..measure.record import RunRecord, csv_row
from .cell_record import CellRuns
from .growth import GROWTH
from .sweep import SweepResult

RAM_COLUMN = "RAM growth"
_MORE = ("min", "max", "std", "first run", "images/min", "PSNR", "SSIM", "status")


def markdown_table(result: SweepResult) -> str:
    """The table, one row a cell in the order of the grid, and the notes. The articles' columns come first."""
    done = [runs for runs in in_grid_order(result.cells) if runs.record is not None]
    rows = [_row(runs) for runs in done]
    header = [*HEADER, RAM_COLUMN, *_MORE]
    if any(_lpips(runs) for runs in done):
        header = [*header, "LPIPS"]
        rows = [[*row, _lpips(runs) or NOTHING] for row, runs in zip(rows, done, strict=True)]
    lines = [_line(header), _line(["---"] * len(header)), *(_line(row) for row in rows)]
    return "\n".join([*lines, "", *_notes(result, done)]).rstrip()


def in_grid_order(all_cells: Sequence[CellRuns]) -> list[CellRuns]:
    """Cells row by row; batches that a search added stand in the order of their size."""
    return sorted(all_cells, key=lambda runs: (runs.cell.y, _size(runs), runs.cell.x))


def _size(runs: CellRuns) -> int:
    return runs.cell.settings.batch if any(axis == "batch" for axis, _ in runs.cell.labels) else 0


def _row(runs: CellRuns) -> list[str]:
    record = runs.record
    assert record is not None
    row = csv_row(record)
    plain = list(cells(row))
    # Cells tells a failure in the time column; here the status has a column of its own.
    plain[2] = seconds(float(row["time_s"])) if row["time_s"] else NOTHING
    growth = record.memory.get("overall", {}).get(GROWTH)
    plain[-1] = NOTHING if growth is None else f"{growth:.2f} GB"
    # One run has no spread.
    known = len(runs.repeats) > 1
    spread = [_time(row[name]) if known else NOTHING for name in ("time_min_s", "time_max_s", "time_std_s")]
    first = record.summary.get("first_run_ms")
    rate = row["images_per_min"]
    return [
        *plain,
        *spread,
        NOTHING if first is None else seconds(float(first) / 1000.0),
        f"{float(rate):.2f}" if rate else NOTHING,
        *_quality(runs, row),
        _status(record),
    ]


def _quality(runs: CellRuns, row: dict[str, str]) -> list[str]:
    if runs.baseline is runs.cell and len(runs.cell.labels) > 0:
        return ["baseline", "baseline"]
    psnr, ssim = row["psnr"], row["ssim"]
    return [f"{float(psnr):.1f} dB" if psnr else NOTHING, f"{float(ssim):.4f}" if ssim else NOTHING]


def _lpips(runs: CellRuns) -> str:
    return f"{runs.quality.lpips:.3f}" if runs.quality is not None and runs.quality.lpips is not None else ""


def _status(record: RunRecord) -> str:
    """The status, its error, and what was asked for where something else ran."""
    label = record.request.get("label")
    told = record.status if label is None else f"{record.status}, asked for {label}"
    return told if record.error is None else f"{told}: {record.error}"


def _time(text: str) -> str:
    return seconds(float(text)) if text else NOTHING


def _notes(result: SweepResult, done: Sequence[CellRuns]) -> list[str]:
    record = next((runs.record for runs in done if runs.record is not None), None)
    lines = [f"* {_plain(note)}" for note in result.notes]
    if record is not None:
        env = record.env
        lines.append(f"* Measured on {env.get('device')}, torch {env.get('torch')}, ComfyUI {env.get('comfyui')}.")
    return lines


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(part).replace("|", "\\|") for part in parts) + " |"


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()

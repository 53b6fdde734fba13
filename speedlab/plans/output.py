"""What the Benchmark node returns and writes to files: table, plot, contact sheet, and all of them as an HTML page.

A sweep in words: the articles' table in Markdown, with spread and quality, and the notes under it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..common.errors import SpeedLabError
from ..common.tables import HEADER, NOTHING, cells, markdown_table, seconds
from ..measure.peaks import GROWTH
from ..measure.record import RunRecord, csv_row
from ..measure.store import RunStore, cannot_write, write_atomically
from .axes import whole_number
from .cell import Prompt
from .cell_record import CellRuns
from .page import html_page
from .plot import for_browser, sweep_plot
from .sheet import contact_sheet, keep_image
from .sweep import SweepResult

_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class SweepOutput:
    """The node's outputs, and what its `ui` tells the browser and the command line."""

    table: str
    plot: Any
    sheet: Any
    csv_path: str
    ui: dict[str, list[Any]]


def write_output(result: SweepResult, store: RunStore, workflow: str | None) -> SweepOutput:
    """Draw, save and gather. Raises ResultsError naming the path. `workflow` is the id of the canvas's."""
    header, rows, notes = _table(result)
    table = markdown_table(header, rows, notes)
    plot = sweep_plot(result)
    sheet = contact_sheet(result.cells, result.thumbnails, result.axis_x, result.axis_y)
    files = [
        keep_image(store, "charts", f"{result.sweep_id}_plot.png", plot),
        keep_image(store, "images", f"{result.sweep_id}_sheet.png", sheet),
    ]
    title = f"SpeedLab Benchmark: {result.axis_x.name}" + (
        "" if result.axis_y.name == "none" else f" and {result.axis_y.name}"
    )
    record = next((runs.record for runs in result.cells if runs.record is not None), None)
    page = html_page(
        title, notes, (header, rows), [("contact sheet", sheet), ("plot", plot)], {} if record is None else record.env
    )
    for name, text in (("table.md", table + "\n"), ("page.html", page)):
        path = store.root / "charts" / f"{result.sweep_id}_{name}"
        try:
            write_atomically(path, text.encode())
        except OSError as error:
            raise cannot_write(path, error) from error
    # `speedlab` names every run, as Profile Report does, so that a client finds their records.
    runs: list[Any] = [
        {"run_id": runs.run_id, "status": runs.status, "plan": runs.record.request["plan"], "cell": runs.cell.name}
        for runs in in_grid_order(result.cells)
        if runs.record is not None
    ]
    ui: dict[str, list[Any]] = {"text": [table], "images": [_view(file) for file in files], "speedlab": runs}
    ui["speedlab_workflow"] = [workflow]  # whose node shows this, of those that a browser has open
    # The same for the node's face, which draws it in the colours of the page.
    ui["speedlab_sweep"] = [
        {
            "header": header,
            "rows": rows,
            "notes": notes,
            "plot": for_browser(result),
            "sheet": _view(files[1]),
            "page": _view(path.relative_to(store.root.parent).as_posix()),
        }
    ]
    return SweepOutput(table, plot, sheet, str(store.csv_path), ui)


def read_prompts(positive: str, negative: str, seeds: str) -> tuple[Prompt, ...]:
    """One prompt a line, with one seed for all or one each. Raises SpeedLabError where their numbers differ."""
    texts = [line.strip() for line in positive.splitlines() if line.strip()] or [""]
    numbers = [whole_number(line.strip(), "seed") for line in seeds.replace(",", "\n").splitlines() if line.strip()]
    if not numbers:
        raise SpeedLabError("There is no seed: write one number, or one a prompt.")
    outside = [number for number in numbers if not 0 <= number <= _LARGEST_SEED]
    if outside:
        raise SpeedLabError(f"seed {outside[0]}: seeds run from 0 to {_LARGEST_SEED}.")
    if len(numbers) == 1:
        numbers *= len(texts)
    if len(numbers) != len(texts):
        raise SpeedLabError(
            f"There are {len(texts)} prompts and {len(numbers)} seeds: write one seed, or one a prompt."
        )
    return tuple(Prompt(text, negative, seed) for text, seed in zip(texts, numbers, strict=True))


def _view(file: str) -> dict[str, str]:
    path = PurePosixPath(file)
    return {"filename": path.name, "subfolder": str(path.parent), "type": "output"}


RAM_COLUMN = "RAM growth"
# Of what the prompts ask the model that draws for, the share that its images show.
ATTRIBUTES = "attributes right"
_MORE = ("min", "max", "std", "first run", "images/min", "PSNR", "SSIM", "status")


def _table(result: SweepResult) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, one row a cell in the order of the grid, and the notes. The articles' columns come first."""
    done = [runs for runs in in_grid_order(result.cells) if runs.record is not None]
    rows = [_row(runs) for runs in done]
    header = [*HEADER, RAM_COLUMN, *_MORE]
    if any(_lpips(runs) for runs in done):
        header = [*header, "LPIPS"]
        rows = [[*row, _lpips(runs) or NOTHING] for row, runs in zip(rows, done, strict=True)]
    if any(runs.attributes is not None for runs in done):
        header = [*header, ATTRIBUTES]
        rows = [[*row, share(runs.attributes)] for row, runs in zip(rows, done, strict=True)]
    return header, [[_plain(cell) for cell in row] for row in rows], _notes(result, done)


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


def share(known: float | None) -> str:
    """A share as a cell of a table."""
    return NOTHING if known is None else f"{known:.0%}"


def _lpips(runs: CellRuns) -> str:
    return f"{runs.quality.lpips:.3f}" if runs.quality is not None and runs.quality.lpips is not None else ""


def _status(record: RunRecord) -> str:
    """The status, its error, and what was asked for where something else ran."""
    label = record.request.get("label")
    text = record.status if label is None else f"{record.status}, asked for {label}"
    return text if record.error is None else f"{text}: {record.error}"


def _time(text: str) -> str:
    return seconds(float(text)) if text else NOTHING


def _notes(result: SweepResult, done: Sequence[CellRuns]) -> list[str]:
    record = next((runs.record for runs in done if runs.record is not None), None)
    lines = [_plain(note) for note in result.notes]
    if record is not None:
        env = record.env
        lines.append(f"Measured on {env.get('device')}, torch {env.get('torch')}, ComfyUI {env.get('comfyui')}.")
    return lines


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()

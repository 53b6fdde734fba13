"""What the Benchmark node hands on and keeps as files: table, plot, contact sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..common.errors import SpeedLabError
from ..measure.store import RunStore, cannot_write, write_atomically
from .measure import Prompt
from .plot import sweep_plot
from .settings import whole_number
from .sheet import contact_sheet, save_picture
from .sweep import SweepResult
from .table import in_grid_order, markdown_table

_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class SweepOutput:
    """The node's outputs, and what its `ui` tells the browser and the command line."""

    table: str
    plot: Any
    sheet: Any
    csv_path: str
    ui: dict[str, list[Any]]


def write_output(result: SweepResult, store: RunStore) -> SweepOutput:
    """Draw, save and gather. Raises ResultsError naming the path."""
    table = markdown_table(result)
    plot = sweep_plot(result)
    sheet = contact_sheet(result.cells, result.thumbnails, result.axis_x, result.axis_y)
    files = [
        save_picture(store, "charts", f"{result.sweep_id}_plot.png", plot),
        save_picture(store, "images", f"{result.sweep_id}_sheet.png", sheet),
    ]
    path = store.root / "charts" / f"{result.sweep_id}_table.md"
    try:
        write_atomically(path, (table + "\n").encode())
    except OSError as error:
        raise cannot_write(path, error) from error
    # `speedlab` names every run, as Profile Report does, so that a client finds their records.
    runs: list[Any] = [
        {"run_id": runs.run_id, "status": runs.status, "plan": runs.cell.settings.plan, "cell": runs.cell.name}
        for runs in in_grid_order(result.cells)
        if runs.record is not None
    ]
    ui: dict[str, list[Any]] = {"text": [table], "images": [_view(file) for file in files], "speedlab": runs}
    return SweepOutput(table, plot, sheet, str(store.csv_path), ui)


def read_prompts(positive: str, negative: str, seeds: str) -> tuple[Prompt, ...]:
    """One prompt a line, with one seed for all or one a line. Raises SpeedLabError where their numbers differ."""
    texts = [line.strip() for line in positive.splitlines() if line.strip()] or [""]
    numbers = [whole_number(line.strip(), "seed") for line in seeds.replace(",", "\n").splitlines() if line.strip()]
    if not numbers:
        raise SpeedLabError("There is no seed: write one number, or one a line.")
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

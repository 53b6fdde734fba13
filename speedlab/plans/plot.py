"""The sweep as an image: time with error bars, memory, and throughput or quality where the axis has them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UnavailableError, first_line
from ..measure.charts import blank, new_figure, to_image
from ..measure.peaks import GROWTH
from ..measure.record import RunRecord
from .axes import Axis
from .cell_record import CellRuns
from .sweep import SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

_NUMERIC = frozenset({"batch", "steps", "cfg", "prompt_tokens", "deepcache_interval", "cfg_stop_at", "handoff"})
_MANY_TIMES = 16.0
_COLOURS = ("#3b7dd8", "#e07a5f", "#4caf7d", "#b07cc6", "#e0a030", "#5f6b7a", "#c94f7c", "#2a9d8f")


def sweep_plot(result: SweepResult) -> Any:
    """The plot as an IMAGE tensor [1, H, W, 3] in 0..1; without matplotlib a small white one and a word in the log."""
    try:
        return _draw(result)
    except UnavailableError as error:
        log.warning("SpeedLab: %s", error)
        return blank()
    except ValueError as error:
        # A font that lacks a letter, or a label that cannot be set: no reason to lose the measurements.
        log.warning("SpeedLab: the sweep cannot be drawn: %s", first_line(error))
        return blank()


def _draw(result: SweepResult) -> Any:
    panels: list[tuple[str, Callable[[CellRuns], float | None], bool]] = [
        ("seconds, text to image", _seconds, True),
        (_memory_name(result), _memory, False),
    ]
    if "batch" in (result.axis_x.name, result.axis_y.name):
        panels.append(("images a minute", _rate, False))
    if any(runs.quality is not None and runs.quality.psnr != float("inf") for runs in result.cells):
        panels += [("PSNR against the baseline, dB", _psnr, False), ("SSIM against the baseline", _ssim, False)]
    figure = new_figure(9.0, 3.0 * len(panels) + 0.4)
    record = next((runs.record for runs in result.cells if runs.record is not None), None)
    if record is not None:
        figure.suptitle(_title(record), fontsize=9, x=0.02, ha="left")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (name, value, with_errors) in zip(all_axes, panels, strict=True):
        _panel(axes, result, name, value, with_errors)
    figure.tight_layout()
    return to_image(figure)


def _panel(
    axes: Axes, result: SweepResult, name: str, value: Callable[[CellRuns], float | None], with_errors: bool
) -> None:
    axis = result.axis_x
    numbers = positions(axis)
    for index, other in enumerate(result.axis_y.values):
        mine = [runs for runs in result.cells if runs.cell.y == index]
        known = [(numbers[runs.cell.x], v, runs) for runs in mine if (v := value(runs)) is not None]
        points = sorted(known, key=lambda point: point[0])
        if not points:
            continue
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        errors = _errors([point[2] for point in points]) if with_errors else None
        line = "none" if _is_named(axis) else "-"
        axes.errorbar(
            xs, ys, yerr=errors, marker="o", linestyle=line, capsize=3, color=_COLOURS[index % len(_COLOURS)],
            label=_plain(f"{result.axis_y.name} {other.label}"),
        )  # fmt: skip
    axes.set_ylabel(name, fontsize=8)
    axes.set_xlabel(axis.name, fontsize=8)
    axes.set_xticks(numbers, [_plain(value.label) for value in axis.values], fontsize=8)
    if _spans_wide(axis, numbers):
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [_plain(value.label) for value in axis.values], fontsize=8)
        axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if result.axis_y.name != "none":
        axes.legend(fontsize=7, frameon=False)


def _plain(label: str) -> str:
    """Two dollar signs would be read as a formula."""
    return label.replace("$", r"\$")


def positions(axis: Axis) -> list[float]:
    """Where the values stand on the plot: numbers to scale, sizes by their pixels, names one after another."""
    labels = [value.label for value in axis.values]
    sizes = [re.fullmatch(r"(\d+)x(\d+)", label) for label in labels]
    if axis.name == "resolution" and all(sizes):
        return [int(size[1]) * int(size[2]) / 1e6 for size in sizes if size is not None]
    if _is_named(axis):
        return [float(index) for index in range(len(labels))]
    return [float(label) for label in labels]


def _is_named(axis: Axis) -> bool:
    if axis.name == "resolution":
        return False
    return axis.name not in _NUMERIC or not all(_is_number(value.label) for value in axis.values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _spans_wide(axis: Axis, numbers: Sequence[float]) -> bool:
    return not _is_named(axis) and min(numbers) > 0 and max(numbers) / min(numbers) >= _MANY_TIMES


def _errors(cells: Sequence[CellRuns]) -> list[list[float]]:
    """How far minimum and maximum lie from the median, in seconds."""
    below, above = [], []
    for runs in cells:
        totals, median = runs.totals_ms(), _seconds(runs) or 0.0
        below.append(max(median - min(totals) / 1000.0, 0.0))
        above.append(max(max(totals) / 1000.0 - median, 0.0))
    return [below, above]


def _seconds(runs: CellRuns) -> float | None:
    total = runs.record.phases_ms.get("total") if runs.record is not None else None
    return total / 1000.0 if isinstance(total, (int, float)) else None


def _memory(runs: CellRuns) -> float | None:
    overall = runs.record.memory.get("overall", {}) if runs.record is not None else {}
    vram = overall.get("peak_allocated_gb")
    return overall.get(GROWTH) if vram is None else vram


def _memory_name(result: SweepResult) -> str:
    seen = [runs.record.memory.get("overall", {}) for runs in result.cells if runs.record is not None]
    on_card = any(overall.get("peak_allocated_gb") is not None for overall in seen)
    return "peak VRAM, GB" if on_card else "growth of RAM, GB"


def _rate(runs: CellRuns) -> float | None:
    rate = runs.record.summary.get("images_per_min") if runs.record is not None else None
    return float(rate) if rate else None


def _psnr(runs: CellRuns) -> float | None:
    # Equal images have no finite distance, so they have no place on this panel.
    return runs.quality.psnr if runs.quality is not None and runs.quality.psnr != float("inf") else None


def _ssim(runs: CellRuns) -> float | None:
    return runs.quality.ssim if runs.quality is not None else None


def _title(record: RunRecord) -> str:
    return f"{record.env.get('device')}, torch {record.env.get('torch')}, ComfyUI {record.env.get('comfyui')}"

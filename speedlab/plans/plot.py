"""The sweep drawn: time with error bars, memory, and throughput or quality where the axis has them.

As an image by matplotlib, and as the numbers of which the browser draws the same in its own colours.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Series:
    """One line of a panel: (number of the axis's value, median, minimum, maximum) of each cell that has a value."""

    label: str
    points: list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Panel:
    """One quantity over axis x; `from_zero` where a value of nothing means something."""

    name: str
    from_zero: bool
    series: list[Series]


def panels(result: SweepResult) -> list[Panel]:
    """What there is to draw."""
    wanted: list[tuple[str, Callable[[CellRuns], float | None], bool]] = [
        ("seconds, text to image", _seconds, True),
        (_memory_name(result), _memory, True),
    ]
    if "batch" in (result.axis_x.name, result.axis_y.name):
        wanted.append(("images a minute", _rate, True))
    if any(runs.quality is not None and runs.quality.psnr != float("inf") for runs in result.cells):
        wanted += [("PSNR against the baseline, dB", _psnr, False), ("SSIM against the baseline", _ssim, False)]
    return [Panel(name, from_zero, _series(result, value)) for name, value, from_zero in wanted]


def _series(result: SweepResult, value: Callable[[CellRuns], float | None]) -> list[Series]:
    numbers, found = positions(result.axis_x), []
    for index, other in enumerate(result.axis_y.values):
        cells = sorted((runs for runs in result.cells if runs.cell.y == index), key=lambda runs: numbers[runs.cell.x])
        known = [(runs, v) for runs in cells if (v := value(runs)) is not None]
        points = [(runs.cell.x, v, *(_range(runs, v) if value is _seconds else (v, v))) for runs, v in known]
        found.append(Series(f"{result.axis_y.name} {other.label}", points))
    return found


def for_browser(result: SweepResult) -> dict[str, Any]:
    """The panels in plain values, with the axis that all share: where its values stand from 0 to 1, and round marks."""
    axis = result.axis_x
    numbers = positions(axis)
    at = [math.log2(number) for number in numbers] if _spans_wide(axis, numbers) else numbers
    first, length = min(at), max(at) - min(at)
    one_series = result.axis_y.name == "none"
    return {
        "axis": axis.name,
        "labels": [value.label for value in axis.values],
        "at": [(number - first) / length if length else 0.5 for number in at],
        "lines": not _is_named(axis),
        "panels": [
            {
                "name": panel.name,
                "marks": _marks(panel),
                "series": [
                    {"label": "" if one_series else series.label, "points": series.points} for series in panel.series
                ],
            }
            for panel in panels(result)
        ],
    }


def _marks(panel: Panel) -> list[float]:
    """About five round values from below the smallest to above the largest; none where there is nothing to draw."""
    points = [point for series in panel.series for point in series.points]
    if not points:
        return []
    low, high = 0.0 if panel.from_zero else min(point[2] for point in points), max(point[3] for point in points)
    rough = (high - low) / 4 or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor for factor in (1, 2, 5, 10) if factor * power >= rough) * power
    first = math.floor(low / step)
    return [number * step for number in range(first, max(math.ceil(high / step), first + 1) + 1)]


def _draw(result: SweepResult) -> Any:
    shown = panels(result)
    figure = new_figure(9.0, 3.0 * len(shown) + 0.4)
    record = next((runs.record for runs in result.cells if runs.record is not None), None)
    if record is not None:
        figure.suptitle(_title(record), fontsize=9, x=0.02, ha="left")
    all_axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, shown, strict=True):
        _panel(axes, result, panel)
    figure.tight_layout()
    return to_image(figure)


def _panel(axes: Axes, result: SweepResult, panel: Panel) -> None:
    axis = result.axis_x
    numbers = positions(axis)
    for index, series in enumerate(panel.series):
        if not series.points:
            continue
        places, ys, lows, highs = zip(*series.points, strict=True)
        errors = [[y - low for y, low in zip(ys, lows, strict=True)], [h - y for h, y in zip(highs, ys, strict=True)]]
        axes.errorbar(
            [numbers[place] for place in places], ys, yerr=errors if lows != highs else None, marker="o",
            linestyle="none" if _is_named(axis) else "-", capsize=3, color=_COLOURS[index % len(_COLOURS)],
            label=_plain(series.label),
        )  # fmt: skip
    axes.set_ylabel(panel.name, fontsize=8)
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


def _range(runs: CellRuns, median: float) -> tuple[float, float]:
    """Minimum and maximum of the whole times, in seconds."""
    totals = [total / 1000.0 for total in runs.totals_ms()]
    return min([median, *totals]), max([median, *totals])


def _seconds(runs: CellRuns) -> float | None:
    total = runs.record.phases_ms.get("total") if runs.record is not None else None
    return total / 1000.0 if isinstance(total, (int, float)) else None


def _memory(runs: CellRuns) -> float | None:
    overall = runs.record.memory.get("overall", {}) if runs.record is not None else {}
    vram = overall.get("peak_allocated_gb")
    return overall.get(GROWTH) if vram is None else vram


def _memory_name(result: SweepResult) -> str:
    seen = [runs.record.memory.get("overall", {}) for runs in result.cells if runs.record is not None]
    on_gpu = any(overall.get("peak_allocated_gb") is not None for overall in seen)
    return "peak VRAM, GB" if on_gpu else "growth of RAM, GB"


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

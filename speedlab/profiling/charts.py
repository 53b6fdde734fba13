"""Charts as pictures: where a run's time went, drawn with matplotlib without a display."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnavailableError
from .record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_FULL, _CACHED, _NO_UNCOND, _FIRST = "#3b7dd8", "#4caf7d", "#e0a030", "#9aa5b1"
_PHASE_COLOURS = {
    "load": "#9aa5b1",
    "text_encode": "#b07cc6",
    "to_device": "#c9c2b8",
    "prepare": "#e5d9c3",
    "sample": "#3b7dd8",
    "decode": "#e07a5f",
    "save": "#81a88d",
}


def run_chart(record: RunRecord) -> Any:
    """Step times above, phases below, as an IMAGE tensor [1, H, W, 3] in 0..1.

    Raises UnavailableError without matplotlib.
    """
    figure = new_figure(9.0, 5.2)
    steps_axes, phase_axes = figure.subplots(2, 1, height_ratios=(4, 1))
    _draw_steps(steps_axes, record)
    _draw_phases(phase_axes, record)
    figure.tight_layout()
    return to_image(figure)


def _draw_steps(axes: Axes, record: RunRecord) -> None:
    steps: Sequence[Any] = record.steps
    times = [_step_ms(step) for step in steps]
    axes.set_title(_title(record), fontsize=10, loc="left")
    axes.set_ylabel("ms a step")
    axes.set_xlabel("step")
    if not times:
        axes.text(0.5, 0.5, f"no steps ({record.status})", ha="center", va="center", transform=axes.transAxes)
        return
    colours = [_step_colour(step, steps) for step in steps]
    axes.bar([step["index"] + 1 for step in steps], times, color=colours, width=0.85)
    median = record.summary.get("step_median_ms")
    if median is not None:
        axes.axhline(median, color="#333333", linewidth=1, linestyle="--", label=f"median {median:.1f} ms")
        axes.legend(loc="upper right", fontsize=8, frameon=False)
    axes.set_xlim(0.3, len(times) + 0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_phases(axes: Axes, record: RunRecord) -> None:
    left = 0.0
    for name, colour in _PHASE_COLOURS.items():
        ms = record.phases_ms.get(name)
        if not isinstance(ms, (int, float)) or ms <= 0:
            continue
        axes.barh([0], [ms / 1000.0], left=[left], color=colour, height=0.6, label=f"{name} {ms / 1000.0:.2f} s")
        left += ms / 1000.0
    axes.set_yticks([])
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if left > 0:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.75), ncols=7, fontsize=8, frameon=False)


def _title(record: RunRecord) -> str:
    request = record.request
    rate = record.summary.get("it_per_s")
    speed = f", {rate:.2f} it/s" if rate else ""
    size = f"{request.get('width')}x{request.get('height')} batch {request.get('batch')}"
    return (
        f"{request.get('plan', 'stock')}: {request.get('sampler')}/{request.get('scheduler')}, "
        f"{size}, cfg {request.get('cfg')}{speed}\n"
        f"{record.env.get('device')}, torch {record.env.get('torch')}"
    )


def _step_colour(step: Any, steps: Sequence[Any]) -> str:
    if step["cached"]:
        return _CACHED
    if step["index"] == 0:
        return _FIRST
    with_uncond = any(other["uncond_rows"] for other in steps)
    return _NO_UNCOND if with_uncond and step["evals"] and not step["uncond_rows"] else _FULL


def _step_ms(step: Any) -> float:
    return float(step["cpu_ms"] if step["gpu_ms"] is None else step["gpu_ms"])


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches at 100 dots each, drawn without a display. Raises UnavailableError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnavailableError("Charts need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_image(figure: Figure) -> Any:
    """A figure as an IMAGE tensor [1, H, W, 3] in 0..1."""
    import numpy
    import torch

    canvas: Any = figure.canvas
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3].astype(numpy.float32) / 255.0
    return torch.from_numpy(pixels.copy()).unsqueeze(0)


def chart_or_blank(record: RunRecord) -> Any:
    """The run's chart; without matplotlib a small white IMAGE and a word in the log, never a lost picture."""
    try:
        return run_chart(record)
    except UnavailableError as error:
        log.warning("SpeedLab: %s", error)
        return blank()


def blank() -> Any:
    """A small white IMAGE."""
    import torch

    return torch.ones(1, 64, 64, 3)

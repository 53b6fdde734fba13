"""Charts as images of one size: step times, phases, memory and kernels, drawn with matplotlib without a display."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UnavailableError
from .kernels import ATTENTION, CONVOLUTION, COPY, ELEMENTWISE, GEMM, NORMALISATION, OTHER
from .record import RunRecord
from .summary import CACHED, CFG_OFF, FORECAST, FULL, KIND_NAMES, has_median, rows_of, step_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

STEPS, PHASES, MEMORY, KERNELS = "steps", "phases", "memory", "kernels"
OF_SAMPLER = (STEPS, KERNELS)
OF_REPORT = (STEPS, PHASES, MEMORY, KERNELS)

_KIND_COLOURS = {FULL: "#3b7dd8", CACHED: "#4caf7d", FORECAST: "#b07cc6", CFG_OFF: "#e0a030"}
_FIRST = "#9aa5b1"
_PHASE_COLOURS = {
    "load": "#9aa5b1",
    "compile": "#5f6b78",
    "text_encode": "#b07cc6",
    "core_text_encode": "#d3b5e0",
    "free": "#7d8aa5",
    "to_device": "#c9c2b8",
    "prepare": "#e5d9c3",
    "sample": "#3b7dd8",
    "decode": "#e07a5f",
    "after_sampling": "#eab3a2",
    "save": "#81a88d",
}
_FAMILY_COLOURS = {
    GEMM: "#3b7dd8",
    ATTENTION: "#b07cc6",
    CONVOLUTION: "#4caf7d",
    NORMALISATION: "#e0a030",
    ELEMENTWISE: "#e07a5f",
    COPY: "#9aa5b1",
    OTHER: "#c9c2b8",
}
_MEMORY_LINES = (
    ("peak_allocated_gb", "VRAM allocated", "#3b7dd8"),
    ("peak_reserved_gb", "VRAM reserved", "#9aa5b1"),
    ("peak_rss_gb", "RAM of the process", "#e07a5f"),
)
_BARS = 14
_LABEL = 46


def run_chart(record: RunRecord, wanted: Sequence[str] = OF_SAMPLER) -> Any:
    """The wanted images that there is something to draw for, as an IMAGE [images, H, W, 3] in 0..1.

    The step chart is always drawn. Raises UnavailableError without matplotlib.
    """
    import torch

    drawable = {
        STEPS: True,
        PHASES: bool(_phases(record)),
        MEMORY: bool(_memory_lines(record)),
        KERNELS: bool(record.kernels),
    }
    return torch.cat([to_image(figure_of(record, name)) for name in wanted if drawable[name]])


def chart_or_blank(record: RunRecord, wanted: Sequence[str] = OF_SAMPLER) -> Any:
    """The run's charts; without matplotlib a small white IMAGE and a word in the log, never a lost image."""
    try:
        return run_chart(record, wanted)
    except UnavailableError as error:
        log.warning("SpeedLab: %s", error)
        return blank()


def blank() -> Any:
    """A small white IMAGE."""
    import torch

    return torch.ones(1, 64, 64, 3)


def _draw_steps(axes: Axes, record: RunRecord) -> None:
    steps: Sequence[Any] = record.steps
    times = [_step_ms(step) for step in steps]
    axes.set_ylabel("ms a step")
    axes.set_xlabel("step")
    if not times:
        axes.text(0.5, 0.5, f"no steps ({record.status})", ha="center", va="center", transform=axes.transAxes)
        return
    kinds = step_kinds(rows_of(steps))
    colours = [_step_colour(index, kind) for index, kind in enumerate(kinds)]
    axes.bar([step["index"] + 1 for step in steps], times, color=colours, width=0.85)
    step_ms = record.summary.get("step_time_ms")
    if step_ms is not None:
        axes.axhline(step_ms, color="#333333", linewidth=1, linestyle="--", label=f"sampling / steps {step_ms:.1f} ms")
        _kind_legend(axes, record)
    axes.set_xlim(0.3, len(times) + 0.7)


def _kind_legend(axes: Axes, record: RunRecord) -> None:
    from matplotlib.patches import Patch

    lines, _ = axes.get_legend_handles_labels()
    kinds: dict[str, Any] = record.summary.get("step_kinds") or {}
    words = {
        kind: f"{it['steps']} {KIND_NAMES[kind]}, {'median ' if has_median(it) else ''}{it['median_ms']:.1f} ms"
        for kind, it in kinds.items()
    }
    patches = [Patch(color=_KIND_COLOURS[kind], label=label) for kind, label in words.items()]
    axes.legend(handles=[*lines, *patches], loc="upper right", fontsize=8, frameon=False)


def _draw_phases(axes: Axes, record: RunRecord) -> None:
    phases = _phases(record)
    names = [name for name, _ in phases]
    seconds = [ms / 1000.0 for _, ms in phases]
    bars = axes.barh(names, seconds, color=[_PHASE_COLOURS[name] for name in names], height=0.65)
    axes.bar_label(bars, [f" {s:.2f} s" for s in seconds], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.margins(x=0.12)


def _draw_memory(axes: Axes, record: RunRecord) -> None:
    """Peaks of the phases in the order and for the time in which they ran; between the dots nothing is known."""
    spans = _memory_spans(record)
    for key, label, colour in _memory_lines(record):
        shown = [(start, end, record.memory[name].get(key)) for name, start, end in spans]
        known = [(start, end, value) for start, end, value in shown if value is not None]
        axes.hlines(
            [value for *_, value in known], [start for start, *_ in known], [end for _, end, _ in known],
            color=colour, linewidth=3, label=label,
        )  # fmt: skip
        for start, end, value in known:
            axes.annotate(
                f"{value:.2f}", ((start + end) / 2, value), ha="center", va="bottom", fontsize=8, color=colour
            )
    for name, start, end in spans:
        axes.axvspan(start, end, color=_PHASE_COLOURS[name], alpha=0.12, linewidth=0)
        axes.text((start + end) / 2, 0.01, name, ha="center", va="bottom", fontsize=8, rotation=90,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_ylim(0, 1.25 * axes.dataLim.ymax)  # room for the legend
    axes.set_xlabel("seconds of work")
    axes.set_ylabel("peak, GB")
    axes.legend(loc="upper right", fontsize=8, frameon=False)


def _draw_kernels(axes: Axes, record: RunRecord) -> None:
    rows = list(record.kernels[:_BARS])
    names = [_short(row["name"]) for row in rows]
    places = range(len(rows))
    bars = axes.barh(places, [row["share"] for row in rows], color=[_FAMILY_COLOURS[row["family"]] for row in rows])
    axes.set_yticks(places, names, fontsize=8)
    axes.bar_label(bars, [f" {row['share']:.1f} %" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    profile = record.kernel_profile or {}
    axes.set_xlabel(f"share of the time of all {profile.get('unit', 'kernels')}, %")
    _family_legend(axes, profile.get("families", ()))


def _family_legend(axes: Axes, families: Sequence[Any]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=_FAMILY_COLOURS.get(f["family"], "#c9c2b8"), label=f"{f['family']} {f['share']:.0f} %")
        for f in families
    ]
    if patches:
        axes.legend(handles=patches, loc="lower right", fontsize=8, frameon=False)


_DRAWINGS: dict[str, Callable[[Axes, RunRecord], None]] = {
    STEPS: _draw_steps,
    PHASES: _draw_phases,
    MEMORY: _draw_memory,
    KERNELS: _draw_kernels,
}


def _phases(record: RunRecord) -> list[tuple[str, float]]:
    values = ((name, record.phases_ms.get(name)) for name in _PHASE_COLOURS)
    return [(name, float(ms)) for name, ms in values if isinstance(ms, (int, float)) and ms > 0]


def _memory_spans(record: RunRecord) -> list[tuple[str, float, float]]:
    """Phases with a known peak, and where they lie when all phases stand one behind the other, in seconds."""
    spans, at = [], 0.0
    for name, ms in _phases(record):
        if name in record.memory:
            spans.append((name, at, at + ms / 1000.0))
        at += ms / 1000.0
    return spans


def _memory_lines(record: RunRecord) -> list[tuple[str, str, str]]:
    names = [name for name, *_ in _memory_spans(record)]
    return [line for line in _MEMORY_LINES if any(record.memory[name].get(line[0]) is not None for name in names)]


def _short(name: str) -> str:
    plain = name.removeprefix("void ").removeprefix("at::native::")
    # Two dollar signs would be read as a formula.
    return (plain if len(plain) <= _LABEL else plain[: _LABEL - 3] + "...").replace("$", r"\$")


def _title(record: RunRecord) -> str:
    request = record.request
    rate = record.summary.get("it_per_s")
    speed = f", {rate:.3g} it/s" if rate else ""
    size = f"{request.get('width')}x{request.get('height')} batch {request.get('batch')}"
    plan = str(request.get("plan", "stock")).replace("$", r"\$")
    return (
        f"{plan}: {request.get('sampler')}/{request.get('scheduler')}, {size}, cfg {request.get('cfg')}{speed}\n"
        f"{record.env.get('device')}, torch {record.env.get('torch')}"
    )


def _step_colour(index: int, kind: str | None) -> str:
    return _FIRST if index == 0 and kind in (FULL, CFG_OFF) else _KIND_COLOURS[kind or FULL]


def _step_ms(step: Any) -> float:
    return float(step["cpu_ms"] if step["gpu_ms"] is None else step["gpu_ms"])


def figure_of(record: RunRecord, name: str) -> Figure:
    """One of the images of OF_REPORT, drawn. Raises UnavailableError without matplotlib."""
    figure = new_figure(9.0, 5.2)
    axes = figure.subplots()
    axes.set_title(_title(record), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    _DRAWINGS[name](axes, record)
    figure.tight_layout()
    return figure


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

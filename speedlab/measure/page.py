"""A run as one HTML page to send to others: tables, charts and images in the file itself, no script, no request.

A record may come from another machine, so every text is escaped, and a record of another shape is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..common.errors import ResultsError
from .record import RunRecord
from .report import kernel_table, phase_rows, step_table, summary_text
from .summary import rows_of, step_kinds

# What a browser lets such a page do, also where the file was changed.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_COLOURS = {"full": "#3b7dd8", "cached": "#4caf7d", "forecast": "#b07cc6", "cfg_off": "#e0a030"}
_WIDTH, _HEIGHT = 900.0, 150.0
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:64em;padding:0 1em;color:#1d2127;
background:#fff}h2{font-size:1.1em;margin:1.6em 0 .4em}table{border-collapse:collapse;font-size:.92em}
td,th{border-bottom:1px solid #d7dbe0;padding:.2em .9em .2em 0;text-align:left;vertical-align:top}
img{max-width:100%}svg{width:100%;height:auto;background:#f4f6f8}pre{overflow:auto}
@media(prefers-color-scheme:dark){body{color:#e4e7eb;background:#17191c}td,th{border-color:#3a3f46}
svg{background:#22262b}}"""


def run_page(record: RunRecord, images: Sequence[tuple[str, bytes]]) -> str:
    """The page of a run; `images` are kind ("png") and bytes of each. Raises ResultsError."""
    try:
        return "".join(_parts(record, images))
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"the record of run {record.run_id} is not as this pack writes one: {error!r}") from error


def _parts(record: RunRecord, images: Sequence[tuple[str, bytes]]) -> Iterator[str]:
    request, env = record.request, record.env
    plan = escape(str(request.get("plan") or record.run_id))
    yield (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{plan} - SpeedLab</title><style>{_STYLE}</style><h1>{plan}</h1>"
    )
    facts = (
        (request.get("checkpoint") or {}).get("name"), _fact("{}x{}", request.get("width"), request.get("height")),
        _fact("batch {}", request.get("batch")), _fact("{}/{}", request.get("sampler"), request.get("scheduler")),
        env.get("device"), _fact("torch {}", env.get("torch")), _fact("ComfyUI {}", env.get("comfyui")),
        record.timestamp,
    )  # fmt: skip
    yield f"<p>{escape(' | '.join(str(fact) for fact in facts if fact))}</p>"
    yield "".join(f"<p>{escape(line)}</p>" for line in summary_text(record).splitlines())
    for kind, data in images:
        yield f'<img alt="image of this run" src="{image_url(kind, data)}">'
    if record.steps:
        yield f"<h2>Steps</h2>{_bars(record)}"
        yield _memory_lines(record)
    yield f"<h2>Phases</h2>{_table(phase_rows(record))}"
    if record.steps:
        yield f"<details><summary>{len(record.steps)} steps</summary>{_table(step_table(record))}</details>"
    kernels = kernel_table(record)
    if kernels:
        yield f"<h2>Kernels</h2><pre>{escape(chr(10).join(kernels))}</pre>"
    yield f"<h2>Settings</h2>{_table([('setting', 'value'), *_flat(request)])}"
    yield f"<h2>Environment</h2>{_table([('what', 'value'), *_flat(env)])}"
    yield f"<p>SpeedLab run {escape(record.run_id)}, status {escape(record.status)}.</p></html>\n"


def _fact(words: str, *values: Any) -> str:
    """The words with the values, nothing where one is not known."""
    return "" if None in values else words.format(*values)


def _bars(record: RunRecord) -> str:
    """Step times as bars in the colours of the charts; a first step that compiles is cut off, and its label says so."""
    rows = rows_of(record.steps)
    times = [row.ms for row in rows]
    usual = sorted(times[1:] or times)
    top = min(max(times), 2.2 * usual[(len(usual) - 1) * 95 // 100]) or 1.0
    slot = _WIDTH / len(rows)
    bars = []
    for index, (ms, kind) in enumerate(zip(times, step_kinds(rows), strict=True)):
        high = _HEIGHT * min(ms / top, 1.0)
        bars.append(
            f'<rect x="{index * slot:.1f}" y="{_HEIGHT - high:.1f}" width="{0.86 * slot:.1f}" height="{high:.1f}" '
            f'fill="{_COLOURS[kind or "full"]}"><title>step {index + 1}: {ms:.2f} ms</title></rect>'
        )
    cut = f"; bars end at {top:.1f} ms" if max(times) > top else ""
    label = f"Times of {len(rows)} steps, the longest {max(times):.1f} ms{cut}"
    return f"{_svg(label, ''.join(bars))}<p>{escape(label)}</p>"


def _memory_lines(record: RunRecord) -> str:
    """Memory peaks of the steps as lines from zero up; nothing where a platform tells none."""
    found = ""
    for name, words in (("peak_allocated_gb", "VRAM"), ("peak_rss_gb", "RAM of the process")):
        values = record.step_memory.get(name) or ()
        known = [(i, float(value)) for i, value in enumerate(values) if value is not None]
        if not known:
            continue
        top = max(value for _, value in known) * 1.1 or 1.0
        slot = _WIDTH / len(values)
        points = " ".join(f"{(i + 0.5) * slot:.1f},{_HEIGHT * (1 - value / top):.1f}" for i, value in known)
        label = f"{words}, peak of each step: {min(v for _, v in known):.2f} to {max(v for _, v in known):.2f} GB"
        line = f'<polyline points="{points}" fill="none" stroke="#e07a5f" stroke-width="3"/>'
        found += f"{_svg(label, line)}<p>{escape(label)}</p>"
    return found


def _svg(label: str, inside: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    return html_table(rows[1:], rows[0])


def html_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """An HTML table; every text is escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = "" if header is None else line(header, "th")
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"


def image_url(kind: str, data: bytes) -> str:
    """An image of kind "png" or "jpeg" as a URL that holds it, so that a page shows it without a request."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value not in (None, "", [], ()):
            yield f"{before}{name}", str(value)

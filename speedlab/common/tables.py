"""Result rows as a table that a person reads: the columns of the articles, and RAM where there is no VRAM."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

HEADER = ("plan", "max VRAM", "time", "step time", "batch", "resolution", "steps", "cfg")
RAM_COLUMN = "max RSS"
QUALITY = ("PSNR", "SSIM")
NOTHING = "-"
# A longer name of a plan stands under the table, so that rows fit a screen.
_LONGEST, _WIDTH = 44, 110


def aligned(lines: Sequence[Sequence[str]], *, numbers: bool = False, words: int = 0) -> list[str]:
    """The lines with their cells in columns; `numbers`: all columns but the first and the last `words` stand to the
    right.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def cell(text: str, column: int) -> str:
        to_the_right = numbers and 0 < column < len(widths) - words
        return text.rjust(widths[column]) if to_the_right else text.ljust(widths[column])

    return ["  ".join(cell(text, column) for column, text in enumerate(line)).rstrip() for line in lines]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table in Markdown, and the notes as a list under it."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in texts) + " |"

    lines = [line(header), line(["---"] * len(header)), *map(line, rows), ""]
    return "\n".join([*lines, *(f"* {note}" for note in notes)]).rstrip()


def growing_row(first: str, *rest: object) -> str:
    """A row of a table that is printed while it grows, so that widths are fixed."""
    cells = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in rest)
    return f"{first:<32}" + "".join(f"{cell:>10}" for cell in cells)


def _number(row: Mapping[str, str], name: str) -> float | None:
    text = row.get(name, "")
    return float(text) if text else None


def _gigabytes(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f} GB"


def seconds(value: float | None) -> str:
    """`3.72 s`, `0.147 s`, `1 min 5 s`; '-' for None."""
    if value is None:
        return NOTHING
    if value >= 100:
        return f"{int(value) // 60} min {value % 60:.0f} s"
    return f"{value:.2f} s" if value >= 1 else f"{value:.3f} s"


def cells(row: Mapping[str, str]) -> tuple[str, ...]:
    """One row of results.csv as the table's cells, RAM last. A run that did not end well shows its status as time."""
    failed = row.get("status", "ok") not in ("", "ok")
    cfg = _number(row, "cfg")
    return (
        row.get("plan") or NOTHING,
        _gigabytes(_number(row, "max_vram_gb")),
        row["status"] if failed else seconds(_number(row, "time_s")),
        seconds(_number(row, "step_time_s")),
        row.get("batch") or NOTHING,
        f"{row['width']}x{row['height']}" if row.get("width") and row.get("height") else NOTHING,
        row.get("steps") or NOTHING,
        NOTHING if cfg is None else f"{cfg:g}",
        _gigabytes(_number(row, "peak_rss_gb")),
    )


def _quality(row: Mapping[str, str]) -> tuple[str, str]:
    psnr, ssim = _number(row, "psnr"), _number(row, "ssim")
    return NOTHING if psnr is None else f"{psnr:.1f} dB", NOTHING if ssim is None else f"{ssim:.4f}"


def _footnoted(rows: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], list[str]]:
    """The rows with short names of plans, and what those stand for. A row's `asked` is what its plan was asked for as,
    where something else ran."""
    shown: list[Mapping[str, str]] = []
    notes: list[str] = []
    for row in rows:
        plan, asked = row.get("plan") or NOTHING, row.get("asked")
        if asked or len(plan) > _LONGEST:
            mark = f"[{len(notes) + 1}]"
            what = f"{asked} was asked for; what ran is {plan}" if asked else plan
            # Lines are broken between techniques.
            lines = textwrap.wrap(what.replace("+", " + "), _WIDTH, break_long_words=False)
            notes.append(textwrap.indent("\n".join(lines), "    ").replace("    ", f"{mark} ", 1))
            row = {**row, "plan": f"{asked or plan[: _LONGEST - 8] + '...'} {mark}"}
        shown.append(row)
    return shown, notes


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows under a header, columns aligned. RAM appears where a row has no VRAM, quality where one has it; long
    names of plans stand under the table.
    """
    rows, notes = _footnoted(rows)
    with_ram = any(not row.get("max_vram_gb") for row in rows)
    lines: list[tuple[str, ...]] = [(*HEADER, RAM_COLUMN), *(cells(row) for row in rows)]
    if not with_ram:
        lines = [line[:-1] for line in lines]
    if any(row.get("psnr") for row in rows):
        lines = [(*line, *more) for line, more in zip(lines, (QUALITY, *map(_quality, rows)), strict=True)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join([*aligned(lines), *notes])

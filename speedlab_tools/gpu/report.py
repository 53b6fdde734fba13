"""The short table and the targets, from the rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .journal import Journal
from .plan import Block

NOT_MEASURED = "not measured"
_HEAD = ("measurement", "first s", "picture s", "sampling s", "x stock", "% peak", "peak GB", "img/min", "status")


@dataclass(frozen=True)
class Target:
    """A value to reach. `least` of a value that must be at least that, else at most."""

    text: str
    row: str
    field: str
    value: float
    least: bool = True
    stretch: float | None = None
    unit: str = ""

    def verdict(self, measured: float) -> str:
        """Whether a measured value reaches it."""
        reached = measured >= self.value if self.least else measured <= self.value
        if self.stretch is not None and (measured >= self.stretch if self.least else measured <= self.stretch):
            return "reached, stretch too"
        return "reached" if reached else "missed"


TARGETS = (
    Target("SDXL fp16, same pictures", "sdxl-fp16/exact", "ratio", 1.6, unit="x stock"),
    Target("sdxl-fastest over stock", "sdxl-fp16/sdxl-fastest", "ratio", 2.2, unit="x stock"),
    Target("sdxl-fastest, text to picture", "sdxl-fp16/sdxl-fastest", "picture_s", 1.1, False, 1.0, "s"),
    Target("sdxl-fastest-deepcache over stock", "sdxl-fp16/sdxl-fastest-deepcache", "ratio", 4.5, unit="x stock"),
    Target("sdxl-fastest-deepcache, text to picture", "sdxl-fp16/sdxl-fastest-deepcache", "picture_s", 0.55, False,
           unit="s"),
    Target("exact plan, share of the bf16 peak", "sdxl-bf16/exact", "peak_share", 40.0, stretch=45.0, unit="%"),
    Target("within 8 GB", "cap-8gb/plan", "peak_allocated_gb", 6.91, False, unit="GB"),
    Target("within 6 GB", "cap-6gb/plan", "peak_allocated_gb", 5.6, False, unit="GB"),
    Target("sequential offload, full VAE", "offload/sequential", "peak_allocated_gb", 2.56, False, unit="GB"),
    Target("sequential offload, Tiny VAE", "offload/sequential-tiny", "peak_allocated_gb", 0.68, False, unit="GB"),
    Target("Profile Sampler timing, cost", "profiler/timing", "overhead_percent", 0.5, False, unit="%"),
)  # fmt: skip


def text(journal: Journal, blocks: Sequence[Block]) -> str:
    """What a call prints last: a line a row, the targets with what was measured, and what is left."""
    env = journal.env
    lines = [f"{env.get('device')}, torch {env.get('torch')}, ComfyUI {env.get('comfyui')}. Random weights: times and "
             "memory are real, pictures are noise."]  # fmt: skip
    if journal.settings.get("small"):
        lines.append("Tiny models on the way through the suite: no figure below says anything of a real one.")
    lines += ["", *_table([_HEAD, *(_cells(row) for row in _in_order(journal, blocks))])]
    ceilings = [_ceiling(journal, name) for name in ("fp16", "bf16")]
    copy = journal.value("peak/copy", "gb_per_s")
    lines += ["", f"Measured peaks: {', '.join(ceilings)}, copy {_or_not(copy, ' GB/s')}"]
    lines += ["", *_targets(journal)]
    failed = [row for row in journal.rows.values() if row["status"] not in ("ok",)]
    if failed:
        lines += ["", "What did not run:", *(f"  {row['id']}: {row['status']}: {_short(row)}" for row in failed)]
    left = [block.row(arm) for block in blocks for arm in block.arms if block.row(arm) not in journal.rows]
    if not left:
        lines += ["", "Nothing is left. --again measures anew, with --only some blocks of it."]
    else:
        lines += ["", f"{len(left)} measurements are left; the same command goes on with {left[0]}."]
    return "\n".join([*lines, "", f"Written to {journal.path} and .csv beside it"])


def _in_order(journal: Journal, blocks: Iterable[Block]) -> list[dict[str, Any]]:
    arms = (block.row(arm) for block in blocks for arm in block.arms)
    place = {row: number for number, row in enumerate(arms)}
    rows = [row for row in journal.rows.values() if not str(row["id"]).startswith("peak/")]
    # A row that is no arm's (a stock beside one, a batch) stands behind its block's.
    ends = {name.partition("/")[0]: number + 0.5 for name, number in place.items()}
    return sorted(rows, key=lambda row: place.get(row["id"], ends.get(row["id"].partition("/")[0], len(place))))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    peak = row.get("peak_allocated_gb")
    digits: Sequence[tuple[Any, str]] = (
        (row.get("first_s"), ".2f"), (row.get("picture_s"), ".3f"), (row.get("sampling_s"), ".3f"),
        (row.get("ratio"), ".2f"), (row.get("peak_share"), ".1f"), (peak, ".2f"), (row.get("images_per_min"), ".1f"),
    )  # fmt: skip
    cells = tuple(format(value, spec) if isinstance(value, (int, float)) else "" for value, spec in digits)
    return (str(row["id"]), *cells, str(row["status"]))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    align: Callable[[str, int, int], str] = lambda cell, width, column: (  # noqa: E731
        cell.ljust(width) if column == 0 else cell.rjust(width)
    )
    return ["  ".join(align(cell, widths[n], n) for n, cell in enumerate(row)).rstrip() for row in rows]


def _targets(journal: Journal) -> list[str]:
    rows: list[tuple[str, ...]] = [("target", "asked", "measured", "")]
    for target in TARGETS:
        # Tiny models reach nothing and miss nothing.
        measured = None if journal.settings.get("small") else journal.value(target.row, target.field)
        asked = f"{'>=' if target.least else '<='} {target.value:g} {target.unit}"
        if target.stretch is not None:
            asked += f" (stretch {target.stretch:g})"
        if measured is None:
            rows.append((target.text, asked, NOT_MEASURED, ""))
        else:
            rows.append((target.text, asked, f"{measured:.3g} {target.unit}", target.verdict(measured)))
    return _table(rows)


def _ceiling(journal: Journal, name: str) -> str:
    return f"{name} {_or_not(journal.value(f'peak/{name}', 'tflops'), ' TFLOP/s')}"


def _or_not(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}{unit}"


def _short(row: dict[str, Any]) -> str:
    message = str(row.get("error", ""))
    return message if len(message) <= 160 else f"{message[:157]}..."

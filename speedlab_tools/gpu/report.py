"""The suite's results: one JSON that is also what a later call goes on from, and one CSV of the same rows.

The short table and the targets, from the rows alone.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedlab.common.errors import ResultsError
from speedlab.common.tables import aligned
from speedlab.measure.environment import result_stem
from speedlab.measure.store import write_atomically

from .plan import Block

SCHEMA = 1
SUFFIX = "_gpu.json"
SUFFIX_SMALL = "_gpu-small.json"
# A measurement that ended the process this often is given up: its row says so.
_ATTEMPTS = 2

COLUMNS = (
    "id", "shows", "status", "model", "dtype", "plan", "width", "height", "batch", "steps", "n", "first_s",
    "picture_s", "picture_min_s", "picture_max_s", "sampling_s", "step_time_s", "it_per_s", "encode_s", "decode_s",
    "ratio", "sampling_ratio", "images_per_min", "tflops", "peak_share", "peak_allocated_gb", "peak_reserved_gb",
    "peak_rss_gb", "relative_error", "graphs", "graph_breaks", "recompiles", "overhead_percent", "steps_over_wall",
    "gb_per_s", "flop_per_step", "note", "error", "device", "torch", "comfyui", "timestamp",
    "dynamic_vram",
)  # fmt: skip
DIED = "died"
_DYNAMIC_VRAM = {True: "on", False: "off", None: "not there"}


class Journal:
    """Rows by id. Every change is on disk before the call returns."""

    def __init__(self, path: Path, env: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.path, self.env, self.settings = path, dict(env), dict(settings)
        self.rows: dict[str, dict[str, Any]] = {}
        self.started: dict[str, int] = {}
        self.complete = False

    @staticmethod
    def read(path: Path, into: Path | None = None) -> Journal:
        """The journal of an earlier call, to go on in `into`. Raises ResultsError for a file that is none."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            journal = Journal(path if into is None else into, found["env"], found["settings"])
            journal.rows = {str(row["id"]): dict(row) for row in found["rows"]}
            journal.started = {str(name): int(count) for name, count in found["started"].items()}
            journal.complete = bool(found["complete"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(
                f"{path} holds no results of this suite ({type(error).__name__}: {error}). Move it away."
            ) from error
        return journal

    def begin(self, row: str) -> None:
        """Note that a measurement starts: it may take the process with it."""
        self.started[row] = self.started.get(row, 0) + 1
        self.save()

    def withdraw(self, row: str) -> None:
        """What was begun was left in good order, whatever came of it."""
        left = self.started.get(row, 0) - 1
        self.started = {**self.started, row: left} if left > 0 else self._without(row)
        self.save()

    def write(self, row: str, fields: Mapping[str, Any]) -> None:
        """The result of a measurement; `status` is ok where `fields` name no other."""
        env = {name: self.env.get(name) for name in ("device", "torch", "comfyui", "dynamic_vram")}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.rows[row] = {"id": row, "status": "ok", **fields, **env, "timestamp": stamp}
        self.started = self._without(row)
        self.save()

    def drop(self, rows: Iterable[str]) -> None:
        """Forget these rows and what belongs to them (`row-...`), to measure them anew."""
        gone = tuple(rows)
        gone = (*gone, *dict.fromkeys(_overrun(row.partition("/")[0]) for row in gone))
        beside = tuple(f"{row}-" for row in gone)

        def stays(name: str) -> bool:
            return name not in gone and not name.startswith(beside)

        self.rows = {name: row for name, row in self.rows.items() if stays(name)}
        self.started = {name: count for name, count in self.started.items() if stays(name)}
        self.complete = False

    def drop_others(self, stacks: Mapping[str, str]) -> None:
        """Forget the rows that were measured with another stack of techniques than the one given for them."""
        # The plan is what ran; files of older versions hold what was asked there.
        known = {name: row.get("asked", row.get("plan")) for name, row in self.rows.items()}
        self.drop([name for name, stack in stacks.items() if name in known and known[name] != stack])

    def give_up(self) -> None:
        """Rows for what ended the process as often as it was tried."""
        for row in [row for row, count in self.started.items() if count >= _ATTEMPTS and row not in self.rows]:
            self.write(row, {"status": DIED, "error": f"the process ended inside of it {_ATTEMPTS} times"})

    def overran(self, block: str) -> bool:
        """Note that a block had its time and came to no row. Whether that is to be the end."""
        name = _overrun(block)
        self.begin(name)
        over = self.started[name] >= _ATTEMPTS
        if over:
            self.progressed(block)
        return over

    def progressed(self, block: str) -> None:
        """A block came to a row: what was noted of it is past."""
        if _overrun(block) in self.started:
            self.started = self._without(_overrun(block))
            self.save()

    def value(self, row: str, field: str) -> float | None:
        """A number of a row that went well."""
        found = self.rows.get(row, {})
        value = found.get(field)
        return float(value) if found.get("status") == "ok" and isinstance(value, (int, float)) else None

    def save(self) -> None:
        """Write both files whole. Raises ResultsError naming the path."""
        document = {
            "schema": SCHEMA,
            "about": "Random weights: times and memory are those of real models, images are noise. first_s of "
            "images: an earlier call may have compiled for it; the blocks compile-* begin with nothing compiled.",
            "complete": self.complete,
            "env": self.env,
            "settings": self.settings,
            "started": self.started,
            "rows": list(self.rows.values()),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(document, indent=1, default=str).encode())
            write_atomically(self.path.with_suffix(".csv"), self._csv().encode())
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        return text.getvalue()

    def _without(self, row: str) -> dict[str, int]:
        return {name: count for name, count in self.started.items() if name != row}


def _overrun(block: str) -> str:
    return f"{block}/-overrun"


def open_journal(
    out: Path, earlier: Iterable[Path], env: Mapping[str, Any], settings: Mapping[str, Any], *, small: bool, again: bool
) -> Journal:
    """The journal to go on with: the newest of this device, torch and way of weights (dynamic VRAM, or whole) in `out`
    or `earlier`, else a new one in `out`.

    `again` begins anew. What was found elsewhere goes on under its name in `out`.
    """
    paged = "dynamic-vram_" if env.get("dynamic_vram") else ""
    stem = result_stem(str(env["device"]), str(env["torch"])) + paged
    suffix = SUFFIX_SMALL if small else SUFFIX
    if not again:
        folders = dict.fromkeys((out, *earlier))
        found = [path for folder in folders for path in folder.glob(f"{stem}[0-9]*{suffix}")]
        if found:
            newest = max(found, key=lambda path: (path.name, path.stat().st_mtime))
            return Journal.read(newest, out / newest.name)
    return Journal(out / f"{stem}{time.strftime('%Y-%m-%d')}{suffix}", env, settings)


NOT_MEASURED = "not measured"
_HEAD = ("measurement", "first s", "image s", "sampling s", "x stock", "% peak", "peak GB", "img/min", "status")


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
    Target("SDXL fp16, same images", "sdxl-fp16/exact", "ratio", 1.6, unit="x stock"),
    Target("sdxl-fastest over stock", "sdxl-fp16/sdxl-fastest", "ratio", 2.2, unit="x stock"),
    Target("sdxl-fastest, text to image", "sdxl-fp16/sdxl-fastest", "picture_s", 1.1, False, 1.0, "s"),
    Target("sdxl-fastest-deepcache over stock", "sdxl-fp16/sdxl-fastest-deepcache", "ratio", 4.5, unit="x stock"),
    Target("sdxl-fastest-deepcache, text to image", "sdxl-fp16/sdxl-fastest-deepcache", "picture_s", 0.55, False,
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
    paged = _DYNAMIC_VRAM[env.get("dynamic_vram")]
    lines = [f"{env.get('device')}, torch {env.get('torch')}, ComfyUI {env.get('comfyui')}, dynamic VRAM "
             f"{paged}. Random weights: times and memory are real, images are noise."]  # fmt: skip
    if journal.settings.get("small"):
        lines.append("Tiny models on the way through the suite: no figure below says anything of a real one.")
    lines += ["", *aligned([_HEAD, *(_cells(row) for row in _in_order(journal, blocks))], numbers=True)]
    ceilings = [_ceiling(journal, name) for name in ("fp16", "bf16")]
    copy = journal.value("peak/copy", "gb_per_s")
    lines += ["", f"Measured peaks: {', '.join(ceilings)}, copy {_or_not(copy, ' GB/s')}"]
    lines += ["", *_targets(journal)]
    failed = [row for row in journal.rows.values() if row["status"] not in ("ok",)]
    if failed:
        lines += ["", "What did not run:", *(f"  {row['id']}: {row['status']}: {_short(row)}" for row in failed)]
    left = [
        block.row(variant) for block in blocks for variant in block.variants if block.row(variant) not in journal.rows
    ]
    if not left:
        lines += ["", "Nothing is left. --again measures anew, with --only some blocks of it."]
    else:
        lines += ["", f"{len(left)} measurements are left; the same command goes on with {left[0]}."]
    return "\n".join([*lines, "", f"Written to {journal.path} and .csv beside it"])


def _in_order(journal: Journal, blocks: Iterable[Block]) -> list[dict[str, Any]]:
    variants = (block.row(variant) for block in blocks for variant in block.variants)
    place = {row: number for number, row in enumerate(variants)}
    rows = [row for row in journal.rows.values() if not str(row["id"]).startswith("peak/")]
    # A row that is no variant's (a stock beside one, a batch) stands behind its block's.
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
    return aligned(rows, numbers=True)


def _ceiling(journal: Journal, name: str) -> str:
    return f"{name} {_or_not(journal.value(f'peak/{name}', 'tflops'), ' TFLOP/s')}"


def _or_not(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}{unit}"


def _short(row: dict[str, Any]) -> str:
    message = str(row.get("error", ""))
    return message if len(message) <= 160 else f"{message[:157]}..."

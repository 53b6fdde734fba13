"""Two results tables against each other: ratio of times, and a verdict where sessions in turn bear one out."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from speedlab.measure.record import CSV_COLUMNS, RUN_ID, SCHEMA

from ..client.errors import BenchError
from .drift import TURNS, Session, Span, estimate, span_of, split, turns

KEY = ("scenario", "plan", "batch", "width", "height", "steps", "cfg", "sampler", "scheduler", "precision",
       "accelerators", "seed", "checkpoint")  # fmt: skip
_NAMED = frozenset({"scenario", "plan", "batch", "width", "height", "steps", "cfg"})
THRESHOLD = 0.03
# Rows of earlier versions may be of any schema.
_FIRST_OF_SCHEMA = (0, 2, 0)
_MORE = 1.0 + THRESHOLD
# No run is shorter or longer; beyond that arithmetic would overflow.
_SHORTEST_S, _LONGEST_S = 1e-9, 1e9


@dataclass(frozen=True)
class Environment:
    """What a row says of where it was measured. Equal `env_hash` means equal in all that a record holds of it."""

    env_hash: str
    device: str
    torch: str
    comfyui: str
    speedlab: str

    def __str__(self) -> str:
        known = (self.device, *(f"{name} {getattr(self, name)}" for name in _SOFTWARE if getattr(self, name)))
        return f"{', '.join(filter(None, known)) or 'unknown'} ({self.env_hash or 'no env_hash'})"


_SOFTWARE = ("torch", "comfyui", "speedlab")


@dataclass(frozen=True)
class Run:
    """One good row: its setting, where and when it ran, its `time_s`, and its record's schema where that is known."""

    key: tuple[str, ...]
    env: Environment
    seconds: float
    span: Span | None = None
    run_id: str = ""
    schema: int | None = None


@dataclass(frozen=True)
class Table:
    """The good runs of a table, and how many rows cannot be compared, by the reason."""

    runs: tuple[Run, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """B's time over A's. `low` and `high` bound the ratio; None where nothing can: then there is no verdict.

    `sessions` are those of A and of B, `turns` how many of them follow each other in turn. `mixture` says how the two
    sides differ in more than their time. `varying` are the fields of the key that no name shows and that tell some of
    the settings compared apart.
    """

    key: tuple[str, ...]
    env: tuple[Environment, Environment]
    a_s: float
    b_s: float
    ratio: float
    sessions: tuple[int, int]
    turns: int
    low: float | None = None
    high: float | None = None
    mixture: str | None = None
    varying: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        """B is slower by more than 3 %, beyond doubt."""
        return self.low is not None and self.low > 1.0 and self.ratio > 1.0 + THRESHOLD

    @property
    def is_faster(self) -> bool:
        """B is faster by more than 3 %, beyond doubt."""
        return self.high is not None and self.high < 1.0 and self.ratio < 1.0 / (1.0 + THRESHOLD)

    @property
    def is_same(self) -> bool:
        """The whole interval lies within 3 %."""
        return self.is_no_slower and self.low is not None and self.low >= 1.0 / _MORE

    @property
    def is_no_slower(self) -> bool:
        """Beyond doubt B is not slower by more than 3 %."""
        return self.high is not None and self.high <= _MORE

    @property
    def name(self) -> str:
        """The setting in a few words."""
        return setting_name(self.key, self.varying)


def setting_name(key: tuple[str, ...], varying: Sequence[str] = ()) -> str:
    """A setting in a few words, and the values of `varying` with it."""
    row = dict(zip(KEY, key, strict=True))
    size = f"{row['width']}x{row['height']} batch {row['batch']}"
    setting = f"{row['scenario'] or '-'}: {row['plan'] or 'stock'}, {size}, {row['steps']} steps, cfg {row['cfg']}"
    return ", ".join([setting, *(f"{name} {row[name] or '-'}" for name in varying)])


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a results table. Raises BenchError for a file that is none, naming the columns that differ."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            lines = [line for line in reader if line]
    except FileNotFoundError:
        raise BenchError(f"there is no file {path}") from None
    except PermissionError:
        raise BenchError(
            f"{path} may not be read: close the program that holds it (a spreadsheet, say), or compare a copy of it"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchError(f"{path} cannot be read as a table: {error}") from error
    if header is None:
        raise BenchError(f"{path} is empty: it has not even a header")
    if tuple(header) != CSV_COLUMNS:
        missing = [name for name in CSV_COLUMNS if name not in header]
        foreign = [name for name in header if name not in CSV_COLUMNS]
        what = "; ".join(
            f"{word} {', '.join(names)}" for word, names in (("it lacks", missing), ("unknown are", foreign)) if names
        )
        raise BenchError(
            f"{path} is not a results table of this version: {what or 'its columns stand in another order'}. Measure "
            "again, or compare it with the version of SpeedLab that wrote it"
        )
    broken = [number for number, line in enumerate(lines, start=2) if len(line) != len(CSV_COLUMNS)]
    if broken:
        raise BenchError(f"{path}: line {broken[0]} has not {len(CSV_COLUMNS)} cells; it was cut off or edited")
    if not lines:
        raise BenchError(f"{path} holds no run: it has a header and no row under it")
    return [dict(zip(CSV_COLUMNS, line, strict=True)) for line in lines]


def runs_of(rows: Sequence[Mapping[str, str]], path: Path) -> Table:
    """The good runs of a table. Raises BenchError for a time that is none, and where no row can be compared."""
    runs: list[Run] = []
    left_out: dict[str, int] = {}
    for row in rows:
        if row["status"] != "ok":
            reason = "did not end well"
        elif not row["time_s"]:
            reason = "has no time_s, because a part of it is unknown or came out of ComfyUI's cache"
        else:
            runs.append(_run(row, path))
            continue
        left_out[reason] = left_out.get(reason, 0) + 1
    if not runs:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise BenchError(f"{path} has no run that can be compared ({reasons or 'it has no row'})")
    return Table(tuple(runs), left_out)


def compare(a: Table, b: Table, across: bool = False) -> tuple[list[Comparison], list[str]]:
    """Every setting that both tables have, the worst first, and what there is to say about the rest.

    Runs of one environment are compared with each other. A setting that the tables share in no environment is reported
    without a verdict, unless `across` says that one machine is meant and only its software differs.
    """
    notes: list[str] = []
    compared: list[Comparison] = []
    numbers = _session_numbers(a, b)
    for key in dict.fromkeys(run.key for run in a.runs):
        mine, theirs = (_by_environment(table.runs, key) for table in (a, b))
        if not theirs:
            continue
        shared = [env for env in mine if env in theirs]
        if not shared and (len(mine) > 1 or len(theirs) > 1):
            named = setting_name(key)
            notes.append(
                f"{named}: not compared, for A measured it in {_names(mine)}, and B in {_names(theirs)}. Compare "
                "tables of one environment each."
            )
            continue
        for pair in [(env, env) for env in shared] or [(next(iter(mine)), next(iter(theirs)))]:
            compared.append(_compare(key, pair, (mine[pair[0]], theirs[pair[1]]), numbers, across))
        alone = sum(len(runs) for side in (mine, theirs) for env, runs in side.items() if env not in shared)
        if shared and alone:
            notes.append(f"{setting_name(key)}: {alone} rows of an environment that only one table has are left out.")
    varying = tuple(
        name for place, name in enumerate(KEY) if name not in _NAMED and len({one.key[place] for one in compared}) > 1
    )
    compared = [replace(one, varying=varying) for one in compared]
    return sorted(compared, key=lambda one: -one.ratio), notes


def with_schemas(table: Table, path: Path) -> Table:
    """The table with the schema of every run: of its record in `runs` beside the table, else of the version that wrote
    its row."""
    return replace(table, runs=tuple(replace(run, schema=_schema(path.parent / "runs", run)) for run in table.runs))


def _schema(folder: Path, run: Run) -> int | None:
    written_by = tuple(int(part) for part in run.env.speedlab.split(".") if part.isdecimal())
    of_version = SCHEMA if written_by >= _FIRST_OF_SCHEMA else None
    if not RUN_ID.fullmatch(run.run_id):
        return of_version
    try:
        schema = json.loads((folder / f"{run.run_id}.json").read_text(encoding="utf-8"))["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return of_version  # a table may be copied without its records
    return schema if isinstance(schema, int) else of_version


def _run(row: Mapping[str, str], path: Path) -> Run:
    try:
        seconds = float(row["time_s"])
    except ValueError as error:
        raise BenchError(f"{path}: run {row['run_id']} has a time that is no number: {error}") from None
    if not _SHORTEST_S <= seconds <= _LONGEST_S:
        raise BenchError(f"{path}: run {row['run_id']} has the impossible time {seconds:g} s")
    env = Environment(*(row[name] for name in ("env_hash", "device", *_SOFTWARE)))
    span = span_of(row["run_id"], row["timestamp"])
    return Run(tuple(row[name] for name in KEY), env, seconds, span, row["run_id"])


def _by_environment(runs: Iterable[Run], key: tuple[str, ...]) -> dict[Environment, list[Run]]:
    found: dict[Environment, list[Run]] = {}
    for run in runs:
        if run.key == key:
            found.setdefault(run.env, []).append(run)
    return found


def _session_numbers(a: Table, b: Table) -> dict[int, int]:
    """The session of every run, by the run's identity: all runs of a table part those of the other."""
    spans = [[run.span for run in table.runs] for table in (a, b)]
    numbers = (split(spans[0], spans[1]), split(spans[1], spans[0]))
    return {
        id(run): number
        for table, of in zip((a, b), numbers, strict=True)
        for run, number in zip(table.runs, of, strict=True)
    }


def _compare(
    key: tuple[str, ...],
    pair: tuple[Environment, Environment],
    sides: tuple[Sequence[Run], Sequence[Run]],
    numbers: Mapping[int, int],
    across: bool,
) -> Comparison:
    """One setting in the environments of `pair`, with the runs of both sides."""
    a, b = (_sessions(side, numbers) for side in sides)
    a_s, b_s = (math.exp(math.fsum(math.log(one.seconds) for one in side) / len(side)) for side in (a, b))
    mixture, hopeless = _mixture(pair, sides)
    taken = turns(a, b)
    known = Comparison(key, pair, a_s, b_s, b_s / a_s, (len(a), len(b)), taken, mixture=mixture)
    if taken < TURNS or hopeless or (mixture and not across):
        return known
    found = estimate(a, b)
    return replace(known, ratio=found.ratio, low=found.low, high=found.high)


def _sessions(runs: Sequence[Run], numbers: Mapping[int, int]) -> list[Session]:
    """The sessions of one setting: its rows of one session together are one time, their geometric mean."""
    grouped: dict[int, list[Run]] = {}
    for run in runs:
        grouped.setdefault(numbers[id(run)], []).append(run)
    return [_session(group) for group in grouped.values()]


def _session(group: Sequence[Run]) -> Session:
    seconds = math.exp(math.fsum(math.log(run.seconds) for run in group) / len(group))
    spans = [run.span for run in group if run.span is not None]
    if not spans:
        return Session(None, seconds)
    return Session((min(span.start for span in spans) + max(span.end for span in spans)) / 2.0, seconds)


def _mixture(pair: tuple[Environment, Environment], sides: Sequence[Sequence[Run]]) -> tuple[str | None, bool]:
    """How both sides differ in more than time, and whether no time of theirs can be compared for that."""
    a, b = pair
    both = {run.run_id for run in sides[0] if run.run_id} & {run.run_id for run in sides[1]}
    if both:
        return f"{len(both)} runs are in both tables", True
    schemas = [sorted({run.schema for run in side if run.schema is not None}) for side in sides]
    if len(set().union(*schemas)) > 1:
        shown = [" and ".join(map(str, side)) or "unknown" for side in schemas]
        return f"records of schema {shown[0]} in A and {shown[1]} in B, whose time_s means something else", True
    unknown = [any(run.schema is None for run in side) for side in sides]
    if unknown[0] != unknown[1]:
        shown = ["schema not known" if one else f"schema {SCHEMA}" for one in unknown]
        return f"{shown[0]} in A and {shown[1]} in B: time_s of schema 1 left out the move of weights", True
    if a == b:
        return None, False
    names = [name for name in ("device", *_SOFTWARE) if getattr(a, name) != getattr(b, name)]
    if not names:
        return "another machine, driver, flag or CPU (env_hash differs, all that the table names is equal)", False
    differing = [f"{name} {getattr(a, name) or '-'} in A and {getattr(b, name) or '-'} in B" for name in names]
    return "; ".join(differing), "device" in names


def _names(environments: Iterable[Environment]) -> str:
    return " and ".join(map(str, environments))

"""`compare A.csv B.csv`: what became slower or faster between two results tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from speedlab.common.tables import aligned, seconds

from ..client.errors import BenchError
from .csv_tables import Comparison, Environment, Table, compare, read_table, runs_of, with_schemas
from .drift import CONFIDENCE, TURNS

HEADER = ("setting", "A", "B", "B / A", f"{CONFIDENCE:.1%} interval", "")
REGRESSED = 3


def verdict(entry: Comparison) -> str:
    """What the times bear out; from too little, or from what differs in more than time, why there is no verdict."""
    if entry.low is None or entry.high is None:
        if entry.mixture is not None:
            return "no verdict: a mixture"
        return f"within one session ({entry.turns} of {TURNS} in turn)"
    if entry.is_regression:
        return "REGRESSION"
    if entry.is_faster:
        return "faster"
    if entry.low <= 1.0 <= entry.high:
        return "no difference shown"
    if entry.is_same:
        return "same within 3 %"
    return f"{'slower' if entry.low > 1.0 else 'faster'}, not shown to be by 3 %"


def format_comparison(entries: Sequence[Comparison]) -> str:
    """The table, columns aligned."""
    lines = [
        HEADER,
        *(
            (
                entry.name,
                seconds(entry.a_s),
                seconds(entry.b_s),
                f"{entry.ratio:.3f}",
                "-" if entry.low is None else f"{entry.low:.3f} to {entry.high:.3f}",
                verdict(entry),
            )
            for entry in entries
        ),
    ]
    return "\n".join(aligned(lines))


def run(args: argparse.Namespace) -> int:
    """The command: 0, or with --strict 3 where something became slower. Raises BenchError for what is no such table."""
    paths = Path(args.a), Path(args.b)
    tables = [with_schemas(runs_of(read_table(path), path), path) for path in paths]
    entries, notes = compare(tables[0], tables[1], args.across)
    if not entries and not notes:
        raise BenchError("the two tables have no setting in common that ended well in both")
    for label, table in zip("AB", tables, strict=True):
        for line in _about(label, table):
            print(line)
    for (env_a, env_b), group in _by_environment(entries).items():
        print(f"\nIn {env_a}:" if env_a == env_b else f"\nA in {env_a}, B in {env_b}:")
        for mixture in dict.fromkeys(entry.mixture for entry in group if entry.mixture is not None):
            print(f"A MIXTURE: {mixture}.")
        print(format_comparison(group))
    for label, mine, other in (("A", tables[0], tables[1]), ("B", tables[1], tables[0])):
        alone = len({run.key for run in mine.runs} - {run.key for run in other.runs})
        if alone:
            notes.append(f"{alone} settings are in {label} alone.")
    print("\n".join(["", *notes]))
    return _conclude(entries, args)


def _about(label: str, table: Table) -> list[str]:
    """What has to be known of a table before its figures."""
    lines = [f"{label}: {count} rows are left out: a run that {reason}." for reason, count in table.left_out.items()]
    unknown = sum(run.schema is None for run in table.runs)
    if unknown:
        lines.append(
            f"{label}: the records of {unknown} rows are not in runs beside the table, so their schema is not known. "
            "If it is 1, their time_s leaves out the move of weights to the device."
        )
    environments = dict.fromkeys(run.env for run in table.runs)
    if len(environments) > 1:
        listed = "; ".join(map(str, environments))
        lines.append(f"{label} holds runs of {len(environments)} environments, each compared with its own: {listed}.")
    return lines


def _by_environment(entries: Sequence[Comparison]) -> dict[tuple[Environment, Environment], list[Comparison]]:
    groups: dict[tuple[Environment, Environment], list[Comparison]] = {}
    for entry in entries:
        groups.setdefault(entry.env, []).append(entry)
    return groups


def _conclude(entries: Sequence[Comparison], args: argparse.Namespace) -> int:
    regressions = [entry for entry in entries if entry.is_regression]
    for entry in regressions:
        print(f"REGRESSION: {entry.name} takes {entry.ratio:.3f} times as long in B")
    judged = [entry for entry in entries if entry.low is not None]
    if judged and not regressions:
        open_ = sum(not entry.is_no_slower for entry in judged)
        said = f"of {len(judged)} settings none is slower by more than 3 % beyond doubt"
        doubt = f", but the intervals of {open_} are too wide to rule it out"
        print(f"No regression shown: {said}{doubt}." if open_ else f"No regression: {said}.")
    mixed = [entry for entry in entries if entry.low is None and entry.mixture is not None]
    if mixed:
        print(
            f"{len(mixed)} settings differ in more than time and have no verdict. Measure A and B in one environment"
            + ("." if args.across else "; where only the software of one machine differs, on purpose, add --across.")
        )
    few = len(entries) - len(judged) - len(mixed)
    if few:
        print(
            f"{few} settings have no verdict: a machine's own speed drifts, so that a ratio within one session shows "
            f"nothing. Run both at least {TURNS} times in turn (A, B, A, B, A, B), each into an --out folder of its "
            "own, and compare the two speedlab/results.csv."
        )
    return REGRESSED if regressions and args.strict else 0

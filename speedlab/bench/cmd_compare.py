"""`compare A.csv B.csv`: what became slower or faster between two results tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .compare_csv import Comparison, compare, read_table, samples
from .errors import BenchError
from .tables import seconds

HEADER = ("setting", "A", "B", "B / A", "95 % interval", "")
REGRESSED = 3


def verdict(entry: Comparison) -> str:
    """`REGRESSION`, `faster`, `same` (the interval holds 1), or `one repeat`, which proves nothing."""
    if entry.low is None or entry.high is None:
        return "one repeat"
    if entry.is_regression:
        return "REGRESSION"
    if entry.high < 1.0:
        return "faster"
    return "slower, below 3 %" if entry.low > 1.0 else "same"


def format_comparison(entries: Sequence[Comparison]) -> str:
    """The table, columns aligned."""
    lines = [
        HEADER,
        *(
            (
                entry.name,
                seconds(entry.a.mean),
                seconds(entry.b.mean),
                f"{entry.ratio:.3f}",
                "-" if entry.low is None else f"{entry.low:.3f} to {entry.high:.3f}",
                verdict(entry),
            )
            for entry in entries
        ),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def run(args: argparse.Namespace) -> int:
    """The command: 0, or with --strict 3 where something became slower. Raises BenchError for what is no such table."""
    tables = []
    for path in (Path(args.a), Path(args.b)):
        tables.append(samples(read_table(path), path))
    entries = compare(*tables)
    if not entries:
        raise BenchError("the two tables have no setting in common that ended well in both")
    print(format_comparison(entries))
    for label, mine, other in (("A", tables[0], tables[1]), ("B", tables[1], tables[0])):
        alone = sum(1 for key in mine if key not in other)
        if alone:
            print(f"{alone} settings are in {label} alone.")
    regressions = [entry for entry in entries if entry.is_regression]
    for entry in regressions:
        print(f"REGRESSION: {entry.name} takes {entry.ratio:.3f} times as long in B")
    if not regressions:
        print("No regression: nothing is slower by more than 3 % beyond doubt.")
    return REGRESSED if regressions and args.strict else 0

"""`compare`: what it calls different on a machine whose own speed drifts, and what it refuses to judge."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from speedlab.measure.record import CSV_COLUMNS
from speedlab.plans.in_turn import turned
from speedlab_tools import __main__ as cli
from speedlab_tools.bench import command as cmd_bench
from speedlab_tools.compare import command as cmd_compare
from speedlab_tools.compare import csv_tables, drift

BEGIN = datetime(2026, 11, 21, 21, 0, 0, tzinfo=timezone.utc)
ENV = {"env_hash": "a" * 12, "device": "AMD EPYC", "torch": "2.12.1", "comfyui": "0.3.75", "speedlab": "0.2.0"}
HALF_HOUR, STEP = 1800.0, 0.2
SETTINGS = ("stock", "deepcache", "bf16")


def row(seconds: float, begun: float, lasted: float = 60.0, **changes: Any) -> dict[str, str]:
    """A good row whose run began `begun` seconds after BEGIN."""
    at = BEGIN + timedelta(seconds=begun)
    known = {
        "plan": "stock", "time_s": f"{seconds:.6g}", "time_mean_s": f"{seconds:.6g}", "time_std_s": "0.01",
        "repeats": "5", "batch": "1", "width": "512", "height": "512", "steps": "20", "cfg": "8", "status": "ok",
        "scenario": "txt2img-default", **ENV,
        "run_id": f"{at:%Y%m%d-%H%M%S}-{random.randrange(16**8):08x}",
        "timestamp": f"{at + timedelta(seconds=lasted):%Y-%m-%dT%H:%M:%S%z}",
    }  # fmt: skip
    return {**dict.fromkeys(CSV_COLUMNS, ""), **known, **{name: str(value) for name, value in changes.items()}}


def in_turn(*seconds: float, every: float = 300.0, **changes: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of A and of B, measured A B A B."""
    rows = [row(value, every * place, **changes) for place, value in enumerate(seconds)]
    return rows[::2], rows[1::2]


def table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    cmd_bench.write_rows(path, rows)
    return path


@pytest.fixture
def command(tmp_path: Path, capsys: Any) -> Callable[..., tuple[int, str]]:
    """Run `compare` on two tables of these rows."""

    def run(a: Sequence[dict[str, str]], b: Sequence[dict[str, str]], *options: str) -> tuple[int, str]:
        paths = table(tmp_path / "a.csv", a), table(tmp_path / "b.csv", b)
        code = cli.main(["compare", *map(str, paths), *options])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def compared(a: Sequence[dict[str, str]], b: Sequence[dict[str, str]]) -> list[csv_tables.Comparison]:
    return csv_tables.compare(*(csv_tables.runs_of(rows, Path("t.csv")) for rows in (a, b)))[0]


# --- the machine's drift: by the logarithm of its speed at each of some times ---


def walk(chance: random.Random, times: Sequence[float]) -> list[float]:
    """Speed moves at random, 20 % typically in half an hour."""
    level, levels, last = 0.0, [], times[0]
    for at in times:
        level, last = level + chance.gauss(0.0, STEP * math.sqrt((at - last) / HALF_HOUR)), at
        levels.append(level)
    return levels


def ramp(chance: random.Random, times: Sequence[float]) -> list[float]:
    """Speed moves one way, 19 to 22 % in half an hour."""
    slope = chance.choice((-1.0, 1.0)) * chance.uniform(0.19, 0.22) / HALF_HOUR
    return [slope * at for at in times]


def two_levels(chance: random.Random, times: Sequence[float]) -> list[float]:
    """Speed jumps between two levels 19 to 22 % apart, once in half an hour on average."""
    apart, level, jump = chance.uniform(0.19, 0.22), chance.randrange(2), chance.expovariate(1.0 / HALF_HOUR)
    levels = []
    for at in times:
        while jump < at - times[0]:
            level, jump = 1 - level, jump + chance.expovariate(1.0 / HALF_HOUR)
        levels.append(apart * level)
    return levels


DRIFTS = (walk, ramp, two_levels)


def series_pair(
    chance: random.Random, moves: Callable[..., list[float]], b_takes: float, rounds: int
) -> list[csv_tables.Comparison]:
    """Two series of `rounds` sessions each in turn, five repeats a row that scatter by 1 to 3 %."""
    times = [0.0]
    while len(times) < 2 * rounds:
        times.append(times[-1] + chance.uniform(180.0, 600.0))
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for place, (at, level) in enumerate(zip(times, moves(chance, times), strict=True)):
        side = place % 2
        for plan, base in zip(SETTINGS, (10.0, 4.0, 6.0), strict=True):
            true = base * math.exp(level) * (b_takes if side else 1.0)
            scatter = chance.uniform(0.01, 0.03)
            repeats = [true * (1.0 + chance.gauss(0.0, scatter)) for _ in range(5)]
            sides[side].append(row(statistics.median(repeats), at, 120.0, plan=plan))
    return compared(*sides)


def called(entries: Sequence[csv_tables.Comparison]) -> int:
    return sum(entry.is_regression or entry.is_faster for entry in entries)


@pytest.mark.parametrize("moves", DRIFTS, ids=lambda f: f.__name__)
def test_of_a_thousand_equal_pairs_five_in_a_hundred_at_most_are_called_different(moves):
    chance = random.Random(17)
    wrong = sum(called(series_pair(chance, moves, 1.0, rounds=3)) > 0 for _ in range(1000))
    assert wrong <= 50, f"{wrong} of 1000 pairs have a setting that is called different"


@pytest.mark.parametrize("moves", DRIFTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("b_takes", [1.3, 1.0 / 1.3])
def test_a_true_difference_of_30_percent_is_called_in_most(moves, b_takes):
    chance = random.Random(18)
    entries = [entry for _ in range(200) for entry in series_pair(chance, moves, b_takes, rounds=3)]
    right = sum(entry.is_regression if b_takes > 1.0 else entry.is_faster for entry in entries)
    assert right > len(entries) / 2, f"{right} of {len(entries)}"
    other_way = sum(entry.is_faster if b_takes > 1.0 else entry.is_regression for entry in entries)
    assert other_way < len(entries) / 100


def test_fewer_than_three_sessions_in_turn_have_a_ratio_and_no_verdict(command):
    for rounds in (1, 2):
        a, b = in_turn(*(2.0, 9.0) * rounds)
        (entry,) = compared(a, b)
        assert entry.ratio == pytest.approx(4.5) and entry.turns == rounds and entry.low is None
        code, text = command(a, b, "--strict")
        assert code == 0 and "4.500" in text and f"within one session ({rounds} of 3 in turn)" in text
        assert "REGRESSION" not in text and "A, B, A, B, A, B" in text


def test_one_side_after_the_other_is_not_in_turn():
    rows = [row(value, 1200.0 * place) for place, value in enumerate((2.0, 2.01, 2.02, 3.0, 3.01, 3.02))]
    (entry,) = compared(rows[:3], rows[3:])
    assert entry.sessions == (3, 3) and entry.turns == 1 and entry.low is None
    # Pairs the other way round are as good.
    a, b = [rows[0], rows[3], rows[4]], [rows[1], rows[2], rows[5]]
    assert compared(a, b)[0].turns == 3


def test_three_sessions_a_side_in_turn_get_a_verdict(command):
    a, b = in_turn(2.0, 3.0, 2.02, 2.98, 2.01, 3.02)
    code, text = command([*a, row(2.0, 9000.0, steps=30)], b)
    assert code == 0 and "97.5% interval" in text and "1 settings are in A alone" in text
    assert "REGRESSION: txt2img-default: stock, 512x512 batch 1, 20 steps, cfg 8 takes 1.4" in text
    assert command(a, b, "--strict")[0] == 3
    code, text = command(b, a, "--strict")
    assert code == 0 and "faster" in text and "No regression: of 1 settings" in text
    code, text = command(*in_turn(2.0, 2.01, 2.02, 1.99, 2.01, 2.0), "--strict")
    assert code == 0 and "no difference shown" in text


def test_a_session_is_what_ran_without_a_pause_and_without_the_other_side():
    def span(begin: float, end: float) -> drift.Span:
        return drift.Span(begin, end)

    mine = [span(0, 100), span(0, 160), span(170, 200), span(900, 950), span(1400, 1450)]
    assert drift.split(mine, []) == [1, 1, 1, 2, 2]
    assert drift.split(mine, [span(1000, 1100)]) == [1, 1, 1, 2, 3]
    # What ran at the same time parts nothing, and rows without times are one session.
    assert drift.split(mine, [span(90, 165), span(940, 1410)]) == [1, 1, 1, 2, 2]
    assert drift.split([None, None], [span(0, 1)]) == [0, 0]
    two = row(2.0, 0.0, 200.0)
    assert drift.span_of(two["run_id"], two["timestamp"]) == drift.Span(BEGIN.timestamp(), BEGIN.timestamp() + 200.0)
    assert drift.span_of("", two["timestamp"]) is None and drift.span_of(two["run_id"], "yesterday") is None


def test_rows_of_one_session_are_one_time():
    rows = [row(1.9, 0.0), row(2.1, 61.0), row(99.0, 122.0, status="oom"), row(99.0, 183.0, time_s="")]
    (entry,) = compared(rows, [row(2.0, 400.0)])
    assert entry.sessions == (1, 1) and entry.a_s == pytest.approx(math.sqrt(1.9 * 2.1), rel=1e-5)


def test_rows_without_times_are_told_as_one_session(command):
    a, b = in_turn(2.0, 3.0, 2.0, 3.0, 2.0, 3.0, run_id="", timestamp="")
    _, text = command(a, b)
    assert "within one session (0 of 3 in turn)" in text


MIXTURES = (
    ({"device": "NVIDIA L4", "env_hash": "b" * 12}, "device AMD EPYC in A and NVIDIA L4 in B", False),
    ({"torch": "2.13.0", "env_hash": "b" * 12}, "torch 2.12.1 in A and 2.13.0 in B", True),
    ({"speedlab": "0.3.0", "env_hash": "b" * 12}, "speedlab 0.2.0 in A and 0.3.0 in B", True),
    ({"env_hash": "b" * 12}, "another machine, driver, flag or CPU", True),
)


@pytest.mark.parametrize(("changes", "words", "may_be_judged"), MIXTURES)
def test_another_environment_is_named_and_not_judged(command, changes, words, may_be_judged):
    a, b = in_turn(2.0, 3.0, 2.02, 2.98, 2.01, 3.02)
    b = [{**one, **changes} for one in b]
    code, text = command(a, b, "--strict")
    assert code == 0 and f"A MIXTURE: {words}" in text and "no verdict: a mixture" in text and "1.4" in text
    assert "REGRESSION" not in text and "--across" in text
    code, text = command(a, b, "--strict", "--across")
    assert (code == 3) == may_be_judged and f"A MIXTURE: {words}" in text


def test_a_table_of_two_environments_is_compared_group_by_group(command):
    other = {"device": "NVIDIA L4", "torch": "2.13.0", "env_hash": "b" * 12}
    slow, fast = in_turn(2.0, 2.0, 2.0, 2.0, 2.0, 2.01), in_turn(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, **other)
    code, text = command([*slow[0], *fast[0]], [*slow[1], *fast[1]])
    assert code == 0 and "A holds runs of 2 environments, each compared with its own" in text
    assert "In AMD EPYC, torch 2.12.1" in text and "In NVIDIA L4, torch 2.13.0" in text and "A MIXTURE" not in text
    entries = compared([*slow[0], *fast[0]], [*slow[1], *fast[1]])
    assert {entry.env[0].device: round(entry.a_s, 3) for entry in entries} == {"AMD EPYC": 2.0, "NVIDIA L4": 0.5}
    # B has one of the two alone.
    code, text = command([*slow[0], *fast[0]], slow[1])
    assert "3 rows of an environment that only one table has are left out" in text
    # B has a third one: which of A's two it is to be compared with is not for this command to choose.
    third = [{**one, "env_hash": "c" * 12, "device": "CPU"} for one in slow[1]]
    code, text = command([*slow[0], *fast[0]], third)
    assert "not compared, for A measured it in AMD EPYC" in text and "NVIDIA L4" in text


def test_records_of_an_older_schema_are_named(tmp_path, command):
    a, b = in_turn(2.0, 3.0, 2.02, 2.98, 2.01, 3.02)
    runs = tmp_path / "runs"
    runs.mkdir()
    for schema, rows in ((1, a), (2, b)):
        for one in rows:
            (runs / f"{one['run_id']}.json").write_text(json.dumps({"schema": schema}))
    code, text = command(a, b, "--strict", "--across")
    assert code == 0 and "A MIXTURE: records of schema 1 in A and 2 in B" in text
    assert "their schema is not known" not in text


def test_rows_without_their_records_are_told_to_be_of_an_unknown_schema(tmp_path, command):
    a, b = in_turn(2.0, 3.0, 2.02, 2.98, 2.01, 3.02, speedlab="0.1.0")
    (tmp_path / "runs").mkdir()
    for one in [*a, *b[1:]]:
        (tmp_path / "runs" / f"{one['run_id']}.json").write_text(json.dumps({"schema": 2}))
    code, text = command(a, b, "--strict", "--across")
    assert code == 0 and "B: the records of 1 rows are not in" in text and "their schema is not known" in text
    assert "A: the records" not in text
    assert "A MIXTURE: schema 2 in A and schema not known in B" in text and "REGRESSION" not in text


def test_a_row_of_a_version_without_schema_1_needs_no_record(command):
    a, b = in_turn(2.0, 3.0, 2.02, 2.98, 2.01, 3.02)
    code, text = command(a, b, "--strict")
    assert code == 3 and "schema" not in text
    old = [{**one, "speedlab": "0.1.0", "env_hash": "b" * 12} for one in a]
    code, text = command(old, b, "--strict", "--across")
    assert code == 0 and "A MIXTURE: schema not known in A and schema 2 in B" in text


@pytest.mark.parametrize(
    ("ratio", "low", "high", "told"),
    [
        (1.001, 0.99, 1.02, "no difference shown"),
        (1.02, 1.01, 1.028, "same within 3 %"),
        (1.02, 1.001, 1.05, "slower, not shown to be by 3 %"),
        (0.98, 0.95, 0.99, "faster, not shown to be by 3 %"),
        (1.01, 0.9, 1.2, "no difference shown"),
        (1.2, 1.1, 1.3, "REGRESSION"),
        (0.8, 0.7, 0.9, "faster"),
    ],
)
def test_a_verdict_says_what_its_whole_interval_bears_out(capsys, ratio, low, high, told):
    env = csv_tables.Environment("", "", "", "", "")
    key = ("",) * len(csv_tables.KEY)
    entry = csv_tables.Comparison(key, (env, env), 1.0, ratio, ratio, (3, 3), 3, low, high)
    assert cmd_compare.verdict(entry) == told
    cmd_compare._conclude([entry], argparse.Namespace(strict=False, across=False))
    said = capsys.readouterr().out
    assert ("REGRESSION" in said) == (told == "REGRESSION")
    assert ("No regression:" in said) == (high <= 1.03)
    assert ("too wide to rule it out" in said) == (high > 1.03 and told != "REGRESSION")


def test_a_table_against_itself_has_no_verdict(command):
    a, _ = in_turn(2.0, 2.0, 3.0, 3.0, 2.0, 2.0, every=1000.0)
    code, text = command(a, a, "--strict")
    assert code == 0 and "3 runs are in both tables" in text and "1.000" in text


def test_what_cannot_be_compared_is_counted(command):
    a, b = in_turn(2.0, 2.0)
    failed, cached = row(1.0, 5.0, status="oom"), row(1.0, 6.0, time_s="")
    _, text = command([*a, failed, cached, cached], b)
    assert (
        "A: 1 rows are left out: a run that did not end well" in text and "A: 2 rows are left out: a run that" in text
    )
    code, text = command([failed, cached], b)
    assert code == 1 and "has no run that can be compared" in text


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no modes of files")
def test_a_table_that_may_not_be_read_is_named(tmp_path, capsys):
    path = table(tmp_path / "a.csv", in_turn(2.0, 2.0)[0])
    path.chmod(0)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        code = cli.main(["compare", str(path), str(path)])
    finally:
        if was_root:
            os.seteuid(0)
    assert code == 1 and "close the program that holds it" in capsys.readouterr().err


def test_every_item_has_every_place_once_in_as_many_rounds_as_there_are_items():
    rounds = [turned("ABC", number) for number in range(4)]
    assert rounds[0] == rounds[3] == ["A", "B", "C"]
    assert [set(place) for place in zip(*rounds[:3], strict=True)] == [set("ABC")] * 3
    assert turned([], 3) == []

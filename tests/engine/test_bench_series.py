"""Comparing tables, cutting scenarios down, remembering what a series did, and the page."""

from __future__ import annotations

import contextlib
import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from speedlab.measure.record import CSV_COLUMNS, RunRecord, csv_row
from speedlab.measure.store import RunStore, new_run_id
from speedlab.plans.axes import parse_axis
from speedlab_tools import __main__ as cli
from speedlab_tools.bench import command as cmd_bench
from speedlab_tools.bench.html import html_page
from speedlab_tools.bench.models import ModelChoice
from speedlab_tools.bench.results import Journal, Outcome, series_key
from speedlab_tools.bench.runner import extra_data, parts_of
from speedlab_tools.client.errors import BenchError, ServerGone
from speedlab_tools.compare import csv_tables
from speedlab_tools.scenarios.catalog import SCENARIOS, find
from speedlab_tools.scenarios.overrides import Overrides, axis_values, shrink


def row(**changes: object) -> dict[str, str]:
    known = {
        "plan": "stock", "time_s": "2", "time_mean_s": "2", "time_std_s": "0.02", "batch": "1", "width": "512",
        "height": "512", "steps": "20", "cfg": "8", "repeats": "5", "status": "ok", "scenario": "txt2img-default",
    }  # fmt: skip
    return {**dict.fromkeys(CSV_COLUMNS, ""), **known, **{k: str(v) for k, v in changes.items()}}


def table(path: Path, *rows: dict[str, str]) -> Path:
    cmd_bench.write_rows(path, rows)
    return path


def compared(tmp_path: Path, a: list[dict[str, str]], b: list[dict[str, str]]) -> list[csv_tables.Comparison]:
    paths = table(tmp_path / "a.csv", *a), table(tmp_path / "b.csv", *b)
    return csv_tables.compare(*(csv_tables.runs_of(csv_tables.read_table(path), path) for path in paths))[0]


@pytest.mark.parametrize("changes", [{"time_s": "nan"}, {"time_s": -1}, {"time_s": "inf"}])
def test_impossible_numbers_are_named(tmp_path, changes):
    with pytest.raises(BenchError, match="impossible"):
        compared(tmp_path, [row(**changes)], [row()])


def test_rows_are_named_by_all_that_tells_them_apart(tmp_path):
    names = {entry.name for entry in compared(tmp_path, *[[row(sampler=s) for s in ("euler", "heun")]] * 2)}
    assert len(names) == 2


def test_tables_that_are_none_are_named(tmp_path, capsys):
    good = table(tmp_path / "good.csv", row())
    other = tmp_path / "other.csv"
    other.write_text("plan,time\nstock,1\n")
    cut = tmp_path / "cut.csv"
    cut.write_bytes(good.read_bytes()[:-20])
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00rubbish")
    empty = tmp_path / "empty.csv"
    empty.touch()
    bare = table(tmp_path / "bare.csv")
    for path, words in (
        (other, "it lacks max_vram_gb"), (cut, "line 2"), (binary, "cannot be read"), (empty, "is empty"),
        (bare, "holds no run"), (tmp_path / "none.csv", "there is no file"),
    ):  # fmt: skip
        assert cli.main(["compare", str(good), str(path)]) == 1
        assert words in capsys.readouterr().err
    assert "unknown are time" in _error(other)
    strange = table(tmp_path / "strange.csv", row(time_s="soon"))
    assert cli.main(["compare", str(good), str(strange)]) == 1
    assert "no number" in capsys.readouterr().err
    foreign = table(tmp_path / "foreign.csv", row(plan="else"))
    assert cli.main(["compare", str(good), str(foreign)]) == 1
    assert "no setting in common" in capsys.readouterr().err


def _error(path: Path) -> str:
    with pytest.raises(BenchError) as caught:
        csv_tables.read_table(path)
    return str(caught.value)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_small_cuts_every_scenario_and_says_so(scenario):
    parts = parts_of(scenario, small=True)
    whole, graph = parts_of(scenario), scenario.graph()
    wanted = len(whole)
    if len(whole) == len(scenario.settings.prompts):
        # Each variant once, or two prompts of the one that there is.
        wanted = len(set(graph.plans.values())) or min(2, len(whole))
    assert len(parts) == wanted
    for _, graph in parts:
        for node in graph.values():
            inputs = node["inputs"]
            assert not isinstance(inputs.get("width"), int) or inputs["width"] <= 64
            assert not isinstance(inputs.get("steps"), int) or inputs["steps"] <= 2
            assert not isinstance(inputs.get("repeats"), int) or inputs["repeats"] == 1
            for axis in ("x", "y"):
                if f"axis_{axis}" in inputs:
                    assert len(parse_axis(inputs[f"axis_{axis}"], inputs[f"values_{axis}"]).values) <= 8
    named = extra_data(scenario, small=True)["extra_pnginfo"]["speedlab"]
    assert named["scenario"] == f"{scenario.id}@small"
    assert (
        parts_of(scenario) == parts_of(scenario) and shrink(parts_of(scenario)[0][1]) == parts_of(scenario, True)[0][1]
    )


def test_small_axis_values():
    assert axis_values("steps", "10, 50") == "1, 2"
    assert axis_values("steps", "10, *20, 50") == "1, *2"
    assert axis_values("batch", "1, 2, max") == "1, max@2"
    assert axis_values("cfg", "5, 6, *7, 8").split(",")[0].strip() == "*7"
    assert axis_values("sampler", "euler@30, heun/karras@12") == "euler@2, heun/karras@2"
    assert (
        axis_values("plan", "a=tiny+settings(steps=30, cfg=3)\nb=stock") == "a=tiny+settings(steps=2, cfg=3)\nb=stock"
    )


def stored(out: Path, **changes: object) -> RunRecord:
    record = RunRecord(
        new_run_id(), "2026-01-01T00:00:00+0000", "ok", None, {"device": "<b>card</b>"}, "e" * 12,
        {"plan": "<script>alert(1)</script>", "batch": 1, "width": 64, "height": 64, "steps": 2, "cfg": 8.0,
         "scenario": "txt2img-default", **changes},
        {"text_encode": 1.0, "sample": 2.0, "decode": 3.0}, (), {"runs_ms": [2.0]}, {},
    )  # fmt: skip
    store = RunStore(out)
    store.write(record)
    store.append_csv(record)
    return record


def test_the_journal_recalls_only_what_is_whole(tmp_path):
    record = stored(tmp_path)
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    key = series_key({"ids": ["a"]})
    Journal(tmp_path, key).finished("a", [record.run_id], [picture])
    outcome = Outcome("a")
    assert Journal(tmp_path, key).recall("a", tmp_path, outcome)
    assert outcome.rows == [csv_row(record)] and outcome.images == [picture]
    assert not Journal(tmp_path, key).recall("b", tmp_path, Outcome("b"))
    assert not Journal(tmp_path, series_key({"ids": ["b"]})).done
    RunStore(tmp_path).json_path(record.run_id).unlink()
    lost = Outcome("a")
    assert not Journal(tmp_path, key).recall("a", tmp_path, lost) and lost.rows == []
    Journal(tmp_path, key).path.write_text("{broken")
    assert Journal(tmp_path, key).done == {}


def arguments(out: Path, **changes: object) -> SimpleNamespace:
    known = {"out": out, "server": None, "small": True, "restart": False, "csv": out / "s.csv", "html": out / "s.html"}
    return SimpleNamespace(**{**known, **changes})


def test_a_series_goes_on_after_its_server_died_and_after_an_interrupt(tmp_path, monkeypatch, capsys):
    """Only the server is pretended here; the client's own handling of a lost one is tested against a real server."""
    scenarios = [find(name) for name in ("txt2img-default", "sweep-steps", "sweep-cfg")]
    choice = ModelChoice({s.id: "demo.safetensors" for s in scenarios}, {}, {})
    ran: list[str] = []

    async def one(client, scenario, out, *, small, journal):
        outcome = Outcome(scenario.id)
        if journal.recall(scenario.id, out, outcome):
            outcome.recalled = 1
            return outcome
        ran.append(scenario.id)
        if scenario.id == "sweep-steps" and ran.count("sweep-steps") == 1:
            raise ServerGone("no answer")
        if scenario.id == "sweep-cfg" and ran.count("sweep-cfg") == 1:
            raise KeyboardInterrupt
        record = stored(out, scenario=scenario.id)
        outcome.rows.append(csv_row(record))
        outcome.records.append(RunStore(out).json_path(record.run_id))
        journal.finished(scenario.id, [record.run_id], [])
        return outcome

    monkeypatch.setattr(cmd_bench, "run_scenario", one)

    @contextlib.contextmanager
    def connect():
        yield SimpleNamespace(url="http://127.0.0.1:9", process=object(), tail=lambda: "last words")

    series = cmd_bench.Series(scenarios, choice, arguments(tmp_path), Overrides())
    with pytest.raises(KeyboardInterrupt):
        cmd_bench.run_series(series, connect)
    assert ran == ["txt2img-default", "sweep-steps", "sweep-cfg"]
    assert "last words" in series.outcomes["sweep-steps"].error
    again = cmd_bench.Series(scenarios, choice, arguments(tmp_path), Overrides())
    cmd_bench.run_series(again, connect)
    assert ran[3:] == ["sweep-steps", "sweep-cfg"]
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["scenario"] for r in rows] == ["txt2img-default", "sweep-steps", "sweep-cfg"]
    assert len({r["run_id"] for r in rows}) == 3
    with RunStore(tmp_path).csv_path.open(newline="") as file:
        assert sorted(r["run_id"] for r in csv.DictReader(file)) == sorted(r["run_id"] for r in rows)
    assert "were done by an earlier call" in capsys.readouterr().out


def test_the_page_escapes_everything_and_needs_nothing_else(tmp_path):
    record = stored(tmp_path)
    picture = tmp_path / "sheet.png"
    picture.write_bytes(b"\x89PNG")
    scenario = replace(find("txt2img-default"), title="<i>title</i>")
    outcome = Outcome(
        scenario.id, [csv_row(record)], [picture], [RunStore(tmp_path).json_path(record.run_id)], error="a < b & c"
    )
    page = html_page([scenario], [outcome], ["<note>"])
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<i>title" not in page and "a &lt; b &amp; c" in page and "&lt;note&gt;" in page
    assert "&lt;b&gt;card&lt;/b&gt;" in page
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
    assert "3.72 s, 0.147 s a step, 7.4 GB (A100-PCIE-40GB)" in page


def test_a_large_picture_is_in_the_page_as_jpeg(tmp_path):
    import random

    from PIL import Image

    picture = tmp_path / "sheet.png"
    Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(300 * 300 * 3)).save(picture)
    assert picture.stat().st_size > 200_000
    scenario = find("txt2img-default")
    page = html_page([scenario], [Outcome(scenario.id, images=[picture])], [])
    assert "data:image/jpeg;base64," in page and len(page) < picture.stat().st_size
    picture.write_bytes(b"\x89PNG" + bytes(200_000))
    assert "data:image/png;base64," in html_page([scenario], [Outcome(scenario.id, images=[picture])], [])


def test_all_is_every_scenario_once():
    assert [s.id for s in cmd_bench.chosen(["xy-grid", "all"])][:1] == ["xy-grid"]
    assert len(cmd_bench.chosen(["all", "xy-grid"])) == len(SCENARIOS)


def test_scenarios_say_what_is_missing(tmp_path, monkeypatch, capsys):
    from speedlab_tools.scenarios import workflows as cmd_tables

    monkeypatch.setattr(cmd_tables, "model_folders", lambda: [tmp_path])
    scenario = replace(find("sd15-precision"), packages=("json", "no_such_package_anywhere"))
    assert cmd_tables.missing(scenario, [tmp_path]) == [
        "models/checkpoints/v1-5-pruned-emaonly.safetensors", "package no_such_package_anywhere"
    ]  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "v1-5-pruned-emaonly.safetensors").touch()
    assert "ready" in cmd_tables.describe(find("sd15-precision"), [tmp_path])
    assert cli.main(["scenarios"]) == 0
    text = capsys.readouterr().out
    assert "missing: models/checkpoints/sd_xl_base_1.0.safetensors" in text and "xy-grid" in text

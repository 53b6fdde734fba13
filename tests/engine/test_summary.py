"""The figures of a run: steps / it_per_s is the sampling time, whatever kinds of steps there are; old records too."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.measure import report
from speedlab.measure.record import csv_row, from_json, loosely_from_json, step_dict
from speedlab.measure.store import RunStore
from speedlab.measure.summary import NO_STEPS, OLD_TOTAL, rows_of, step_kinds, summarise
from speedlab.measure.trace import StepRow
from speedlab.web.library import RunLibrary


def row(index, ms, kind="full"):
    evals, cond, uncond = {"-": (0, 0, 0), "forecast": (1, 0, 0), "cfg_off": (1, 1, 0)}.get(kind, (1, 1, 1))
    return StepRow(index, 1.0, None, ms, evals, cond, uncond, kind in ("cached", "forecast"))


# Of 9 steps 6 are cached: DeepCache with an interval of 3.
CACHING = [row(n, 1000.0 if n % 3 == 0 else 100.0, "full" if n % 3 == 0 else "cached") for n in range(9)]


def test_rate_is_steps_over_sampling_time_where_most_steps_are_cached():
    summary = summarise([3600.0], [CACHING], 900.0, 1000.0)
    assert summary["steps"] / summary["it_per_s"] == pytest.approx(3.6)
    assert summary["step_time_ms"] == 400.0
    assert {kind: (told["steps"], told["median_ms"]) for kind, told in summary["step_kinds"].items()} == {
        "full": (3, 1000.0), "cached": (6, 100.0),
    }  # fmt: skip


def test_medians_stand_for_each_kind_without_a_first_step_that_prepares():
    full = [row(n, ms) for n, ms in enumerate((500.0, 100.0, 110.0, 90.0))]
    steps = [*full, row(4, 50.0, "cfg_off"), row(5, 1.0, "forecast"), row(6, 0.0, "-")]
    assert step_kinds(steps) == ["full", "full", "full", "full", "cfg_off", "forecast", None]
    summary = summarise([851.0], [steps], 480.0, 500.0)
    kinds = summary["step_kinds"]
    assert kinds["full"]["median_ms"] == 100.0 and kinds["full"]["max_ms"] == 110.0 and kinds["full"]["steps"] == 4
    assert (kinds["cfg_off"]["median_ms"], kinds["forecast"]["median_ms"]) == (50.0, 1.0)
    assert "cached" not in kinds
    assert summary["first_step_excess_ms"] == 400.0
    assert 7 / summary["it_per_s"] == pytest.approx(0.851)


def test_a_single_step_of_a_kind_has_no_median(make_record):
    steps = [row(0, 500.0), row(1, 100.0), row(2, 60.0, "cached")]
    summary = summarise([660.0], [steps], 480.0, 500.0)
    assert {kind: told["samples"] for kind, told in summary["step_kinds"].items()} == {"full": 1, "cached": 1}
    assert summary["first_step_excess_ms"] == 400.0
    record = make_record(steps=[step_dict(step) for step in steps], summary=summary)
    assert "2 full, 100.0 ms; 1 cached, 60.0 ms" in report.summary_text(record)
    twice = summarise([660.0] * 2, [steps] * 2, 480.0, 500.0)
    record = make_record(steps=[step_dict(step) for step in steps], summary=twice)
    assert "2 full, median 100.0 ms; 1 cached, median 60.0 ms" in report.summary_text(record)


def test_the_only_step_exceeds_no_other():
    assert summarise([500.0], [[row(0, 500.0)]], 480.0, 500.0)["first_step_excess_ms"] is None
    assert summarise([90.0], [[row(0, 90.0)]], 480.0, 500.0)["first_step_excess_ms"] == 410.0, "after a warm-up"


def test_steps_that_all_run_without_cfg_are_full():
    steps = [row(n, 10.0, "cfg_off") for n in range(3)]
    assert step_kinds(steps) == ["full"] * 3


def test_summary_of_nothing_is_all_unknown():
    summary = summarise([], [], None, None)
    assert summary["run"] is None
    assert summary["it_per_s"] is None and summary["step_time_ms"] is None
    assert summary["step_kinds"] == {}


kinds = st.sampled_from(["full", "cached", "cfg_off", "forecast", "-"])


some_steps = st.lists(st.tuples(st.floats(0.001, 1e7), kinds), min_size=1, max_size=40)


@given(some_steps, st.lists(st.floats(0.001, 1e9), min_size=1, max_size=9))
def test_steps_over_rate_is_the_sampling_time_for_any_steps_and_repeats(steps, runs):
    rows = [row(n, ms, kind) for n, (ms, kind) in enumerate(steps)]
    summary = summarise(runs, [rows] * len(runs), None, None)
    median = sorted(runs)[len(runs) // 2] if len(runs) % 2 else summary["run"]["median"]
    assert summary["steps"] * summary["step_time_ms"] == pytest.approx(median, rel=1e-4, abs=1e-3)
    assert 1000.0 * summary["steps"] / summary["it_per_s"] == pytest.approx(median, rel=1e-4, abs=1e-3)
    assert sum(told["steps"] for told in summary["step_kinds"].values()) == sum(kind != "-" for _, kind in steps)


@pytest.fixture
def old(make_record):
    """A record as schema 1 had it: the median step is a cached one, so the rate is wrong 4 times."""
    told = {"repeats": 1, "runs_ms": [3600.0], "step_median_ms": 100.0, "step_p90_ms": 1000.0, "it_per_s": 10.0,
            "first_eval_ms": 900.0, "first_step_excess_ms": 900.0, "images_per_min": 12.0}  # fmt: skip
    data = json.loads(make_record(steps=[step_dict(step) for step in CACHING], summary=told).to_json())
    return {**data, "schema": 1}


def test_a_record_of_schema_1_is_read_with_the_rate_of_its_steps(old):
    record = from_json(json.dumps(old))
    assert record.schema == 2
    assert record.summary["it_per_s"] == 2.5
    assert record.summary["step_time_ms"] == 400.0
    assert record.summary["first_step_excess_ms"] == 0.0
    assert "step_median_ms" not in record.summary
    assert record.warnings == [OLD_TOTAL]
    cells = csv_row(record)
    assert (cells["steps"], cells["it_per_s"], cells["step_time_s"]) == ("9", "2.5", "0.4")
    text = report.summary_text(record)
    assert "9 steps in" in text and "2.50 it/s, a step 400.0 ms" in text and "6 cached, median 100.0 ms" in text
    # What is read is written as the present schema, and reads back the same.
    assert from_json(record.to_json()).to_json() == record.to_json()


def test_a_record_of_schema_1_has_no_time_from_text_to_image(old):
    """It left out the move of weights, so that beside a record of schema 2 it would look faster than it was."""
    phases = {"text_encode": 5.0, "prepare": 1.0, "sample": 3600.0, "decode": 10.0, "save": None, "total": 3616.0}
    told = {**old, "phases_ms": phases, "summary": {**old["summary"], "totals_ms": [3616.0, 3620.0]}}
    record = from_json(json.dumps(told))
    assert record.phases_ms == {**phases, "to_device": "unknown", "total": None}
    assert list(record.warnings) == [OLD_TOTAL]
    row = csv_row(record)
    assert (row["time_s"], row["time_mean_s"], row["images_per_min"]) == ("", "", "")
    assert from_json(record.to_json()).to_json() == record.to_json()
    unknown = from_json(json.dumps({**told, "phases_ms": {**phases, "total": None}}))
    assert list(unknown.warnings) == [], "there was no total to lose"


@pytest.mark.parametrize("phases", [None, [], "x", {"total": "x"}, {"total": [1]}])
def test_an_old_record_with_strange_phases_is_still_listed(old, phases):
    assert loosely_from_json(json.dumps({**old, "phases_ms": phases, "warnings": None})).summary["it_per_s"] == 2.5


def test_a_record_of_schema_1_without_steps_says_that_its_rate_is_not_known(old):
    record = from_json(json.dumps({**old, "steps": []}))
    assert record.summary["it_per_s"] is None and record.summary["step_time_ms"] is None
    assert list(record.warnings) == [OLD_TOTAL, NO_STEPS]
    assert NO_STEPS in report.report_text(record)
    assert csv_row(record)["it_per_s"] == ""


def test_a_record_of_a_later_schema_is_refused_with_what_to_do(old):
    from speedlab.common.errors import ResultsError

    with pytest.raises(ResultsError, match="of schema 3: update SpeedLab"):
        from_json(json.dumps({**old, "schema": 3}))


STRANGE_STEPS = [None, 3, [1], [{}], [{"cpu_ms": "x"}], [{"cpu_ms": float("nan")}], {"a": 1},
                 [{"cpu_ms": 5.0, "gpu_ms": [1]}], [{**step_dict(row(0, 1.0)), "evals": "many"}]]  # fmt: skip


@pytest.mark.parametrize("steps", STRANGE_STEPS)
@pytest.mark.parametrize("runs", [None, [], ["x"], [None], 7, [-1.0], [10**400]])
def test_an_old_record_with_strange_steps_is_still_listed(old, steps, runs):
    data = {**old, "steps": steps, "summary": {**old["summary"], "runs_ms": runs}}
    rate = loosely_from_json(json.dumps(data)).summary["it_per_s"]
    assert rate is None or rate > 0


def test_the_library_shows_an_old_record_with_the_right_rate_and_leaves_its_file(tmp_path, old):
    store = RunStore(tmp_path)
    store.runs.mkdir(parents=True)
    path = store.json_path(old["run_id"])
    path.write_text(json.dumps(old))
    library = RunLibrary(store)
    assert library.page().runs[0].it_per_s == 2.5
    assert json.loads(library.shown(old["run_id"]))["summary"]["it_per_s"] == 2.5
    assert library.text(old["run_id"]) == path.read_text() == json.dumps(old)


def test_rows_survive_the_record():
    assert rows_of([step_dict(step) for step in CACHING]) == tuple(CACHING)

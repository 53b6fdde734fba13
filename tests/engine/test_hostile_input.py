"""Input that once ended in a traceback, or would: each is refused in words or read past."""

from __future__ import annotations

import csv
import json
import struct

import pytest

from speedlab.common.errors import ResultsError
from speedlab.measure.context import NodeContext
from speedlab.measure.record import CSV_COLUMNS, csv_row, from_json
from speedlab.measure.store import RunStore, new_run_id
from speedlab.techniques.deepcache.schedule import nonuniform_steps
from speedlab_tools.bench.results import Journal, Outcome
from speedlab_tools.client.client import json_object
from speedlab_tools.client.errors import BenchError, describe_rejection, failure_from_status
from speedlab_tools.client.files import check_model_file
from speedlab_tools.compare import csv_tables, drift

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "header",
    ['{"a": {"data_offsets": [0, "4"]}}', '{"a": {"data_offsets": [0]}}', '{"a": {"data_offsets": [0, -4]}}',
     '{"a": {"data_offsets": [4, 0]}}', '{"a": {"data_offsets": [0, true]}}', '{"a": {"data_offsets": [0, 1e999]}}',
     '{"a": {"data_offsets": "04"}}', '{"a": ' + DEEP, '{"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": []}}'],
)  # fmt: skip
def test_a_safetensors_header_with_impossible_offsets_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(BenchError, match="header is unreadable"):
        check_model_file(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"request": [1]}, "request is not an object"),
        ({"summary": {"runs_ms": [True]}}, "summary.runs_ms is not a list of numbers"),
        ({"summary": {"runs_ms": [10**400]}}, "summary.runs_ms"),
        ({"summary": {"step_time_ms": []}}, "summary.step_time_ms"),
        ({"summary": {"it_per_s": "fast"}}, "summary.it_per_s"),
        ({"request": {"accelerators": [1.5]}}, "request.accelerators"),
        ({"request": {"checkpoint": "a"}}, "request.checkpoint"),
        ({"request": {"precision": {"unet": [1]}}}, "request.precision"),
        ({"memory": {"overall": 3}}, "memory is not an object of objects"),
        ({"kernels": [1]}, "kernels is not a list of objects"),
        ({"phases_ms": {"decode": {}}}, "phases_ms"),
        ({"env": None}, "env is not"),
        ({"env_hash": []}, "env_hash"),
        ({"quality": "good"}, "quality"),
        ({"run_id": 3}, "run id"),
    ],
)
def test_a_record_of_wrong_types_is_none(make_record, tmp_path, change, words):
    data = {**json.loads(make_record().to_json()), **change}
    with pytest.raises(ResultsError, match=words):
        from_json(json.dumps(data))
    store = RunStore(tmp_path)
    path = store.write(make_record())
    path.write_text(json.dumps(data))
    with pytest.raises(ResultsError):
        store.read(make_record().run_id)


def test_letters_that_no_file_holds_cost_no_record(make_record, tmp_path):
    """A prompt in JSON can name half of a surrogate pair; it must not end a run when its record is written."""
    record = make_record(
        run_id=new_run_id(), request={**make_record().request, "plan": "a\ud800\0b", "k\udfff": 1}, error="\udc00"
    )
    store = RunStore(tmp_path)
    store.write(record)
    assert store.append_csv(record)
    assert store.read(record.run_id).request["plan"] == "a?\0b"
    (row,) = csv_tables.read_table(store.csv_path)
    assert (row["plan"], row["error"]) == ("a? b", "?") and row == csv_row(record)


@pytest.mark.parametrize("text", ["1e300", "nan", "9" * 5000, "-1", "0"])
def test_a_table_with_an_impossible_time_is_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerow({"status": "ok", "time_s": text, "run_id": "r"})
    with pytest.raises(BenchError, match="impossible time"):
        csv_tables.runs_of(csv_tables.read_table(path), path)


@pytest.mark.parametrize(
    "stamp", ["0001-01-01T00:00:00+2359", "2026-11-21T21:36:26", "9999-12-31T23:59:59-2359", "\ud800"]
)
def test_a_time_that_no_calendar_has_is_unknown(stamp):
    found = drift.span_of("99991231-235959-00000000", stamp)
    assert found is None or found.start <= found.end
    assert drift.span_of("20261399-999999-00000000", "2026-11-21T21:36:26+0000") is None


def test_times_that_scatter_beyond_their_mean_bound_nothing():
    wild = [[drift.Session(2.0 * n + side, 1e-9 if (n + side) % 3 else 1e9) for n in range(3)] for side in (0, 1)]
    found = drift.estimate(*wild)
    assert found.low < 1.0 < found.high


@pytest.mark.parametrize("text", [DEEP, '{"a/0": {"runs": ["x"], "pictures": ["' + "9" * 5000 + '"]}}', '{"a/0": []}'])
def test_a_journal_that_is_none_means_nothing_is_done(tmp_path, make_record, text):
    journal = Journal(tmp_path, "series")
    journal.finished("a/0", [make_record().run_id], [])
    journal.path.write_text(text)
    assert not Journal(tmp_path, "series").recall("a/0", tmp_path, Outcome("x"))


def test_a_picture_with_an_impossible_name_is_left_out(tmp_path, make_record):
    RunStore(tmp_path).write(make_record())
    journal = Journal(tmp_path, "series")
    (tmp_path / "a.png").write_bytes(b"x")
    journal.finished("a/0", [make_record().run_id], [tmp_path / "a.png", tmp_path / ("9" * 5000)])
    outcome = Outcome("x")
    assert Journal(tmp_path, "series").recall("a/0", tmp_path, outcome)
    assert [path.name for path in outcome.images] == ["a.png"] and len(outcome.rows) == 1


@pytest.mark.parametrize("class_type", [["SpeedLabTextEncode"], {"a": 1}, 3, None])
def test_a_class_that_is_no_text_is_no_class(class_type):
    prompt = {"1": {"class_type": class_type, "inputs": {}}, "2": {"class_type": "X", "inputs": {"a": ["1", 0]}}}
    assert NodeContext.of(prompt, {}, "2").phase_ms("text_encode", []) is None


@pytest.mark.parametrize(
    "body",
    [{"node_errors": 3}, {"node_errors": {"1": "x"}}, {"node_errors": {"1": {"errors": 3}}}, {"error": [1]},
     {"node_errors": {"1": {"errors": [3, {"type": "value_not_in_list", "extra_info": {"input_config": 3}}]}}},
     {"node_errors": {"1": {"errors": [{"type": "value_not_in_list", "extra_info": {"input_config": ["COMBO"]}}]}}}],
)  # fmt: skip
def test_a_rejection_of_another_shape_is_words_all_the_same(body):
    assert describe_rejection(body, {}).startswith("the server refused the graph")


def test_a_failure_of_another_shape_is_words_all_the_same():
    assert "failed: 3" in str(failure_from_status({"traceback": [1, None], "exception_message": 3}, {}))


@pytest.mark.parametrize("body", [b"\xff\xfe", b"[1]", b"", DEEP.encode(), b"<html>", b"null"])
def test_what_is_no_object_is_no_answer(body):
    assert json_object(body) is None
    assert json_object(b'{"a": 1}') == {"a": 1}


def test_a_center_before_the_window_repeats_no_step():
    assert nonuniform_steps(2, 2, -2, 2.0) in (None, (0, 1))

"""A fleet's folder: going on, what a crash leaves, changed orders, and records with their rows."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from speedlab.common.errors import ResultsError
from speedlab.measure.store import RunStore
from speedlab_tools.fleet import FleetError
from speedlab_tools.fleet.tasks import Task
from speedlab_tools.fleet.worker import Done
from speedlab_tools.fleet.writer import LOST, Attempt, Row, Writer, row_of

ATTEMPT = Attempt("w1", "here", 1, "2026-01-02T03:04:05.678+00:00", 2.0)
ASKED = {"scenario": "txt2img-default", "steps": 20, "prompts": "p.txt", "prompts_sha256": "a"}


def tasks_of(*texts):
    return [Task(n, f"{n + 1:05d}", text, None, n, f"key of {text}") for n, text in enumerate(texts)]


def opened(writer, tasks, asked=ASKED, restart=False, accept=False):
    return writer.open(asked, tasks, restart=restart, accept=accept)


def done(writer, task, data=b"picture", records=()):
    return writer.done(task, Done((data,), records, 1.0), ATTEMPT)


@pytest.fixture
def begun(tmp_path):
    """A folder with two of four prompts done."""
    tasks = tasks_of("a", "b", "c", "d")
    with Writer(tmp_path) as writer:
        assert opened(writer, tasks) == [0, 1, 2, 3]
        for task in (tasks[2], tasks[0]):
            done(writer, task, task.prompt.encode())
    return tmp_path, tasks


def test_the_same_order_goes_on(begun):
    path, tasks = begun
    with Writer(path) as writer:
        assert opened(writer, tasks) == [1, 3]
        manifest = writer.write_manifest()
    assert [json.loads(line)["index"] for line in manifest.read_text().splitlines()] == [0, 2]


def test_the_manifest_has_every_row_of_the_journal(begun):
    """Also one that was written when Ctrl-C came, before anything in memory knew of it."""
    path, tasks = begun
    with Writer(path) as writer:
        opened(writer, tasks)
        done(writer, tasks[1])
        del writer.rows[1]
        writer.write_manifest()
    rows = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]


def test_half_a_row_and_half_a_picture_are_made_again(begun):
    path, tasks = begun
    with (path / "fleet.jsonl").open("a") as journal:
        journal.write('{"index": 1, "name": "0000')
    (path / "pictures" / "00001.png").write_bytes(b"")
    with Writer(path) as writer:
        assert opened(writer, tasks) == [0, 1, 3]
        done(writer, tasks[1])
    with Writer(path) as writer:
        assert opened(writer, tasks) == [0, 3]


@pytest.mark.parametrize("restart", [False, True])
def test_failed_rows_are_tried_again(begun, restart):
    path, tasks = begun
    with Writer(path) as writer:
        opened(writer, tasks)
        writer.failed(tasks[1], "lost", replace(ATTEMPT, attempts=3), LOST)
    with Writer(path) as writer:
        assert opened(writer, tasks, restart=restart) == ([0, 1, 2, 3] if restart else [1, 3])
        assert len(list((path / "pictures").iterdir())) == (0 if restart else 2)


def test_a_changed_prompts_file_is_explained(begun):
    path, _ = begun
    changed = tasks_of("a", "b", "x", "d", "e")
    with Writer(path) as writer, pytest.raises(FleetError) as caught:
        opened(writer, changed, {**ASKED, "prompts_sha256": "b"})
    text = str(caught.value)
    assert "p.txt: 4 prompts then, 5 now; 3 are the same, the first that differs is number 3" in text
    assert "--accept-changes" in text and "--restart" in text
    assert len(list((path / "pictures").iterdir())) == 2, "nothing was touched"
    with Writer(path) as writer:
        assert opened(writer, changed, accept=True) == [1, 2, 3, 4]
    assert [file.name for file in (path / "pictures").iterdir()] == ["00001.png"]


def test_results_that_are_still_asked_for_move_to_their_new_places(begun):
    """A line put in at the top, two that changed places, one twice: by the key, for each has a seed of its own."""
    path, _ = begun
    with Writer(path) as writer:
        assert opened(writer, tasks_of("x", "c", "b", "a", "a"), accept=True) == [0, 2, 4]
        writer.write_manifest()
    rows = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    assert [(row["index"], row["name"], row["prompt"]) for row in rows] == [(1, "00002", "c"), (3, "00004", "a")]
    held = {file.name: file.read_bytes() for file in (path / "pictures").iterdir()}
    assert held == {"00002.png": b"c", "00004.png": b"a"}
    with Writer(path) as writer:
        assert opened(writer, tasks_of("a", "c"), accept=True) == [], "each takes the other's place"
    assert {file.name: file.read_bytes() for file in (path / "pictures").iterdir()} == {
        "00001.png": b"a",
        "00002.png": b"c",
    }


def test_a_picture_with_another_byte_is_made_again(begun):
    path, tasks = begun
    (path / "pictures" / "00001.png").write_bytes(b"A")
    with Writer(path) as writer:
        assert opened(writer, tasks) == [0, 1, 3]


def test_a_full_disk_is_told_with_the_path(begun, monkeypatch):
    path, tasks = begun

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("speedlab_tools.fleet.writer.write_atomically", full)
    with Writer(path) as writer:
        with pytest.raises(ResultsError, match=str(path)):
            opened(writer, tasks)
        with pytest.raises(ResultsError, match=r"manifest\.jsonl"):
            writer.write_manifest()


def test_prompts_that_were_added_or_taken_away_are_counted(begun):
    path, tasks = begun
    other = {**ASKED, "prompts_sha256": "b"}
    for now, words in ((tasks[:2], "4 prompts then, 2 now; 2 are the same"), (tasks_of(*"abcde"), "number 5")):
        with Writer(path) as writer, pytest.raises(FleetError, match=words):
            opened(writer, now, other)


def test_other_settings_are_named(begun):
    path, tasks = begun
    other = [replace(task, key=f"{task.key}, 30 steps") for task in tasks]
    with Writer(path) as writer, pytest.raises(FleetError, match="steps: 20 then, 30 now"):
        opened(writer, other, {**ASKED, "steps": 30})
    with Writer(path) as writer, pytest.raises(FleetError, match="builds another one"):
        opened(writer, other)


def test_a_file_that_only_looks_different_is_the_same_order(begun):
    path, tasks = begun
    with Writer(path) as writer:
        assert opened(writer, tasks, {**ASKED, "prompts_sha256": "b"}) == [1, 3]


def test_two_fleets_do_not_write_one_folder(tmp_path):
    with Writer(tmp_path), pytest.raises(FleetError, match="Another fleet"), Writer(tmp_path):
        pass
    with Writer(tmp_path):
        pass


def test_pictures_are_not_written_through_a_link(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "out" / "pictures").symlink_to(tmp_path / "else")
    with pytest.raises(FleetError, match="leads out"), Writer(tmp_path / "out"):
        pass


def test_a_journal_that_names_other_files_deletes_none(begun):
    path, tasks = begun
    kept = path / "precious.png"
    kept.write_bytes(b"x")
    line = json.loads((path / "fleet.jsonl").read_text().splitlines()[0])
    for name in ("precious.png", "../precious.png", "pictures/../precious.png", str(kept)):
        line["pictures"][0]["file"] = name
        assert row_of(json.dumps(line)) is None
        (path / "fleet.jsonl").write_text(json.dumps(line) + "\n")
        with Writer(path) as writer:
            opened(writer, tasks, restart=True)
        assert kept.is_file()


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "1", '{"pictures": 3}', '{"pictures": [{}]}', "[" * 99999])
def test_what_is_no_row_is_none(text):
    assert row_of(text) is None


def test_a_row_comes_back_as_it_was(begun):
    path, _ = begun
    for line in (path / "fleet.jsonl").read_text().splitlines():
        row = row_of(line)
        assert isinstance(row, Row) and row.line() == line + "\n"


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_broken_order_file_is_an_error_with_a_way_out(begun, content):
    path, tasks = begun
    (path / "fleet.json").write_text(content)
    with Writer(path) as writer, pytest.raises(FleetError, match="--restart"):
        opened(writer, tasks)
    with Writer(path) as writer:
        assert opened(writer, tasks, restart=True) == [0, 1, 2, 3]
    with Writer(path) as writer:
        assert opened(writer, tasks) == [0, 1, 2, 3]


def test_a_record_gets_its_row_once_also_after_a_crash(tmp_path, make_record):
    tasks = tasks_of("a", "b")
    records = [make_record(run_id=f"20260102-030405-0000000{n}") for n in range(2)]
    with Writer(tmp_path) as writer:
        opened(writer, tasks)
        for task, record in zip(tasks, records, strict=True):
            done(writer, task, records=(record.to_json(),))
    table = tmp_path / "speedlab" / "results.csv"
    lines = table.read_text().splitlines(keepends=True)
    # As if the power had gone between the manifest's row and the table's.
    table.write_text("".join(lines[:-1]))
    RunStore._appended.clear()
    for _ in range(2):
        with Writer(tmp_path) as writer:
            assert opened(writer, tasks) == []
    with table.open(newline="") as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == [record.run_id for record in records]


def test_a_run_that_failed_is_a_row_with_its_error(tmp_path, make_record):
    task = tasks_of("a")[0]
    record = make_record(status="oom", error="out of memory")
    with Writer(tmp_path) as writer:
        opened(writer, [task])
        row = done(writer, task, records=(record.to_json(),))
    assert (row.status, row.error, row.run_ids) == ("error", "out of memory", (record.run_id,))


@pytest.mark.parametrize("quality", [None, True])
def test_beside_its_baseline_a_cell_that_failed_has_failed(tmp_path, make_record, quality):
    """Without, some of a search for the most that fits fail by design."""
    records = [make_record(run_id="20260102-030405-00000001"),
               make_record(run_id="20260102-030405-00000002", status="oom", error="out of memory")]  # fmt: skip
    (task,) = tasks = tasks_of("a")
    with Writer(tmp_path) as writer:
        opened(writer, tasks, {**ASKED, "quality": quality})
        row = done(writer, task, records=tuple(record.to_json() for record in records))
        warned = any("ran once" in text for text in writer.store.read(records[0].run_id).warnings)
    assert (row.status, warned) == ("error" if quality else "ok", bool(quality))


def test_records_of_workers_on_one_machine_say_so(tmp_path, make_record):
    task, record = tasks_of("a")[0], make_record()
    with Writer(tmp_path) as writer:
        opened(writer, [task])
        writer.done(task, Done((b"x",), (record.to_json(),), 1.0), replace(ATTEMPT, shared=2))
        kept = writer.store.read(record.run_id)
    (warning,) = kept.warnings
    assert kept.artifacts == {"images": ["pictures/00001.png"]}
    assert "2 workers of a fleet shared this machine" in warning


@pytest.mark.parametrize("cold", [True, False])
def test_a_workers_first_prompt_tells_no_time_of_a_repeat(tmp_path, make_record, cold):
    task, record = tasks_of("a")[0], make_record(run_id=f"20260102-030406-0000000{int(cold)}")
    with Writer(tmp_path) as writer:
        opened(writer, [task])
        writer.done(task, Done((b"x",), (record.to_json(),), 1.0, cold), ATTEMPT)
        kept = writer.store.read(record.run_id)
        with writer.store.csv_path.open(newline="") as file:
            (row,) = csv.DictReader(file)
    assert (row["time_s"] == "", row["images_per_min"] == "") == (cold, cold)
    assert kept.phases_ms["total"] == (None if cold else 2500.0)
    assert row["it_per_s"] == "10", "sampling is what a repeat pays"
    assert any("first prompt of its worker" in warning for warning in kept.warnings) == cold

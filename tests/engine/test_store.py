"""Records on disk: whole or not at all, one row a run, nothing outside the runs folder."""

from __future__ import annotations

import csv
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from speedlab.common.errors import ResultsError
from speedlab.measure import store as stores
from speedlab.measure.record import CSV_COLUMNS

from ..held_table import held


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_record_is_written_and_read_back(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    path = store.write(make_record())
    assert path == tmp_path / "speedlab" / "runs" / "20260102-030405-0123abcd.json"
    assert store.read("20260102-030405-0123abcd").to_json() == make_record().to_json()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


@pytest.mark.parametrize(
    "run_id",
    ["", "..", "../../etc/passwd", "20260102-030405-0123abcd/..", "C:\\x", "a\0b", "20260102-030405-0123abcd\n",
     "20260102-030405-0123ABCD", "٢0260102-030405-0123abcd"],
)  # fmt: skip
def test_a_run_id_cannot_name_another_path(tmp_path, run_id):
    with pytest.raises(ResultsError, match="not a run id"):
        stores.RunStore(tmp_path).read(run_id)


def test_new_run_ids_are_valid_and_unique(tmp_path):
    ids = {stores.new_run_id() for _ in range(200)}
    assert len(ids) == 200
    for run_id in ids:
        stores.RunStore(tmp_path).json_path(run_id)


def test_run_ids_never_go_backwards_with_the_clock(monkeypatch):
    times = iter(("20991025-025959", "20991025-020000", "20991025-020001", "20991025-040000"))
    monkeypatch.setattr(stores, "_last_stamp", "")
    monkeypatch.setattr(stores, "time", SimpleNamespace(strftime=lambda _: next(times)))
    stamps = [stores.new_run_id()[:15] for _ in range(4)]
    assert stamps == ["20991025-025959", "20991025-030000", "20991025-030001", "20991025-040000"]


def test_a_record_is_younger_than_all_before_it(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    earlier = store.write(make_record(run_id="20990101-000000-00000000"))
    future = earlier.stat().st_mtime_ns + 10**15
    os.utime(earlier, ns=(future, future))
    assert store.write(make_record()).stat().st_mtime_ns > future


@pytest.mark.parametrize("content", [b"a" * 200_000, b'"' + b"a,\n" * 70_000])
def test_what_is_no_table_is_named_and_left_alone(make_record, tmp_path, content):
    store = stores.RunStore(tmp_path)
    store.root.mkdir()
    store.csv_path.write_bytes(content)
    for act in (store.check_writable, lambda: store.append_csv(make_record(run_id=stores.new_run_id()))):
        with pytest.raises(ResultsError, match=r"results\.csv"):
            act()
    assert store.csv_path.read_bytes() == content


def test_rows_are_appended_once_a_run(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    first = make_record(run_id=stores.new_run_id())
    second = make_record(run_id=stores.new_run_id())
    assert store.append_csv(first)
    assert not store.append_csv(first)
    assert store.append_csv(second)
    assert [row["run_id"] for row in rows(store.csv_path)] == [first.run_id, second.run_id]
    assert store.csv_path.read_text().splitlines()[0] == ",".join(CSV_COLUMNS)


def test_a_table_with_other_columns_is_refused_and_left_alone(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    store.root.mkdir(parents=True)
    store.csv_path.write_text("a,b\n1,2\n")
    with pytest.raises(ResultsError, match=r"results\.csv has other columns"):
        store.append_csv(make_record(run_id=stores.new_run_id()))
    with pytest.raises(ResultsError, match="other columns"):
        store.check_writable()
    assert store.csv_path.read_text() == "a,b\n1,2\n"


def test_half_a_row_left_by_a_crash_spoils_no_later_row(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    first = make_record(run_id=stores.new_run_id())
    store.append_csv(first)
    with store.csv_path.open("ab") as file:
        file.write(b"stock,7.4,2.")
    second = make_record(run_id=stores.new_run_id())
    store.append_csv(second)
    ids = [row["run_id"] for row in rows(store.csv_path)]
    assert ids[0] == first.run_id
    assert ids[-1] == second.run_id


def test_a_folder_that_cannot_be_written_is_named(make_record, tmp_path):
    (tmp_path / "speedlab").write_text("a file where the folder should be")
    store, record = stores.RunStore(tmp_path), make_record(run_id=stores.new_run_id())
    for act in (store.check_writable, lambda: store.write(record), lambda: store.append_csv(record)):
        with pytest.raises(ResultsError, match=r"cannot write to .*speedlab"):
            act()


def test_half_a_row_that_ends_in_a_quote_swallows_no_later_row(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    store.append_csv(make_record(run_id=stores.new_run_id()))
    with store.csv_path.open("ab") as file:
        file.write(b'"deepcache(interval=3, bra')
    last = make_record(run_id=stores.new_run_id())
    store.append_csv(last)
    assert rows(store.csv_path)[-1]["run_id"] == last.run_id


def test_a_table_that_a_spreadsheet_saved_is_still_ours(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    store.append_csv(make_record(run_id=stores.new_run_id()))
    store.csv_path.write_bytes(b"\xef\xbb\xbf" + store.csv_path.read_bytes())
    store.check_writable()
    assert store.append_csv(make_record(run_id=stores.new_run_id()))


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links on this system")
def test_a_link_that_leads_out_is_refused(make_record, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    output = tmp_path / "output"
    (output / "speedlab").mkdir(parents=True)
    (output / "speedlab" / "runs").symlink_to(outside, target_is_directory=True)
    store = stores.RunStore(output)
    with pytest.raises(ResultsError, match="leads out"):
        store.write(make_record())
    assert not list(outside.iterdir())


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links on this system")
@pytest.mark.parametrize("name", [".", "runs", "results.csv"])
def test_a_link_to_itself_is_refused_and_nothing_is_made_behind_one(make_record, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    store = stores.RunStore(tmp_path / "output")
    path = store.root / name
    path.parent.mkdir(parents=True)
    path.symlink_to(outside if name == "." else path, target_is_directory=name == ".")
    acts = (store.check_writable, lambda: store.write(make_record()), lambda: store.folder("images"))
    for act in (*acts, lambda: store.append_csv(make_record(run_id=stores.new_run_id()))):
        with pytest.raises(ResultsError, match="leads out"):
            act()
    assert not list(outside.iterdir())


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links on this system")
@pytest.mark.parametrize("name", ["images", "charts", "waiting", "results.csv", "results.csv.lock"])
def test_every_target_is_checked_for_links(make_record, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    store = stores.RunStore(tmp_path / "output")
    store.check_writable()
    (store.root / name).symlink_to(outside / name)
    for act in (store.check_writable, lambda: store.append_csv(make_record(run_id=stores.new_run_id()))):
        with pytest.raises(ResultsError, match="leads out"):
            act()
    assert not list(outside.iterdir())


def test_a_full_disk_leaves_earlier_rows_whole(make_record, tmp_path):
    """A file-size limit in a child process: the kernel refuses the write half-way, as a full disk does."""
    store = stores.RunStore(tmp_path)
    for _ in range(3):
        store.append_csv(make_record(run_id=stores.new_run_id()))
    before = store.csv_path.read_bytes()
    root = Path(__file__).resolve().parents[2]
    script = f"""
import importlib.util, resource, signal, sys
def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
    module = importlib.util.module_from_spec(spec); sys.modules[name] = module; spec.loader.exec_module(module)
load("speedlab", {str(root / "speedlab")!r})
from speedlab.common.errors import ResultsError
from speedlab.measure.record import from_json
from speedlab.measure.store import RunStore, new_run_id
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 40}, {len(before) + 40}))
store = RunStore(Path({str(tmp_path)!r}))
try:
    store.append_csv(from_json({make_record().to_json()!r}).changed(run_id=new_run_id()))
except ResultsError as error:
    print("refused:", error)
"""
    if sys.platform == "win32":
        pytest.skip("no file-size limits on Windows")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "refused:" in done.stdout, done.stderr
    assert "results.csv" in done.stdout
    assert store.csv_path.read_bytes() == before


def test_many_writers_lose_no_row(make_record, tmp_path):
    ids = [stores.new_run_id() for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run_id: stores.RunStore(tmp_path).append_csv(make_record(run_id=run_id)), ids))
    assert sorted(row["run_id"] for row in rows(tmp_path / "speedlab" / "results.csv")) == sorted(ids)


def test_a_failed_write_keeps_the_earlier_version(tmp_path):
    target = tmp_path / "record.json"
    stores.write_atomically(target, b"first")
    with pytest.raises(TypeError):
        stores.write_atomically(target, None)  # type: ignore[arg-type]
    assert target.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_row_waits_while_another_program_holds_the_table(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    first, second, third = (make_record(run_id=stores.new_run_id(), warnings=("an older one",)) for _ in range(3))
    assert store.keep(first) is first
    before = store.csv_path.read_bytes()
    with held(store.csv_path):
        store.check_writable()
        kept = store.keep(second)
        assert not store.append_csv(second), "its row is kept, so it is not appended again"
        store.take_in()
    assert kept.warnings[0] == "an older one"
    assert f"the row of this run waits in {store.waiting / second.run_id}.csv" in kept.warnings[1]
    assert store.read(second.run_id).to_json() == kept.to_json()
    assert store.csv_path.read_bytes() == before
    assert rows(store.waiting / f"{second.run_id}.csv")[0]["run_id"] == second.run_id
    assert store.keep(third) is third
    assert [row["run_id"] for row in rows(store.csv_path)] == [first.run_id, second.run_id, third.run_id]
    assert not list(store.waiting.iterdir())


def test_a_row_waits_while_another_process_keeps_the_table_locked(make_record, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_LOCK_TIMEOUT_S", 0.05)
    store = stores.RunStore(tmp_path)
    first, second, third = (make_record(run_id=stores.new_run_id()) for _ in range(3))
    store.keep(first)
    before = store.csv_path.read_bytes()
    with FileLock(str(store.root / "results.csv.lock")):
        kept = store.keep(second)
        with pytest.raises(ResultsError, match=r"locked by another process .* wait on"):
            store.take_in()
    assert f"the row of this run waits in {store.waiting / second.run_id}.csv" in kept.warnings[-1]
    assert store.csv_path.read_bytes() == before
    assert store.keep(third) is third
    assert [row["run_id"] for row in rows(store.csv_path)] == [first.run_id, second.run_id, third.run_id]
    assert store.waiting_ids() == ()


def test_a_crash_between_table_and_waiting_row_writes_none_twice(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    store.append_csv(make_record(run_id=stores.new_run_id()))
    ids = sorted(stores.new_run_id() for _ in range(2))  # as the rows that wait are taken in
    with held(store.csv_path):
        for run_id in ids:
            store.append_csv(make_record(run_id=run_id))
    waited = {run_id: (store.waiting / f"{run_id}.csv").read_bytes() for run_id in ids}
    store.take_in()
    whole = store.csv_path.read_bytes()
    # The table has one row whole and the other cut off, and both still wait.
    store.csv_path.write_bytes(whole[:-20])
    for run_id, text in waited.items():
        (store.waiting / f"{run_id}.csv").write_bytes(text)
    store.take_in()
    assert [row["run_id"] for row in rows(store.csv_path)][1:] == [ids[0], ids[1], ids[1]]
    assert store.csv_path.read_bytes().endswith(b"\r\n")
    timestamps = [row["timestamp"] for row in rows(store.csv_path)]
    assert timestamps.count(make_record().timestamp) == 3, "each row once, beside the half one of the crash"
    assert store.waiting_ids() == ()


def test_what_is_no_waiting_row_is_left_alone(make_record, tmp_path, caplog):
    store = stores.RunStore(tmp_path)
    store.append_csv(make_record(run_id=stores.new_run_id()))
    no_row, empty = "20260101-000000-00000000.csv", "20260101-000000-00000001.csv"
    foreign = {no_row: b"a,b\r\n1,2\r\n", empty: b"", "notes.txt": b"x"}
    store.waiting.mkdir()
    for name, data in foreign.items():
        (store.waiting / name).write_bytes(data)
    last = make_record(run_id=stores.new_run_id())
    store.append_csv(last)
    assert [row["run_id"] for row in rows(store.csv_path)][1:] == [last.run_id]
    assert {path.name: path.read_bytes() for path in store.waiting.iterdir()} == foreign
    assert "is no row of this version's table" in caplog.text


def _write_rows(output, make_record, ids):
    store = stores.RunStore(output)
    for run_id in ids:
        store.keep(make_record(run_id=run_id))


@pytest.mark.skipif(sys.platform != "linux", reason="a forked process keeps what this one may not do")
def test_processes_that_meet_a_held_table_lose_no_row_and_write_none_twice(make_record, tmp_path):
    store = stores.RunStore(tmp_path)
    groups = [[stores.new_run_id() for _ in range(10)] for _ in range(6)]
    first = groups[0].pop()
    store.append_csv(make_record(run_id=first))
    fork = multiprocessing.get_context("fork")

    def at_once(chosen):
        writers = [fork.Process(target=_write_rows, args=(tmp_path, make_record, ids)) for ids in chosen]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(120)
            assert writer.exitcode == 0

    with held(store.csv_path):
        at_once(groups[:3])
        assert sorted(store.waiting_ids()) == sorted(run_id for ids in groups[:3] for run_id in ids)
    at_once(groups[3:])
    found = Counter(row["run_id"] for row in rows(store.csv_path))
    assert all(found[run_id] == 1 for ids in groups for run_id in ids)
    assert found[first] == 1
    assert sum(found.values()) == 60
    assert store.waiting_ids() == ()


def test_a_folder_that_only_can_be_read_is_still_an_error(make_record, tmp_path):
    """Here nothing of the row can be kept: a table that is held is another thing."""
    store = stores.RunStore(tmp_path)
    store.append_csv(make_record(run_id=stores.new_run_id()))
    store.root.chmod(0o555)
    try:
        with held(store.csv_path), pytest.raises(ResultsError, match=r"cannot write to .*speedlab"):
            store.append_csv(make_record(run_id=stores.new_run_id()))
    finally:
        store.root.chmod(0o755)

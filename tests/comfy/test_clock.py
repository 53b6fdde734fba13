"""A clock that goes backwards: the machine's time is set while runs are made and listed."""

from __future__ import annotations

import itertools
import json
import time

import pytest


@pytest.fixture
def backwards(monkeypatch):
    """Every look at the wall clock is an hour before the last one."""
    start, hours = time.time(), itertools.count()
    real = time.strftime
    monkeypatch.setattr(time, "time", lambda: start - 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int((start - 3600 * next(hours)) * 1e9))
    monkeypatch.setattr(
        time, "strftime", lambda form, when=None: real(form, when or time.localtime(start - 3600 * next(hours)))
    )


def test_a_run_is_measured_and_kept(node, tiny, engine, backwards, base_dir):
    sampler = node("SpeedLabProfileSampler")
    records = [
        sampler.sample(
            model=tiny.model, seed=seed, steps=4, cfg=2.0, sampler_name="euler", scheduler="normal", denoise=1.0,
            positive=tiny.cond(1), negative=tiny.cond(2), latent_image=tiny.latent(), repeats=2,
        )["result"][1]
        for seed in (1, 2, 3)
    ]  # fmt: skip
    store = engine("measure.store").RunStore(base_dir / "output")
    ids = [record.run_id for record in records]
    stamps = [record.timestamp for record in records]
    assert stamps == sorted(set(stamps), reverse=True), "the clock did go backwards"
    assert ids == sorted(set(ids)), "the ids did not"
    for run_id in ids:
        record = json.loads(store.json_path(run_id).read_text())
        assert record["status"] == "ok"
        numbers = [*record["summary"]["runs_ms"], *(step["cpu_ms"] for step in record["steps"])]
        numbers += [ms for ms in record["phases_ms"].values() if isinstance(ms, (int, float))]
        assert numbers and all(ms >= 0 for ms in numbers)
    listed = [run.run_id for run in engine("web.library").RunLibrary(store).page(limit=200).runs]
    assert [run_id for run_id in listed if run_id in ids] == ids[::-1], "newest first"


def test_locks_and_rows_do_not_wait_for_the_clock(engine, backwards, tmp_path, make_any_record):
    store = engine("measure.store").RunStore(tmp_path)
    started = time.monotonic()
    for run_id in ("20260102-030405-00000002", "20260101-030405-00000001"):
        record = make_any_record(engine, run_id)
        store.write(record)
        assert store.append_csv(record)
    assert time.monotonic() - started < 20
    assert len(store.csv_path.read_text().splitlines()) == 3


@pytest.fixture
def make_any_record():
    def make(engine, run_id):
        from speedlab_tools.stress.samples import record

        return record().changed(run_id=run_id)

    return make

"""Faults on real processes: prompts cancelled in every phase, writers killed, a full disk, two servers on one table."""

from __future__ import annotations

import asyncio
import csv
import sys
from collections import Counter
from random import Random

import pytest

from speedlab.measure.store import RunStore
from speedlab.web.library import RunLibrary
from speedlab_tools.client.client import ComfyClient
from speedlab_tools.stress import faults, server, writers

pytestmark = pytest.mark.server
CHECKPOINT = "speedlab_demo_sd15.safetensors"
CANCELS = len(faults.PHASES) + 2

# What a technique that forgets to undo its work would leave.
LEAK = """
import threading, time, torch

class Leak:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "leak", True, "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def leak(self, model):
        model.add_wrapper_with_key("apply_model", "left", lambda executor, *a, **k: executor(*a, **k) * 1.0001)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        threading.Thread(target=time.sleep, args=(600,), daemon=True, name="left behind").start()
        return {}

NODE_CLASS_MAPPINGS = {"TestLeak": Leak}
"""


@pytest.fixture(scope="module")
def stressed(start_server, tmp_path_factory):
    """A server with the probe, and with a node that leaks."""
    base = tmp_path_factory.mktemp("stressed")
    server.bring_probe(base)
    (base / "custom_nodes" / "leak").mkdir(parents=True)
    (base / "custom_nodes" / "leak" / "__init__.py").write_text(LEAK)
    return start_server(base=base)


@pytest.mark.full
def test_prompts_cancelled_in_every_phase_leave_nothing(stressed):
    tally = faults.cancel_at_random(stressed.url, stressed.output, CHECKPOINT, CANCELS, Random(1))
    assert not tally.broken
    assert tally.faults == tally.runs == CANCELS
    assert tally.halves >= CANCELS / 2, "most of them were cancelled before they had ended"


def test_memory_that_runs_out_anywhere_leaves_nothing(stressed):
    tally = faults.run_out_of_memory(stressed.url, stressed.output, CHECKPOINT, 6, Random(4))
    assert not tally.broken
    assert tally.faults == tally.runs == 6
    assert tally.halves >= 2, "most of them ended the prompt with an error that says so"


def test_what_a_technique_leaves_would_be_seen(stressed):
    """After the tests above: what leaks here stays in the server."""

    async def leak():
        async with ComfyClient(stressed.url) as client:
            before = await server.look(client, CHECKPOINT)
            leak = {"class_type": "TestLeak", "inputs": {"model": ["1", 0]}}
            await client.run({"1": server.stock(CHECKPOINT)["1"], "9": leak}, timeout_s=120)
            return server.differences(before, await server.look(client, CHECKPOINT), 1)

    lines = " ".join(asyncio.run(leak()))
    for what in ("model", "flags", "threads", "latents"):
        assert f"the {what} differ" in lines, lines
    assert "apply_model" in lines and "left behind" in lines


def test_a_writer_that_is_killed_costs_no_run(tmp_path):
    tally = writers.kill_while_writing(tmp_path, 8, Random(2))
    assert not tally.broken
    assert tally.faults == 8 and tally.runs > 0


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes on Windows")
def test_a_full_disk_is_told_and_costs_no_run(tmp_path):
    tally = writers.fill_the_disk(tmp_path, 8, Random(3))
    assert not tally.broken
    assert tally.faults == 8 and tally.runs > 0


def test_writers_at_once_lose_no_row(tmp_path):
    tally = writers.write_at_once(tmp_path, 4, 15)
    assert not tally.broken
    assert tally.runs == 60


def test_a_lost_run_would_be_seen(tmp_path):
    """The check itself: a record and a row that are gone, a half record, a row that is there twice."""
    writers.write_at_once(tmp_path, 1, 4)
    store = RunStore(tmp_path)
    ids = [run.run_id for run in RunLibrary(store).page().runs]
    store.json_path(ids[0]).unlink()
    store.json_path(ids[1]).write_text(store.json_path(ids[1]).read_text()[:100])
    lines = store.csv_path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if ids[2] not in line]
    store.csv_path.write_text("".join([*kept, next(line for line in lines if ids[3] in line)]))
    broken = " ".join(writers.check_written(writers.FaultTally("x"), tmp_path, ids).broken)
    for words in (f"{ids[0]}: cannot read", f"{ids[1]}: not a whole record", f"{ids[2]} is 0 times",
                  f"{ids[3]} is 2 times", "1 files are no whole records"):  # fmt: skip
        assert words in broken


@pytest.mark.full
def test_two_servers_write_one_table(start_server, server, graph, tmp_path):
    other = start_server(base=tmp_path, output=server.output)
    try:
        queued = [(api, api.queue(graph(seed=500 + n))) for n in range(3) for api in (server, other)]
        entries = [api.wait(prompt_id) for api, prompt_id in queued]
    finally:
        other.server.stop()
    ids = [entry["outputs"]["7"]["speedlab"][0]["run_id"] for entry in entries]
    assert len(set(ids)) == 6
    with (server.output / "speedlab" / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    written = Counter(row["run_id"] for row in rows)
    assert [written[run_id] for run_id in ids] == [1] * 6
    assert all(None not in row.values() and None not in row for row in rows)
    assert all(server.record(run_id)["status"] == "ok" for run_id in ids)

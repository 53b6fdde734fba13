"""Every scenario of the table on one real server, cut down by `--small`, as `run.py bench all --small` does it."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path

import pytest

from speedlab.bench.client import ComfyClient
from speedlab.bench.journal import Journal
from speedlab.bench.overrides import Overrides, adapt
from speedlab.bench.runner import run_scenario
from speedlab.bench.scenarios import SCENARIOS

pytestmark = pytest.mark.server
DEMOS = {"sd15": "speedlab_demo_sd15.safetensors", "sdxl": "speedlab_demo_vega.safetensors"}
# A scenario that needs more files than these has its test where those are made.
RUNNABLE = [
    entry
    for entry in SCENARIOS.values()
    if entry.family in DEMOS
    and not entry.packages
    and {file.kind for file in entry.files if not file.optional} <= {"checkpoint", "tiny_vae"}
]


@pytest.mark.parametrize("scenario", RUNNABLE, ids=[entry.id for entry in RUNNABLE])
def test_every_scenario_runs_small(server, vega_checkpoint, taesd_files, scenario, tmp_path):
    target = server.models / "checkpoints" / vega_checkpoint.name
    if not target.exists():
        target.symlink_to(vega_checkpoint)

    async def work():
        async with ComfyClient(server.url) as client:
            wanted = adapt(scenario, Overrides(), DEMOS[scenario.family])
            return await run_scenario(client, wanted, tmp_path, small=True)

    outcome = asyncio.run(work())
    assert outcome.error is None
    assert outcome.rows and outcome.pictures
    assert [row["error"] for row in outcome.rows if row["status"] != "ok"] == []
    for path in outcome.records:
        assert json.loads(Path(path).read_text())["request"]["scenario"] == f"{scenario.id}@small"
    assert len({row["run_id"] for row in outcome.rows}) == len(outcome.rows)


def test_a_finished_part_is_not_run_again(server, tmp_path):
    wanted = adapt(SCENARIOS["xy-grid"], Overrides(), DEMOS["sd15"])

    async def work():
        async with ComfyClient(server.url) as client:
            return [
                await run_scenario(client, wanted, tmp_path, small=True, journal=Journal(tmp_path, "series"))
                for _ in range(2)
            ]

    first, second = asyncio.run(work())
    assert (first.recalled, second.recalled) == (0, 1)
    assert first.rows == second.rows and first.pictures == second.pictures
    with (tmp_path / "speedlab" / "results.csv").open(newline="") as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == [row["run_id"] for row in first.rows]

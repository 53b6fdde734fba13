"""Every scenario of the table on one real server, cut down by `--small`, as `run.py bench all --small` does it."""

from __future__ import annotations

import argparse
import asyncio
import csv
import importlib.util
import json
from pathlib import Path

import pytest

from speedlab_tools.bench.models import ModelChoice, choose_models
from speedlab_tools.bench.results import Journal
from speedlab_tools.bench.runner import run_scenario
from speedlab_tools.client.client import ComfyClient
from speedlab_tools.scenarios.catalog import SCENARIOS
from speedlab_tools.scenarios.overrides import Overrides, adapt

pytestmark = pytest.mark.server
DEMO = "speedlab_demo_sd15.safetensors"
OPTIONS = argparse.Namespace(server=None)


@pytest.fixture(scope="module")
def models(server, vega_checkpoint, taesd_files) -> ModelChoice:
    """What `bench` uses where no file is named: demo models for every kind of file, where the server finds them."""
    choice = choose_models(OPTIONS, list(SCENARIOS.values()))
    files = {**choice.files, "checkpoints": [*choice.files["checkpoints"], vega_checkpoint]}
    for folder, paths in files.items():
        (server.models / folder).mkdir(exist_ok=True)
        for path in paths:
            target = server.models / folder / path.name
            if not target.exists():
                target.symlink_to(path)
    return choice


# Of every day: each node of this pack once. That ComfyUI takes all graphs is shown in test_scenario_graphs.py.
EVERYDAY = {
    "txt2img-default", "sd15-controlnet", "sd15-few-steps", "sd15-sliced-attention", "sd15-autocast",
    "xy-grid", "sdxl-under-8gb", "sdxl-vae-fp16-fix", "sdxl-staged-batch", "sdxl-refiner-ensemble", "sdxl-tensorrt",
}  # fmt: skip


def _tiered(scenario):
    return pytest.param(scenario, id=scenario.id, marks=() if scenario.id in EVERYDAY else pytest.mark.full)


def test_the_scenarios_of_every_day_have_every_node():
    def nodes(ids):
        found = {node.class_type for name in ids for node in SCENARIOS[name].graph().nodes}
        return {name for name in found if name.startswith("SpeedLab")}

    assert nodes(EVERYDAY) == nodes(SCENARIOS)


@pytest.mark.parametrize("scenario", map(_tiered, SCENARIOS.values()))
def test_every_scenario_runs_small(server, models, scenario, tmp_path):
    """A scenario whose package is not there says which one, and how to get it."""

    async def work():
        async with ComfyClient(server.url) as client:
            wanted = adapt(scenario, Overrides(), models.checkpoints[scenario.id], models.others_of(scenario))
            return await run_scenario(client, wanted, tmp_path, small=True)

    outcome = asyncio.run(work())
    lacking = [name for name in scenario.packages if importlib.util.find_spec(name) is None]
    if lacking:
        assert "not installed" in outcome.error and "install" in outcome.error
        return
    assert outcome.error is None
    assert outcome.rows and outcome.images
    assert [row["error"] for row in outcome.rows if row["status"] != "ok"] == []
    for path in outcome.records:
        assert json.loads(Path(path).read_text())["request"]["scenario"] == f"{scenario.id}@small"
    assert len({row["run_id"] for row in outcome.rows}) == len(outcome.rows)


@pytest.mark.full
def test_a_finished_part_is_not_run_again(server, tmp_path):
    wanted = adapt(SCENARIOS["xy-grid"], Overrides(), DEMO)

    async def work():
        async with ComfyClient(server.url) as client:
            return [
                await run_scenario(client, wanted, tmp_path, small=True, journal=Journal(tmp_path, "series"))
                for _ in range(2)
            ]

    first, second = asyncio.run(work())
    assert (first.recalled, second.recalled) == (0, 1)
    assert first.rows == second.rows and first.images == second.images
    with (tmp_path / "speedlab" / "results.csv").open(newline="") as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == [row["run_id"] for row in first.rows]

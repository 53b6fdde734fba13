"""The workflows, the client and the commands against a real ComfyUI server."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from speedlab_tools.bench.outside import OutsideMemory, outside_record, phases, sampled
from speedlab_tools.client import errors
from speedlab_tools.client.client import ComfyClient, Follower
from speedlab_tools.client.events import nodes_of, text_to_image_s
from speedlab_tools.client.graph import signature_from_info, snapshot
from speedlab_tools.demo import graph_of
from speedlab_tools.scenarios.catalog import SCENARIOS
from speedlab_tools.scenarios.overrides import Overrides, adapt
from speedlab_tools.scenarios.scenario import STOCK, Prompt, Settings

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "speedlab_demo_sd15.safetensors"
TINY = Settings(prompts=(Prompt("text", "a tree", 1, ""),), width=64, height=64, steps=2)
pytestmark = pytest.mark.server


def talk(url: str, work):
    """Run `work(client)` with an open client."""

    async def session():
        async with ComfyClient(url) as client:
            return await work(client)

    return asyncio.run(session())


def command(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    """`python -m speedlab_tools` in a process of its own, as run.py starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "speedlab_tools", *arguments, "--out", str(out)]
    return subprocess.run(line, env=environment, cwd=out, capture_output=True, text=True, timeout=600, check=False)


def test_the_signature_snapshot_is_what_the_server_says(server):
    info = talk(server.url, lambda client: client.object_info())
    live = {node_id: signature_from_info(node_id, info[node_id]) for node_id in snapshot()}
    for node_id, known in snapshot().items():
        now = live[node_id]
        if not node_id.startswith("SpeedLab"):  # newer versions of core's nodes have more outputs behind these
            now = replace(now, outputs=now.outputs[: len(known.outputs)])
        assert now == known
    assert {node_id for node_id in info if node_id.startswith("SpeedLab")} <= set(snapshot())


def test_core_nodes_are_timed_from_outside(server):
    graph = graph_of(TINY, CHECKPOINT, STOCK).to_api()
    result = talk(server.url, lambda client: client.run(graph, timeout_s=600))
    again = talk(server.url, lambda client: client.run(graph, timeout_s=600))
    total = text_to_image_s(result.log, graph)
    assert total is not None and total > 0
    told = sampled(result)
    assert len(told["steps"]) == TINY.steps
    spent = phases(result)
    parts = [spent[name] for name in ("text_encode", "prepare", "sample", "decode", "save")]
    assert sum(parts) == pytest.approx(spent["total"])
    record = outside_record(result, request={"steps": TINY.steps}, env={}, memory=OutsideMemory())
    assert TINY.steps / record.summary["it_per_s"] == pytest.approx(spent["sample"] / 1000.0, rel=1e-3)
    assert sum(step["cpu_ms"] for step in told["steps"]) == pytest.approx(spent["sample"], rel=0.01)
    assert set(nodes_of(graph, ["CLIPTextEncode"])) <= again.log.cached
    assert text_to_image_s(again.log, graph) is None


def test_the_picture_comes_back_and_can_be_uploaded(server, tmp_path):
    graph = graph_of(TINY, CHECKPOINT, STOCK).to_api()

    async def work(client):
        result = await client.run(graph, timeout_s=600)
        path = tmp_path / "picture.png"
        path.write_bytes(await client.view(result.images("SaveImage")[0]))
        return path, await client.upload(path)

    path, name = talk(server.url, work)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert name == "picture.png"


def test_a_refused_graph_is_put_into_words(server):
    graph = graph_of(TINY, "no_such.safetensors", STOCK).to_api()
    with pytest.raises(errors.PromptRejected) as caught:
        talk(server.url, lambda client: client.run(graph))
    assert "'no_such.safetensors' is no choice of 'ckpt_name'; the server has" in str(caught.value)
    assert CHECKPOINT in str(caught.value)
    assert "1" in caught.value.node_errors
    with pytest.raises(errors.PromptRejected, match="NoSuchNode"):
        talk(server.url, lambda client: client.run({"1": {"class_type": "NoSuchNode", "inputs": {}}}))


def test_a_node_that_raises_is_named(server):
    graph = graph_of(TINY, CHECKPOINT, STOCK).to_api()
    decode = nodes_of(graph, ["VAEDecode"])[0]
    save = nodes_of(graph, ["SaveImage"])[0]
    graph[save]["inputs"]["filename_prefix"] = "../../outside"
    with pytest.raises(errors.ExecutionFailed, match=f"node {save}, SaveImage, failed: .*outside"):
        talk(server.url, lambda client: client.run(graph, timeout_s=600))
    assert decode in graph


def test_an_interrupt_stops_the_run_and_the_next_one_works(server):
    settings = Settings(prompts=(Prompt("text", "long", 3, ""),), width=64, height=64, steps=2000)

    async def work(client):
        stops = []

        def stop(event):
            if event.kind == "progress" and not stops:
                stops.append(asyncio.ensure_future(client.interrupt()))

        with pytest.raises(errors.ExecutionInterrupted):
            await client.run(graph_of(settings, CHECKPOINT, STOCK).to_api(), listener=stop, timeout_s=600)
        await asyncio.gather(*stops)
        return await client.run(graph_of(TINY, CHECKPOINT, STOCK).to_api(), timeout_s=600)

    assert talk(server.url, work).images("SaveImage")


@pytest.mark.full
def test_a_run_that_takes_too_long_is_stopped(server):
    settings = Settings(prompts=(Prompt("text", "too long", 4, ""),), width=64, height=64, steps=5000)

    async def work(client):
        with pytest.raises(errors.RunTimeout, match="was stopped"):
            await client.run(graph_of(settings, CHECKPOINT, STOCK).to_api(), timeout_s=3)
        return await client.run(graph_of(TINY, CHECKPOINT, STOCK).to_api(), timeout_s=600)

    assert talk(server.url, work).images("SaveImage")


@pytest.mark.full
def test_a_socket_that_drops_is_survived_and_the_log_says_so(server, monkeypatch):
    settings = Settings(prompts=(Prompt("text", "drop", 5, ""),), width=64, height=64, steps=20)
    sockets = []
    connect = Follower._connect

    async def remembered(self):
        sockets.append(await connect(self))
        return sockets[-1]

    monkeypatch.setattr(Follower, "_connect", remembered)

    async def work(client):
        closed = []

        def drop(event):
            if event.kind == "progress" and not closed:
                closed.append(asyncio.ensure_future(sockets[0].close()))

        return await client.run(graph_of(settings, CHECKPOINT, STOCK).to_api(), listener=drop, timeout_s=600)

    result = talk(server.url, work)
    assert result.images("SaveImage")
    assert not result.log.complete


def test_nothing_at_the_address_is_said_so(server):
    with pytest.raises(errors.ServerGone, match=r"127\.0\.0\.1:9"):
        talk("127.0.0.1:9", lambda client: client.run(graph_of(TINY, CHECKPOINT, STOCK).to_api()))


def test_bench_runs_a_scenario_on_a_running_server(server, tmp_path):
    arguments = ("--width", "64", "--height", "64", "--steps", "2", "--repeats", "2", "--checkpoint", CHECKPOINT)
    done = command("bench", "txt2img-default", "--server", server.url, *arguments, out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "64x64" in done.stdout
    assert "A100-PCIE-40GB" in done.stdout
    assert (tmp_path / "txt2img-default.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "speedlab" / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["scenario"], row["plan"], row["steps"], row["repeats"]) == ("txt2img-default", "stock", "2", "2")
    assert (tmp_path / "speedlab" / "runs" / f"{row['run_id']}.json").is_file()


@pytest.mark.full
def test_each_image_of_a_bench_is_a_warm_repeat_with_its_texts_encoded(server, tmp_path):
    """Texts that an earlier image had too count again, and the short run before leaves nothing behind."""
    before = server.get("/speedlab/runs?limit=1")["files"]
    arguments = ("--width", "64", "--height", "64", "--steps", "3", "--checkpoint", CHECKPOINT)
    done = command(
        "bench", "sd15-sliced-attention", "txt2img-default", "--server", server.url, *arguments, out=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "speedlab" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        record = json.loads((tmp_path / "speedlab" / "runs" / f"{row['run_id']}.json").read_text())
        assert float(row["time_s"]) > 0 and record["phases_ms"]["text_encode"] > 0
        assert row["steps"] == "3" and not any("moved its weights" in text for text in record["warnings"])
    assert server.get("/speedlab/runs?limit=1")["files"] == before + len(rows)


def test_bench_fails_with_words_where_the_server_lacks_the_checkpoint(server, tmp_path):
    arguments = ("txt2img-default", "--server", server.url, "--checkpoint", "no_such.safetensors")
    done = command("bench", *arguments, out=tmp_path)
    assert done.returncode == 1
    assert "'no_such.safetensors' is no choice of 'ckpt_name'" in done.stdout


@pytest.mark.full
def test_demo_prints_a_row_of_each_preset_with_ratio_and_distance(server, taesd_files, tmp_path):
    sizes = ("--width", "64", "--height", "64", "--steps", "3")
    before = server.get("/speedlab/runs?limit=1")["files"]
    done = command("demo", "--server", server.url, *sizes, "--checkpoint", CHECKPOINT, out=tmp_path)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"([\d.]+) times as fast as stock \((?:median of 3|lower median of 2|one) round", done.stdout)
    assert len(told) == 3
    assert "PSNR" in done.stdout
    names = ["stock", "exact", "balanced", "fast"]
    assert {path.name for path in tmp_path.glob("*.png")} == {f"demo_{name}.png" for name in names}
    with (tmp_path / "speedlab" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["plan"] == "stock"
    assert len({row["seed"] for row in rows}) == 1
    assert len(rows) == 4 and not rows[0]["psnr"]
    for row, ratio in zip(rows[1:], told, strict=True):
        assert float(rows[0]["time_s"]) / float(row["time_s"]) == pytest.approx(float(ratio), abs=0.011)
        assert float(row["psnr"]) > 0 and -1 <= float(row["ssim"]) <= 1
    assert "tiny_vae" in rows[3]["accelerators"] and "deepcache" in rows[3]["accelerators"]
    assert all(float(row["time_s"]) > 0 and row["status"] == "ok" for row in rows)
    runs = [json.loads((tmp_path / "speedlab" / "runs" / f"{row['run_id']}.json").read_text()) for row in rows]
    for row, run in zip(rows, runs, strict=True):
        assert len(run["steps"]) == 3
        assert 3 * float(row["step_time_s"]) == pytest.approx(run["phases_ms"]["sample"] / 1000.0, rel=1e-3)
        assert float(row["it_per_s"]) * float(row["step_time_s"]) == pytest.approx(1.0, rel=1e-3)
    assert server.get("/speedlab/runs?limit=1")["files"] == before, "the sampler's own records are deleted"


def test_adapted_scenarios_are_valid_with_another_vae(server):
    info = talk(server.url, lambda client: client.object_info("SpeedLabVAELoader"))
    names = info["SpeedLabVAELoader"]["input"]["required"]["vae_name"][0]
    overrides = Overrides(width=64, height=64, steps=1)
    scenario = adapt(
        SCENARIOS["txt2img-default"], overrides, CHECKPOINT, {"vae": next(n for n in names if n == "taesd")}
    )
    result = talk(server.url, lambda client: client.run(scenario.graph().to_api(), timeout_s=600))
    assert result.images("SpeedLabProfileReport")

"""Accelerate over HTTP, with core's own nodes around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from speedlab_tools import tune
from speedlab_tools.cli.arguments import parse

from .conftest import DEMO_CHECKPOINT

pytestmark = pytest.mark.server


def prompt(accelerated: dict[str, Any] | None) -> dict[str, Any]:
    """Core's nodes around Accelerate, or around the nodes of the preset fast, put there by hand."""
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": DEMO_CHECKPOINT}),
        "2": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    }
    if accelerated is not None:
        nodes["10"] = ("SpeedLabAccelerate", {"model": ["1", 0], **accelerated})
        model, clip, vae = ["10", 0], ["10", 1], ["10", 2]
        nodes["6"] = ("VAEDecode", {"samples": ["5", 0], "vae": vae})
    else:
        keep = dict.fromkeys(("tf32", "cudnn_tf32", "cudnn_benchmark", "fp16_accumulation", "memory_format"), "keep")
        nodes["10"] = ("SpeedLabAttention", {"model": ["1", 0], "backend": "auto"})
        nodes["11"] = (
            "SpeedLabPrecision",
            {"model": ["10", 0], **keep, "autocast": "off", "linear": "auto", "memory": "auto", "convolution": "auto"},
        )
        nodes["12"] = (
            "SpeedLabDeepCache",
            {
                "model": ["11", 0],
                "cache_interval": 3,
                "cache_branch_id": 0,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "schedule": "uniform",
                "features": "extrapolate",
            },
        )
        nodes["13"] = ("SpeedLabDynamicCFG", {"model": ["12", 0], "mode": "fixed", "stop_at": 0.75, "similarity": 0.99})
        nodes["14"] = (
            "SpeedLabMemoryPlan",
            {"model": ["13", 0], "clip": ["1", 1], "offload": "auto", "budget_gb": 0.0},
        )
        model, clip = ["14", 0], ["14", 1]
        nodes["6"] = (
            "SpeedLabTinyVAEDecode",
            {"samples": ["5", 0], "decoder": "taesd", "slice_size": 1, "tile_size": 0},
        )
    nodes["3"] = ("CLIPTextEncode", {"clip": clip, "text": "a tree"})
    nodes["4"] = ("CLIPTextEncode", {"clip": clip, "text": ""})
    nodes["5"] = (
        "KSampler",
        {
            "model": model,
            "positive": ["3", 0],
            "negative": ["4", 0],
            "latent_image": ["2", 0],
            "seed": 4,
            "steps": 6,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    )
    nodes["7"] = ("SaveImage", {"images": ["6", 0], "filename_prefix": "accelerate"})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def image_of(server: Any, entry: dict[str, Any]) -> bytes:
    assert entry["status"]["status_str"] == "success", entry["status"]
    return Image.open(server.output / entry["outputs"]["7"]["images"][0]["filename"]).tobytes()


def error_of(entry: dict[str, Any]) -> str:
    assert entry["status"]["status_str"] == "error"
    return json.dumps(entry["status"]["messages"])


BOTH = {"clip": ["1", 1], "vae": ["1", 2]}


def test_the_image_is_that_of_the_nodes_by_hand(server: Any) -> None:
    entry = server.run(prompt({"preset": "fast", "compile": False, "custom": "", **BOTH}))
    assert image_of(server, entry) == image_of(server, server.run(prompt(None)))
    (text,) = entry["outputs"]["10"]["text"]
    assert text.endswith("+deepcache(3,features=extrapolate)+dynamic_cfg(0.75)+memory_plan(auto)+tiny")


def test_tuned_is_an_error_until_there_is_a_plan_for_this_size(server: Any) -> None:
    tuned = {"preset": "tuned", **BOTH}
    assert "run Tune" in error_of(server.run(prompt(tuned)))
    device = server.get("/system_stats")["devices"][0]["name"]
    folder = server.output / "speedlab" / "tuned"
    folder.mkdir(parents=True, exist_ok=True)
    told = error_of(server.run(prompt(tuned)))
    name = told.split("no tuned plan for SD 1.x on ")[1].split(" with ")[0]
    assert name, device
    wanted = {"device": name, "family": "SD 1.x", "width": 64, "height": 64, "batch": 1, "sampler": "euler",
              "scheduler": "normal"}  # fmt: skip
    plan = {"tuned_for": wanted, "plan": "deepcache(2)", "schema": 1}
    (folder / "one.json").write_text(json.dumps(plan))
    entry = server.run(prompt(tuned))
    assert image_of(server, entry)
    assert entry["outputs"]["10"]["text"][0].startswith("deepcache(2)\nTuned for 64x64")
    # The plan hangs on what samples behind the node, which is none of its inputs.
    wider = prompt(tuned)
    wider["2"]["inputs"]["width"] = 128
    assert "width 128" in error_of(server.run(wider))
    assert image_of(server, server.run(prompt(tuned)))
    (folder / "one.json").write_text(json.dumps({**plan, "tuned_for": {**wanted, "width": 512}}))
    assert "There are plans for 512x64" in error_of(server.run(prompt(tuned)))


def test_a_bad_line_is_told_and_the_server_goes_on(server: Any) -> None:
    bad = {"preset": "custom", "custom": "deepcach(3)", **BOTH}
    assert "Did you mean deepcache" in error_of(server.run(prompt(bad)))
    assert image_of(server, server.run(prompt({"preset": "exact", **BOTH})))


@pytest.mark.full
def test_the_command_tunes_and_copies_its_page(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, prompts = tmp_path / "new" / "page.html", tmp_path / "prompts.txt"
    prompts.write_text("a tree\na house\n")
    given = {
        "server": server.url, "checkpoint": DEMO_CHECKPOINT, "prompts": prompts, "quality": "any", "minutes": 0.3,
        "width": 64, "height": 64, "steps": 4, "html": page, "out": tmp_path / "out",
    }  # fmt: skip
    args, _ = parse("tune", [text for name, value in given.items() for text in (f"--{name}", str(value))])
    code = tune.run(args)
    said = capsys.readouterr().out
    # Whether so little time is enough for a plan is the machine's matter.
    assert code == ("plan: none" in said) and "| plan | time |" in said
    assert page.read_text().startswith("<!doctype html>") and "SpeedLab Tune: 64x64" in page.read_text()
    asked = json.loads(Path(said.split("page: ")[1].strip()).with_suffix(".json").read_text())
    assert [one["text"] for one in asked["request"]["prompts"]] == ["a tree", "a house"]
    (node,) = (node for node in asked["prompt"].values() if node["class_type"] == "SpeedLabTune")
    assert node["inputs"]["budget_minutes"] == 0.3 and node["inputs"]["positive"] == "a tree\na house"


@pytest.mark.full
def test_tune_finds_a_plan_that_tuned_then_is(server: Any) -> None:
    asked = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": DEMO_CHECKPOINT}},
        "2": {"class_type": "SpeedLabTune", "inputs": {
            "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "positive": "a tree", "negative": "", "width": 64,
            "height": 128, "batch": 1, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
            "seed": "1", "quality": "any", "budget_minutes": 3.0, "budget_gb": 0.0,
            "candidates": "deepcache(2)", "steps_axis": "", "samplers_axis": ""}},
    }  # fmt: skip
    entry = server.run(asked)
    assert entry["status"]["status_str"] == "success", entry["status"]
    page, plan = entry["outputs"]["2"]["speedlab_tune"]
    assert page.endswith(".html") and plan
    graph = prompt({"preset": "tuned", **BOTH})
    graph["2"]["inputs"]["height"] = 128
    done = server.run(graph)
    assert image_of(server, done) and done["outputs"]["10"]["text"][0].startswith(f"{plan}\n")
    bad = json.loads(json.dumps(asked))
    bad["2"]["inputs"]["candidates"] = "deepcach(2)"
    assert "Did you mean deepcache" in error_of(server.run(bad))

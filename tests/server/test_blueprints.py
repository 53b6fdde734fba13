"""Subgraph blueprints: ComfyUI lists them, and what is inside runs with what stands on their face."""

from __future__ import annotations

import json

import pytest

from speedlab_tools.host import pack_root
from speedlab_tools.scenarios.blueprints import BLUEPRINTS, INPUTS, OUTPUTS
from speedlab_tools.scenarios.canvas import ui_to_api

pytestmark = pytest.mark.server
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
FACE = {
    "prompt": "a lighthouse", "negative_prompt": "blurry", "width": 64, "height": 128, "seed": 5, "steps": 8,
    "cfg": 3.0, "sampler_name": "euler", "scheduler": "karras", "ckpt_name": "speedlab_demo_sd15.safetensors",
}  # fmt: skip


def queued(file, values):
    """What the canvas queues for a blueprint with these values on its face, and where its outputs come from."""
    (subgraph,) = file["definitions"]["subgraphs"]
    from_face = {link["id"]: link for link in subgraph["links"] if link["origin_id"] == INPUTS}
    links = [[link[key] for key in LINK] for link in subgraph["links"] if link["id"] not in from_face]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    inner = [
        {**node, "inputs": [{**slot, "link": None} if slot["link"] in from_face else slot for slot in node["inputs"]]}
        for node in nodes.values()
    ]
    api = ui_to_api({"nodes": inner, "links": links})
    for link in from_face.values():
        slot = nodes[link["target_id"]]["inputs"][link["target_slot"]]
        api[str(link["target_id"])]["inputs"][slot["name"]] = values[subgraph["inputs"][link["origin_slot"]]["name"]]
    ends = {
        subgraph["outputs"][link["target_slot"]]["name"]: [str(link["origin_id"]), link["origin_slot"]]
        for link in subgraph["links"]
        if link["target_id"] == OUTPUTS
    }
    return api, ends


@pytest.mark.parametrize("name", [blueprint.name for blueprint in BLUEPRINTS])
def test_a_blueprint_is_listed_and_runs_with_what_is_on_its_face(server, name):
    listed = server.get("/global_subgraphs")
    ((number, entry),) = [(key, entry) for key, entry in listed.items() if entry["name"] == name]
    assert entry["source"] == "custom_node" and entry["info"]["node_pack"].endswith("ComfyUI-SpeedLab")
    file = json.loads(server.get(f"/global_subgraphs/{number}")["data"])
    assert file == json.loads((pack_root() / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    (host,), (subgraph,) = file["nodes"], file["definitions"]["subgraphs"]
    assert host["type"] == subgraph["id"] and subgraph["description"]
    assert [slot["name"] for slot in host["inputs"]] == [slot["name"] for slot in subgraph["inputs"]] == list(FACE)

    api, ends = queued(file, FACE)
    api["99"] = {"class_type": "PreviewImage", "inputs": {"images": ends["image"]}}
    done = server.run(api)
    assert done["status"]["status_str"] == "success", done["status"]
    assert len(done["outputs"]["99"]["images"]) == 1
    (sampler,) = [number for number, node in api.items() if node["class_type"] == "SpeedLabProfileSampler"]
    profile = done["outputs"][sampler]["speedlab"][0]
    record = server.record(profile["run_id"])
    asked = record["request"]
    assert [asked[key] for key in ("width", "height", "steps", "cfg", "seed")] == [64, 128, 8, 3.0, 5]
    assert (asked["sampler"], asked["scheduler"]) == ("euler", "karras")
    assert asked["checkpoint"]["name"] == FACE["ckpt_name"]
    assert any(step["cached"] for step in record["steps"]) is (name == "Fast SDXL")
    assert any(step["uncond_rows"] == 0 for step in record["steps"]) is (name == "Fast SDXL")


def test_a_blueprints_model_can_be_fetched():
    for blueprint in BLUEPRINTS:
        file = json.loads((pack_root() / "subgraphs" / f"{blueprint.name}.json").read_text(encoding="utf-8"))
        models = [
            m for node in file["definitions"]["subgraphs"][0]["nodes"] for m in node["properties"].get("models", [])
        ]
        assert [model["name"] for model in models] == [entry.default for entry in blueprint.files]

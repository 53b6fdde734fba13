"""The scenarios of memory plans and of two models: their settings, and how the command line changes them."""

from __future__ import annotations

import argparse

import pytest

from speedlab_tools.bench import models
from speedlab_tools.cli.arguments import parse
from speedlab_tools.client.errors import BenchError
from speedlab_tools.client.graph import split_rows
from speedlab_tools.scenarios.catalog import SCENARIOS
from speedlab_tools.scenarios.overrides import Overrides, adapt

S1_SEEDS = [877866765, 5567822456, 2257899453, 987867834]


def nodes(api: dict, class_type: str) -> list[dict]:
    return [node["inputs"] for node in api.values() if node["class_type"] == class_type]


def api(name: str) -> dict:
    return SCENARIOS[name].graph().to_api()


@pytest.mark.parametrize(("name", "offload", "budget"), [
    ("sdxl-model-offload", "model", 0.0), ("sdxl-sequential-offload", "sequential", 0.0),
    ("sdxl-under-8gb", "auto", 8.0), ("sdxl-under-6gb", "auto", 6.0), ("sdxl-under-4gb", "auto", 4.0),
])  # fmt: skip
def test_a_plan_stands_in_front_of_everything(name, offload, budget):
    graph = api(name)
    (plan,) = nodes(graph, "SpeedLabMemoryPlan")
    assert (plan["offload"], plan["budget_gb"]) == (offload, budget)
    assert graph[plan["model"][0]]["class_type"] == "SpeedLabCheckpointLoader"
    assert graph[plan["latent"][0]]["class_type"] == "EmptyLatentImage"
    assert {graph[text["clip"][0]]["class_type"] for text in nodes(graph, "SpeedLabTextEncode")} == {
        "SpeedLabMemoryPlan"
    }
    assert [sampler["seed"] for sampler in nodes(graph, "SpeedLabProfileSampler")] == S1_SEEDS
    tiny = bool(nodes(graph, "SpeedLabTinyVAEDecode"))
    assert tiny != ("vae" in plan), "a Tiny VAE needs no room for the full one"


@pytest.mark.parametrize("name", ["sdxl-fastest", "sdxl-fastest-deepcache", "sdxl-under-4gb"])
def test_the_fastest_take_30_steps_with_cfg_off_and_a_tiny_vae(name):
    graph = api(name)
    assert {sampler["steps"] for sampler in nodes(graph, "SpeedLabProfileSampler")} == {30}
    assert [guidance["stop_at"] for guidance in nodes(graph, "SpeedLabDynamicCFG")] == [0.75]
    assert len(nodes(graph, "SpeedLabTinyVAEDecode")) == 4
    assert len(nodes(graph, "SpeedLabDeepCache")) == (name != "sdxl-fastest")


def test_the_ensemble_hands_over_at_two_places_with_four_numbers_of_steps():
    graph = api("sdxl-refiner-ensemble")
    samplers = nodes(graph, "SpeedLabEnsembleSampler")
    assert [(sampler["handoff"], sampler["steps"]) for sampler in samplers] == [
        (handoff, steps) for handoff in (0.9, 0.8) for steps in (50, 40, 30, 20)
    ]
    files = {sampler[f"{role}_model"][0]: role for sampler in samplers for role in ("base", "refiner")}
    assert {graph[node]["inputs"]["ckpt_name"]: role for node, role in files.items()} == {
        "sd_xl_base_1.0.safetensors": "base", "sd_xl_refiner_1.0.safetensors": "refiner",
    }  # fmt: skip
    for sampler in samplers:
        encoder = graph[sampler["refiner_positive"][0]]["inputs"]
        assert encoder["clip"][0] == sampler["refiner_model"][0], "the refiner has conditioning of its own"


def test_image_to_image_runs_the_last_3_of_10_and_6_of_20_steps():
    graph = api("sdxl-refiner-img2img")
    samplers = nodes(graph, "SpeedLabProfileSampler")
    base = [sampler for sampler in samplers if sampler["denoise"] == 1.0]
    refiner = [sampler for sampler in samplers if sampler["denoise"] == 0.3]
    assert [sampler["steps"] for sampler in base] == [50, 40, 30, 20] * 2
    assert [sampler["steps"] for sampler in refiner] == [3] * 4 + [6] * 4
    assert all(graph[sampler["latent_image"][0]]["inputs"]["denoise"] == 1.0 for sampler in refiner)


def test_overrides_scale_the_steps_of_each_lane():
    small = adapt(
        SCENARIOS["sdxl-refiner-ensemble"], Overrides(width=256, height=256, steps=5, seed=1), "a", {"refiner": "b"}
    )
    graph = small.graph().to_api()
    samplers = nodes(graph, "SpeedLabEnsembleSampler")
    assert [sampler["steps"] for sampler in samplers] == [5, 4, 3, 2] * 2
    assert {sampler["seed"] for sampler in samplers} == {1}
    assert sorted(loader["ckpt_name"] for loader in nodes(graph, "SpeedLabCheckpointLoader")) == ["a", "b"]
    assert len(split_rows(small.graph())) == len(small.settings.prompts) == 8


def test_a_refiner_goes_to_the_scenarios_that_need_one():
    plain = adapt(SCENARIOS["sdxl-fastest"], Overrides(), None, {"refiner": "refiner.safetensors"})
    assert plain.file("refiner") is None
    assert plain == SCENARIOS["sdxl-fastest"]


def arguments(*more: str) -> argparse.Namespace:
    return parse("bench", ["sdxl-refiner-ensemble", *more])[0]


def test_a_demo_refiner_is_written_where_none_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "demo_checkpoint", lambda family: tmp_path / f"demo_{family}.safetensors")
    monkeypatch.setattr(models, "model_folders", list)
    monkeypatch.setattr(models.drawn, "is_there", lambda family: False)
    choice = models.choose_models(arguments(), [SCENARIOS["sdxl-refiner-ensemble"]])
    assert choice.others == {"refiner": "demo_refiner.safetensors"}
    assert tmp_path / "demo_refiner.safetensors" in choice.files["checkpoints"]
    assert any("--refiner" in note for note in choice.notes)
    assert models.choose_models(arguments(), [SCENARIOS["sdxl-model-offload"]]).others == {}


def test_a_refiner_that_is_no_file_is_named_with_its_option(tmp_path):
    with pytest.raises(BenchError, match="--refiner: there is no file"):
        models.choose_models(arguments("--refiner", str(tmp_path / "no.safetensors")), [SCENARIOS["sdxl-fastest"]])
    with pytest.raises(BenchError, match="with --server it is a name"):
        models.choose_models(
            arguments("--refiner", "./a.safetensors", "--server", "http://127.0.0.1:1"), [SCENARIOS["sdxl-fastest"]]
        )

"""The scenario table and the workflow files made from it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from speedlab_tools.client.errors import BenchError
from speedlab_tools.client.events import SAMPLERS
from speedlab_tools.client.graph import GROUPS, is_link, signature
from speedlab_tools.scenarios import workflows
from speedlab_tools.scenarios.canvas import NOTE_TYPE, Box, ui_to_api
from speedlab_tools.scenarios.catalog import SCENARIOS, TEMPLATES, UnknownScenarioError, find
from speedlab_tools.scenarios.scenario import FAMILIES, SOURCES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
WITH_FILE = {name: scenario for name, scenario in SCENARIOS.items() if not scenario.variant_of}
every_workflow = pytest.mark.parametrize("scenario", WITH_FILE.values(), ids=WITH_FILE.keys())
VARIANTS = {name: scenario for name, scenario in SCENARIOS.items() if scenario.variant_of}


def shape(scenario) -> str:
    """Nodes and links of a graph: where two have the same, they lie on the canvas alike."""
    api = scenario.graph().to_api()
    return repr([(n["class_type"], [v for v in n["inputs"].values() if is_link(v)]) for n in api.values()])


SHAPES = {shape(scenario): scenario for scenario in WITH_FILE.values()}
every_shape = pytest.mark.parametrize("scenario", SHAPES.values(), ids=[one.id for one in SHAPES.values()])


def committed(scenario) -> tuple[dict, dict]:
    """Both committed files of a scenario."""
    ui = json.loads((ROOT / workflows.ui_path(scenario.id)).read_text(encoding="utf-8"))
    return ui, json.loads((FOLDER / "api" / f"{scenario.id}.json").read_text(encoding="utf-8"))


def test_committed_files_are_what_the_builder_makes():
    assert workflows.differences(ROOT) == []


def test_differences_name_missing_stale_and_foreign_files(tmp_path):
    workflows.write(tmp_path)
    assert workflows.differences(tmp_path) == []
    template = f"workflows/{TEMPLATES['profile-nvtx']}.json"
    (tmp_path / template).unlink()
    (tmp_path / "workflows/api/sdxl-tiny-vae.json").write_text("{}")
    (tmp_path / "workflows/api/gone.json").write_text("{}")
    (tmp_path / "subgraphs/Fast SDXL.json").write_text("{}")
    assert workflows.differences(tmp_path) == [
        "workflows/api/gone.json: nothing makes it",
        "subgraphs/Fast SDXL.json: out of date",
        f"{template}: missing",
        "workflows/api/sdxl-tiny-vae.json: out of date",
    ]


def test_templates_are_titled_by_what_somebody_wants_and_stand_together():
    names = list(TEMPLATES.values())
    wishes = [name.partition(" - ")[0] for name in names]
    assert 8 <= len(names) <= 12 and len(set(names)) == len(names)
    assert len(set(wishes)) <= 6, "groups of a wish each, which a list in alphabetical order keeps together"
    assert all(re.fullmatch(r"[A-Z][A-Za-z ,]+ - [\w ,]+", name) for name in names), "names of files everywhere"
    assert not TEMPLATES.keys() - WITH_FILE.keys()


@pytest.mark.parametrize("name", TEMPLATES.values())
def test_a_template_has_its_image(name):
    """ComfyUI's template browser shows `<name>.jpg` beside `<name>.json`."""
    with Image.open(FOLDER / f"{name}.jpg") as image:
        assert image.format == "JPEG" and min(image.size) >= 300
    assert (FOLDER / f"{name}.jpg").stat().st_size < 120_000


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_variant_is_the_shared_workflow_with_one_value_set(variant):
    base = SCENARIOS[variant.variant_of]
    assert not base.variant_of
    ui, api = committed(variant)
    change = workflows.difference(variant)
    made = ui_to_api(ui)
    for node in made.values():
        if node["_meta"]["title"] in change.titles:
            node["inputs"][change.name] = change.value
    assert [node["inputs"] for node in made.values()] == [node["inputs"] for node in api.values()]
    (note,) = [node for node in ui["nodes"] if node["type"] == NOTE_TYPE]
    text = note["widgets_values"][0]
    assert f"set `{change.name}` of {', '.join(change.titles)} to `{change.value}`" in text
    assert f"run.py bench {variant.id}" in text
    assert all(f"{entry.figure} ({entry.device})" in text for entry in variant.published)


def test_what_differs_by_more_than_one_setting_is_no_variant():
    from dataclasses import replace

    with pytest.raises(BenchError, match="sdxl-torch-compile differs from sdxl-onediff by 2 settings"):
        workflows.difference(replace(SCENARIOS["sdxl-torch-compile"], variant_of="sdxl-onediff"))


@every_workflow
def test_both_formats_are_the_same_graph(scenario):
    ui, api = committed(scenario)
    told = ui["extra"]["speedlab"]
    for number, node in api.items():
        named = node["_meta"].pop("speedlab", None)
        if node["class_type"] in SAMPLERS:
            plan = told.get("plans", {}).get(number, told["plan"])
            stands_for = told.get("made_of", {}).get(number)
            assert named.pop("made_of", None) == stands_for
            assert (stands_for is None) == (node["class_type"] == "SpeedLabBenchmark")
            assert named == {"scenario": scenario.id, "plan": plan}
        else:
            assert named is None
    assert ui_to_api(ui) == api


def test_a_node_shows_its_advanced_inputs_where_a_workflow_sets_one():
    shown = {}
    for scenario in WITH_FILE.values():
        ui, api = committed(scenario)
        for node in ui["nodes"]:
            if node["type"] == NOTE_TYPE:
                continue
            entries = signature(node["type"]).widgets
            values = api[str(node["id"])]["inputs"]
            is_set = any(e.advanced and values.get(e.name, e.default) != e.default for e in entries)
            assert node.get("showAdvanced", False) is is_set, (scenario.id, node["title"])
            shown.setdefault(node["type"], set()).add(is_set)
    assert shown["SpeedLabCompileModel"] == shown["SpeedLabVAEDecode"] == {True, False}


@every_shape
def test_links_are_consistent(scenario):
    ui, _ = committed(scenario)
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert len(nodes) == len(ui["nodes"])
    assert ui["last_node_id"] == max(nodes)
    assert ui["last_link_id"] == len(ui["links"])
    assert len({link[0] for link in ui["links"]}) == len(ui["links"])
    for number, origin, out_slot, target, in_slot, kind in ui["links"]:
        output = nodes[origin]["outputs"][out_slot]
        assert number in output["links"]
        assert output["slot_index"] == out_slot
        assert nodes[target]["inputs"][in_slot]["link"] == number
        assert output["type"] == kind
    linked = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    assert sorted(linked) == sorted(link[0] for link in ui["links"])


@every_shape
def test_no_two_nodes_overlap_and_groups_hold_their_nodes(scenario):
    ui, _ = committed(scenario)
    boxes = {node["id"]: Box(*node["pos"], *node["size"]).with_title() for node in ui["nodes"]}
    pairs = [(a, b) for a in boxes for b in boxes if a < b and boxes[a].overlaps(boxes[b])]
    assert pairs == []
    groups = [Box(*group["bounding"]) for group in ui["groups"]]
    used = {node.group for node in scenario.graph().nodes}
    assert [group["title"] for group in ui["groups"]] == [name for name in GROUPS if name in used]
    for node in ui["nodes"]:
        box = boxes[node["id"]]
        around = [
            g for g in groups if g.x <= box.x and g.y <= box.y and box.right <= g.right and box.bottom <= g.bottom
        ]
        assert len(around) == (0 if node["type"] == NOTE_TYPE else 1)
    assert not any(a.overlaps(b) for i, a in enumerate(groups) for b in groups[i + 1 :])


@every_shape
def test_links_run_from_left_to_right(scenario):
    ui, _ = committed(scenario)
    boxes = {node["id"]: Box(*node["pos"], *node["size"]) for node in ui["nodes"]}
    assert all(boxes[link[1]].right < boxes[link[3]].x for link in ui["links"])


@every_shape
def test_no_link_passes_behind_a_node(scenario):
    """By reroutes, or straight to a neighbour: the lines between their points cross no node."""
    ui, _ = committed(scenario)
    nodes = {node["id"]: node for node in ui["nodes"]}
    boxes = {node["id"]: Box(*node["pos"], *node["size"]).with_title() for node in ui["nodes"]}
    reroutes = {reroute["id"]: reroute for reroute in ui["extra"].get("reroutes", [])}
    last = {entry["id"]: entry["parentId"] for entry in ui["extra"].get("linkExtensions", [])}
    seen: dict[int, set[int]] = {number: set() for number in reroutes}
    for number, origin, out_slot, target, in_slot, _ in ui["links"]:
        points = [[nodes[target]["pos"][0], nodes[target]["pos"][1] + 14 + 20 * in_slot]]
        way = last.get(number)
        while way is not None:
            seen[way].add(number)
            points.insert(0, reroutes[way]["pos"])
            way = reroutes[way].get("parentId")
        points.insert(0, [boxes[origin].right, nodes[origin]["pos"][1] + 14 + 20 * out_slot])
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            for part in range(101):
                x, y = x0 + (x1 - x0) * part / 100, y0 + (y1 - y0) * part / 100
                behind = [i for i, box in boxes.items() if box.x < x < box.right and box.y < y < box.bottom]
                assert behind == [], f"link {number} at {x:.0f}, {y:.0f}"
    assert seen == {number: set(reroute["linkIds"]) for number, reroute in reroutes.items()}


@every_workflow
def test_the_note_says_what_files_and_figures(scenario):
    ui, _ = committed(scenario)
    notes = [node for node in ui["nodes"] if node["type"] == NOTE_TYPE]
    assert len(notes) == 1
    text = notes[0]["widgets_values"][0]
    assert scenario.shows in text
    for entry in scenario.files:
        assert f"`{entry.default}` in `ComfyUI/{entry.folder}`" in text
    for entry in scenario.published:
        assert f"{entry.figure} ({entry.device})" in text
    assert f"run.py bench {scenario.id}" in text


@every_workflow
def test_a_node_says_where_its_model_can_be_fetched(scenario):
    """ComfyUI's dialog of missing models offers what it finds in `properties.models` beside a value of that name."""
    ui, _ = committed(scenario)
    known = {entry.default: entry for entry in scenario.files if entry.url}
    offered = set()
    for node in ui["nodes"]:
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == [value for value in node["widgets_values"] if value in known]
        for model in models:
            entry = known[model["name"]]
            assert model == {"name": entry.default, "url": entry.url, "directory": entry.folder.removeprefix("models/")}
            offered.add(entry.default)
    assert offered == set(known), "each file that has an address is offered"


def test_addresses_are_those_of_the_repositories_that_the_notes_name():
    entries = {entry for scenario in SCENARIOS.values() for entry in scenario.files}
    assert {entry.default for entry in entries if entry.url} == {
        "sd_xl_base_1.0.safetensors",
        "sd_xl_refiner_1.0.safetensors",
        "v1-5-pruned-emaonly.safetensors",
        "control_v11p_sd15_canny_fp16.safetensors",
        "sdxl.vae.safetensors",
        "lcm-lora-sdv1-5.safetensors",
        "lcm-lora-sdxl.safetensors",
    }
    for entry in entries:
        if entry.url:
            ((repository, name),) = re.findall(
                r"on Hugging Face as ([\w.-]+/[\w-]+(?:[.]\w+)*)(?:[.] A browser saves it as `([\w.]+)`: rename it)?$",
                entry.where,
            )
            assert entry.url == f"https://huggingface.co/{repository}/resolve/main/{name or entry.default}"


@every_scenario
def test_the_table_row_is_sound(scenario):
    assert scenario.source in SOURCES
    assert scenario.family in FAMILIES
    assert scenario.file("checkpoint") is not None
    extra = ui_extra(scenario)
    plans = extra.pop("plans", {})
    extra.pop("made_of", None)
    assert extra == {"scenario": scenario.id, "plan": scenario.plan.name}
    samplers = [str(node.id) for node in scenario.graph().nodes if node.class_type == "SpeedLabProfileSampler"]
    assert not plans or list(plans) == samplers
    for node in scenario.graph().to_api().values():
        for value in node["inputs"].values():
            assert is_link(value) or isinstance(value, (int, float, str, bool))


def ui_extra(scenario) -> dict:
    return workflows.ui_graph(scenario)["extra"]["speedlab"]


def test_the_default_is_what_its_source_ran():
    settings = SCENARIOS["txt2img-default"].settings
    assert (settings.width, settings.height, settings.steps, settings.cfg, settings.batch) == (512, 512, 20, 8.0, 1)


def test_the_sdxl_scenario_keeps_the_four_prompts_and_seeds():
    scenario = SCENARIOS["sdxl-tiny-vae"]
    settings = scenario.settings
    assert [prompt.seed for prompt in settings.prompts] == [877866765, 5567822456, 2257899453, 987867834]
    assert (settings.width, settings.height, settings.steps, settings.cfg) == (1024, 1024, 50, 5.0)
    api = scenario.graph().to_api()
    negatives = [api[n["inputs"]["negative"][0]] for n in api.values() if "Sampler" in n["class_type"]]
    assert [node["class_type"] for node in negatives] == ["ConditioningZeroOut"] * 4


def test_an_unknown_scenario_lists_close_matches_and_all():
    with pytest.raises(UnknownScenarioError, match=r"Did you mean txt2img-default\?.*sdxl-tiny-vae"):
        find("txt2img-defautl")
    with pytest.raises(UnknownScenarioError) as caught:
        find("zzz")
    assert "Did you mean" not in str(caught.value)


def test_a_staged_batch_frees_between_its_phases():
    scenario = SCENARIOS["sdxl-staged-batch"]
    api = scenario.graph().to_api()
    by_class = {node["class_type"]: (node_id, node["inputs"]) for node_id, node in api.items()}
    _, queue = by_class["SpeedLabPromptQueue"]
    assert queue["prompts"].splitlines() == [prompt.text for prompt in scenario.settings.prompts]
    assert queue["seeds"].splitlines() == [str(prompt.seed) for prompt in scenario.settings.prompts]
    assert queue["negative"] == ""
    sampler_id, sampler = by_class["SpeedLabProfileSampler"]
    freed = {node_id: node["inputs"] for node_id, node in api.items() if node["class_type"] == "SpeedLabFreeMemory"}
    before, after = freed[sampler["positive"][0]], freed[by_class["SpeedLabVAEDecode"][1]["samples"][0]]
    assert (before["what"], after["what"]) == ("text_encoders", "diffusion")
    assert before["wait_for"][0] == by_class["SpeedLabPromptQueue"][0] == sampler["seed"][0]
    assert after["value"] == [sampler_id, 0]


@pytest.mark.parametrize(("batch", "lanes"), [(32, [1, 2, 8, 32]), (2, [1, 2]), (1, [1]), (3, [1, 2, 3])])
def test_slicing_has_a_lane_for_each_batch_up_to_the_one_asked_for(batch, lanes):
    from dataclasses import replace

    scenario = SCENARIOS["sdxl-vae-slicing"]
    graph = scenario.with_settings(replace(scenario.settings, batch=batch)).graph()
    assert [node.inputs["batch_size"] for node in graph.find("EmptyLatentImage")] == lanes
    assert all(node.inputs["slicing"] is True for node in graph.find("SpeedLabVAEDecode"))
    assert graph.rows() == list(range(len(lanes)))


def test_tiling_is_4096_pixels_in_tiles_and_the_fix_is_a_vae_file():
    api = SCENARIOS["sdxl-vae-tiling"].graph().to_api().values()
    sizes = [n["inputs"] for n in api if n["class_type"] == "EmptyLatentImage"]
    assert [(size["width"], size["height"]) for size in sizes] == [(4096, 4096)]
    assert all(n["inputs"]["tile_size"] == 1024 for n in api if n["class_type"] == "SpeedLabVAEDecode")
    fixed = SCENARIOS["sdxl-vae-fp16-fix"].graph().find("SpeedLabVAELoader")
    assert [node.inputs["vae_name"] for node in fixed] == ["sdxl.vae.safetensors"]

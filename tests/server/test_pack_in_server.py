"""The pack in a real server: loads, makes the main job's record, answers bad input with a sentence and goes on."""

from __future__ import annotations

import csv
import json
import time
import urllib.parse
import urllib.request

import pytest

from speedlab_tools.contract import read_contract
from speedlab_tools.host import from_environment
from speedlab_tools.scenarios.catalog import TEMPLATES

pytestmark = pytest.mark.server


def rows(server):
    with (server.output / "speedlab" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def profile_of(entry):
    return entry["outputs"]["7"]["speedlab"][0]


def test_every_node_of_the_host_imports(server):
    """The versions in the lock go together: no node of ComfyUI is lost for a package that does not load."""
    if not from_environment().managed:
        pytest.skip("the packages of a ComfyUI of one's own are not locked")
    log = "\n".join(server.server.tail(2000))
    assert "Import times" in log, "its list of packs, which marks those that failed"
    assert "IMPORT FAILED" not in log and "Cannot import" not in log


def test_the_pack_is_loaded_with_names_help_and_templates(server):
    info = server.get("/object_info")
    ours = {node_id: node for node_id, node in info.items() if node_id.startswith("SpeedLab")}
    assert ours.keys() >= read_contract().keys()
    for node_id, node in ours.items():
        assert node["display_name"].endswith(" (SpeedLab)")
        assert node["description"]
        with urllib.request.urlopen(
            f"{server.url}/extensions/ComfyUI-SpeedLab/docs/{node_id}.md", timeout=30
        ) as answer:
            assert answer.status == 200
    templates = server.get("/api/workflow_templates")
    assert set(templates["ComfyUI-SpeedLab"]) == set(TEMPLATES.values())
    for name in TEMPLATES.values():
        address = f"/api/workflow_templates/ComfyUI-SpeedLab/{urllib.parse.quote(name)}"
        assert server.get(f"{address}.json")["extra"]["speedlab"]["scenario"] in TEMPLATES
        with urllib.request.urlopen(f"{server.url}{address}.jpg", timeout=30) as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"
    assert not any("IMPORT FAILED" in line and "SpeedLab" in line for line in server.server.tail(500))


# A word that somebody types into the search of nodes, and nodes that it has to find.
FOUND = {
    "fast": {"DeepCache", "DynamicCFG", "Forecast", "Attention", "Precision", "CompileModel"},
    "speed": {"DeepCache", "DynamicCFG", "Forecast", "Attention", "CompileModel", "ProfileSampler"},
    "timer": {"ProfileSampler", "ProfileReport", "Benchmark"},
    "profile": {"ProfileSampler", "ProfileReport"},
    "taesd": {"TinyVAEDecode"},
    "quantize": {"CheckpointLoader"},
    "vram": {"MemoryPlan", "FreeMemory"},
    "lora": {"LoraStack"},
    "fps": {"ProfileSampler", "ProfileReport", "Benchmark"},
}
ADVANCED = {
    "DeepCache": {"start_percent", "end_percent", "schedule", "center", "power"},
    "DynamicCFG": {"start_at", "sigma_low", "sigma_high", "uncond_interval", "uncond_from"},
    "CompileModel": {"dynamic", "on_failure", "freeze_weights", "quantize"},
    "VAEDecode": {"overlap"},
    "ProfileSampler": set(),
}


def test_searching_finds_nodes_and_seldom_used_inputs_are_advanced(server):
    """Newer ComfyUI reads these attributes of a node, and says so of its own nodes; older ignores them."""
    info = server.get("/object_info")
    ours = {node_id.removeprefix("SpeedLab"): node for node_id, node in info.items() if node_id.startswith("SpeedLab")}
    told = {name: set(node.get("search_aliases", ())) for name, node in ours.items()}
    if info["KSampler"].get("search_aliases"):
        assert all(told.values()), "each node is found by more than its name"
        for word, nodes in FOUND.items():
            assert {name for name, aliases in told.items() if word in aliases} >= nodes, word
        for name, core in (("TextEncode", "ConditioningCombine"), ("LoraStack", "LoraLoader")):
            assert ours[name]["essentials_category"] == info[core]["essentials_category"]
        assert {name for name, node in ours.items() if node["has_intermediate_output"]} == {"MemoryPlan"}
    else:
        assert not any(told.values())
    for name, inputs in ADVANCED.items():
        specs = {**ours[name]["input"]["required"], **ours[name]["input"].get("optional", {})}
        assert {key for key, spec in specs.items() if spec[1].get("advanced")} == inputs, name


def test_the_main_job_leaves_a_whole_record_and_one_row(server, graph):
    prompt = graph(text="the first job", seed=77)
    prompt["3"]["inputs"]["text"] = "blurred"  # that of other tests on this server may be in ComfyUI's cache
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    shown = profile_of(entry)
    record = server.record(shown["run_id"])
    phases = record["phases_ms"]
    for name in ("load", "text_encode", "first_eval", "sample", "decode", "total"):
        assert phases[name] == "cached" or phases[name] > 0, name
    counted = ("text_encode", "to_device", "prepare", "sample", "decode", "save")
    assert phases["total"] == pytest.approx(sum(phases[name] for name in counted))
    assert [step["evals"] for step in record["steps"]] == [1, 1]
    assert record["request"]["checkpoint"]["name"] == "speedlab_demo_sd15.safetensors"
    checkpoint = record["request"]["checkpoint"]
    assert len(checkpoint["sampled_sha256"]) == 64 and "blocks" in checkpoint["hashed"]
    assert record["request"]["accelerators"] == ["tiny_vae(taesd)"]
    assert set(record["memory"]) >= {"sample", "decode", "overall"}
    assert record["env"]["comfyui"]
    mine = [row for row in rows(server) if row["run_id"] == shown["run_id"]]
    assert len(mine) == 1
    assert mine[0]["seed"] == "77"
    assert entry["outputs"]["8"]["images"], "core's Save Image saved the passed-on image"
    assert "text to image" in server.texts(entry, "7")


def test_what_comfyui_cached_is_told_as_cached(server, graph):
    server.run(graph(text="cached", seed=1))
    record = server.record(profile_of(server.run(graph(text="cached", seed=2)))["run_id"])
    (row,) = [row for row in rows(server) if row["run_id"] == record["run_id"]]
    assert row["time_s"] == "" and record["phases_ms"]["total"] is None
    assert record["phases_ms"]["load"] == "cached"
    assert record["phases_ms"]["text_encode"] == "cached"
    assert record["phases_ms"]["decode"] > 0


def test_a_measurement_is_never_taken_from_the_cache(server, graph):
    first = profile_of(server.run(graph(seed=5)))["run_id"]
    second = profile_of(server.run(graph(seed=5)))["run_id"]
    assert first != second


def test_core_nodes_make_the_same_latent(server, graph):
    prompt = graph(seed=9, sampler_name="dpmpp_2m", scheduler="karras")
    inputs = {k: v for k, v in prompt["5"]["inputs"].items() if k not in ("detail", "warmup", "repeats", "nvtx")}
    prompt["10"] = {"class_type": "KSampler", "inputs": inputs}
    prompt["11"] = {"class_type": "SpeedLabCompareLatents", "inputs": {"samples_a": ["5", 0], "samples_b": ["10", 0]}}
    entry = server.run(prompt)
    assert "bit for bit equal" in server.texts(entry, "11")


def test_core_loaders_and_decoders_work_with_the_sampler(server, graph):
    prompt = graph(tiny=False)
    prompt["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "speedlab_demo_sd15.safetensors"}}
    prompt["2"]["class_type"] = prompt["3"]["class_type"] = "CLIPTextEncode"
    prompt["6"] = {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}}
    record = server.record(profile_of(server.run(prompt))["run_id"])
    assert record["phases_ms"]["load"] is None
    assert record["phases_ms"]["text_encode"] is None
    assert record["phases_ms"]["decode"] is None
    assert record["request"]["checkpoint"]["name"] == "speedlab_demo_sd15.safetensors"
    assert record["request"]["plan"] == "stock"
    assert record["phases_ms"]["after_sampling"] > 0, "core's decode lies in the span after sampling"
    # The times of core's nodes are estimates, and the record says so; none is missing for that reason alone.
    phases = record["phases_ms"]
    parts = [phases[n] for n in ("core_text_encode", "to_device", "prepare", "sample", "after_sampling", "save")]
    assert min(parts[0], parts[3]) > 0 and phases["total"] == pytest.approx(sum(parts), abs=0.01)
    assert any("core node encoded" in text and "an estimate" in text for text in record["warnings"])
    (row,) = [row for row in rows(server) if row["run_id"] == record["run_id"]]
    assert float(row["time_s"]) == pytest.approx(phases["total"] / 1000, rel=1e-4)


def test_a_core_decoder_counts_for_the_total(server, graph):
    prompt = graph(tiny=False, text="core decodes")
    prompt["6"] = {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}}
    phases = server.record(profile_of(server.run(prompt))["run_id"])["phases_ms"]
    assert phases["decode"] is None
    parts = [phases[n] for n in ("text_encode", "to_device", "prepare", "sample", "after_sampling", "save")]
    assert phases["total"] == pytest.approx(sum(part for part in parts if not isinstance(part, str)), abs=0.01)


def test_two_reports_on_one_profile_are_two_results(server, graph):
    prompt = graph(seed=31)
    prompt["16"] = {
        "class_type": "SpeedLabVAEDecode",
        "inputs": {
            "samples": ["5", 0],
            "vae": ["1", 2],
            "slicing": False,
            "tile_size": 0,
            "overlap": 64,
            "precision": "auto",
        },
    }
    prompt["17"] = {"class_type": "SpeedLabProfileReport", "inputs": {"profile": ["5", 1], "images": ["16", 0]}}
    entry = server.run(prompt)
    records = [server.record(entry["outputs"][node]["speedlab"][0]["run_id"]) for node in ("7", "17")]
    assert {record["request"]["plan"] for record in records} == {"tiny_vae(taesd)", "stock"}
    assert len({record["artifacts"]["images"][0] for record in records}) == 2
    by_id = {row["run_id"]: row for row in rows(server)}
    assert all(by_id[record["run_id"]]["plan"] == record["request"]["plan"] for record in records)


def test_items_of_a_list_have_records_of_their_own(server, graph):
    prompt = graph(batch=2, seed=32)
    prompt["14"] = {"class_type": "RebatchLatents", "inputs": {"latents": ["4", 0], "batch_size": 1}}
    prompt["5"]["inputs"]["latent_image"] = ["14", 0]
    shown = server.run(prompt)["outputs"]["7"]["speedlab"]
    records = [server.record(item["run_id"]) for item in shown]
    assert len(records) == 2
    assert all(len(record["request"]["decode"]) == 1 for record in records)


def test_chained_samplers_count_their_own_decode_only(server, graph):
    prompt = graph(seed=33)
    encode = {"class_type": "VAEEncode", "inputs": {"pixels": ["6", 0], "vae": ["1", 2]}}
    again = {
        "class_type": "SpeedLabProfileSampler",
        "inputs": {**prompt["5"]["inputs"], "latent_image": ["20", 0], "denoise": 0.5},
    }
    prompt |= {"20": encode, "21": again}
    prompt["22"] = {"class_type": "SpeedLabTinyVAEDecode", "inputs": {**prompt["6"]["inputs"], "samples": ["21", 0]}}
    prompt["23"] = {"class_type": "SpeedLabProfileReport", "inputs": {"profile": ["21", 1], "images": ["22", 0]}}
    entry = server.run(prompt)
    second = server.record(entry["outputs"]["23"]["speedlab"][0]["run_id"])
    assert len(second["request"]["decode"]) == 1


def test_repeats_give_a_spread(server, graph):
    record = server.record(profile_of(server.run(graph(repeats=3, warmup=1)))["run_id"])
    assert record["summary"]["repeats"] == 3
    assert len(record["summary"]["runs_ms"]) == 3
    assert record["summary"]["run"]["std"] >= 0


@pytest.mark.parametrize("name", ["cut", "foreign", "pickle"])
def test_broken_model_files_are_named_and_the_server_goes_on(server, graph, name):
    folder = server.models / "checkpoints"
    good = (folder / "speedlab_demo_sd15.safetensors").resolve()
    path = folder / f"{name}.{'ckpt' if name == 'pickle' else 'safetensors'}"
    with good.open("rb") as file:
        content = {"cut": file.read(100_000), "foreign": b"GIF89a" + bytes(99), "pickle": b"cos\nmkdir\n(S'x'\ntR."}[
            name
        ]
    path.write_bytes(content)
    try:
        prompt = graph()
        prompt["1"]["inputs"]["ckpt_name"] = path.name
        message = server.error(server.run(prompt))
        assert path.name in message
        assert "Traceback" not in message
    finally:
        path.unlink()
    assert server.run(graph(seed=3))["status"]["status_str"] == "success"


def test_a_missing_model_is_refused_by_name_when_queued(server, graph):
    prompt = graph()
    prompt["1"]["inputs"]["ckpt_name"] = "missing.safetensors"
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    assert "missing.safetensors" in json.dumps(answer)


def test_an_uninstalled_decoder_keeps_the_workflow_valid_and_is_an_error_when_run(server, graph):
    prompt = graph()
    prompt["6"]["inputs"]["decoder"] = "taesd3"
    assert "taesd3_decoder.safetensors" in server.error(server.run(prompt))


@pytest.mark.parametrize("size", [72, 100])
def test_sizes_that_are_no_multiple_of_64(server, graph, size):
    entry = server.run(graph(size=size))
    record = server.record(profile_of(entry)["run_id"])
    assert record["status"] == "ok"
    assert record["request"]["width"] == size // 8 * 8


def test_batch_zero_and_bad_numbers_are_refused_when_queued(server, graph):
    for prompt in (graph(batch=0), graph(steps=0), graph(repeats=0), graph(sampler_name="nonsense")):
        assert server.post("/prompt", {"prompt": prompt})[0] == 400


def test_a_path_in_a_prefix_stays_inside_the_output_folder(server, graph):
    prompt = graph()
    prompt["8"]["inputs"]["filename_prefix"] = "../../outside"
    message = json.dumps(server.run(prompt)["status"])
    assert "outside" in message
    assert not list(server.output.parent.parent.glob("outside*"))


def test_cancel_stops_within_a_step_and_leaves_nothing(server, graph):
    before = len(rows(server)) if (server.output / "speedlab" / "results.csv").exists() else 0
    prompt_id = server.queue(graph(size=256, steps=400, seed=21))
    deadline = time.monotonic() + 120
    while not server.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2.0)
    server.post("/interrupt", {})
    entry = server.wait(prompt_id, 60)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    last = rows(server)[-1]
    assert len(rows(server)) == before + 1
    assert last["status"] == "cancelled"
    assert server.record(last["run_id"])["status"] == "cancelled"
    prompt = graph(seed=9)
    inputs = {k: v for k, v in prompt["5"]["inputs"].items() if k not in ("detail", "warmup", "repeats", "nvtx")}
    prompt["10"] = {"class_type": "KSampler", "inputs": inputs}
    prompt["11"] = {"class_type": "SpeedLabCompareLatents", "inputs": {"samples_a": ["5", 0], "samples_b": ["10", 0]}}
    assert "bit for bit equal" in server.texts(server.run(prompt), "11")


@pytest.mark.full
def test_an_output_folder_that_cannot_be_written_is_named_before_sampling(start_server, graph, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "speedlab").write_text("a file where SpeedLab's folder should be")
    other = start_server(output=output)
    try:
        message = other.error(other.run(graph()))
        assert "cannot write to" in message
        assert str(output / "speedlab") in message
        (output / "speedlab").unlink()
        assert other.run(graph(seed=8))["status"]["status_str"] == "success"
    finally:
        other.server.stop()

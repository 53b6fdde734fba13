"""The numbers of a run agree with each other, and with the clock of the server that ran it."""

from __future__ import annotations

import csv
import itertools

import pytest

pytestmark = pytest.mark.server

STEPS = 8
COUNTED = ("text_encode", "free", "to_device", "prepare", "sample", "decode", "save")
# What ComfyUI itself and the nodes that are in no phase may take: latents, hashes, events, history.
OVERHEAD_S = 0.5
words = itertools.count()


def deepcache(prompt):
    prompt["20"] = {"class_type": "SpeedLabDeepCache", "inputs": {
        "model": prompt["5"]["inputs"]["model"], "cache_interval": 4, "cache_branch_id": 0, "start_percent": 0.0,
        "end_percent": 1.0, "schedule": "uniform"}}  # fmt: skip
    prompt["5"]["inputs"]["model"] = ["20", 0]


def dynamic_cfg(prompt):
    prompt["21"] = {"class_type": "SpeedLabDynamicCFG", "inputs": {
        "model": prompt["5"]["inputs"]["model"], "mode": "fixed", "stop_at": 0.5, "similarity": 0.99}}  # fmt: skip
    prompt["5"]["inputs"]["model"] = ["21", 0]


def both(prompt):
    deepcache(prompt)
    dynamic_cfg(prompt)


def full_decode(prompt):
    prompt["6"] = {"class_type": "SpeedLabVAEDecode", "inputs": {
        "samples": ["5", 0], "vae": ["1", 2], "slicing": False, "tile_size": 0, "overlap": 64,
        "precision": "auto"}}  # fmt: skip


def heun(prompt):
    prompt["5"]["inputs"]["sampler_name"] = "heun"


def img2img(prompt):
    prompt["5"]["inputs"]["denoise"] = 0.5


def batch_of_3(prompt):
    prompt["4"]["inputs"]["batch_size"] = 3


def batch_of_3_without_cfg(prompt):
    batch_of_3(prompt)
    dynamic_cfg(prompt)


def one_step(prompt):
    prompt["5"]["inputs"]["steps"] = 1


def model_offload(prompt):
    prompt["22"] = {"class_type": "SpeedLabMemoryPlan", "inputs": {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "offload": "model", "budget_gb": 0.0}}  # fmt: skip
    prompt["5"]["inputs"]["model"] = ["22", 0]
    for encode in ("2", "3"):
        prompt[encode]["inputs"]["clip"] = ["22", 1]


def compiled(prompt):
    prompt["23"] = {"class_type": "SpeedLabCompileModel", "inputs": {
        "model": ["1", 0], "backend": "jit_trace", "scope": "auto", "mode": "default", "dynamic": "auto",
        "on_failure": "error"}}  # fmt: skip
    prompt["5"]["inputs"]["model"] = ["23", 0]


def compiled_without_cfg(prompt):
    compiled(prompt)
    dynamic_cfg(prompt)


def repeats(prompt):
    prompt["5"]["inputs"].update(warmup=1, repeats=3)


# What to change, the plan's name, steps, and cond and uncond rows over all steps.
RUNS = {
    "plain": (lambda prompt: None, "tiny_vae(taesd)", STEPS, STEPS, STEPS),
    "full decode": (full_decode, "stock", STEPS, STEPS, STEPS),
    "deepcache": (deepcache, "deepcache(", STEPS, STEPS, STEPS),
    "dynamic cfg": (dynamic_cfg, "dynamic_cfg(", STEPS, STEPS, STEPS // 2),
    "both": (both, "deepcache(", STEPS, STEPS, STEPS // 2),
    "offload": (model_offload, "memory_plan(", STEPS, STEPS, STEPS),
    "compile": (compiled, "compile(", STEPS, STEPS, STEPS),
    "compile and dynamic cfg": (compiled_without_cfg, "compile(", STEPS, STEPS, STEPS // 2),
    "repeats": (repeats, "tiny_vae(taesd)", STEPS, STEPS, STEPS),
    "heun": (heun, "tiny_vae(taesd)", STEPS, 2 * STEPS - 1, 2 * STEPS - 1),
    "batch of 3": (batch_of_3, "tiny_vae(taesd)", STEPS, 3 * STEPS, 3 * STEPS),
    "batch of 3, dynamic cfg": (batch_of_3_without_cfg, "dynamic_cfg(", STEPS, 3 * STEPS, 3 * STEPS // 2),
    "img2img": (img2img, "tiny_vae(taesd)", STEPS, STEPS, STEPS),
    "one step": (one_step, "tiny_vae(taesd)", 1, 1, 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_numbers_agree(server, graph, name):
    change, plan, steps, cond_rows, uncond_rows = RUNS[name]

    def run():
        """One with new texts, so that no phase comes from ComfyUI's cache."""
        prompt = graph(size=192, text=f"a tree {next(words)}", steps=STEPS)
        prompt["3"]["inputs"]["text"] = f"blurred {next(words)}"
        change(prompt)
        return server.run(prompt)

    run()  # loads, and plans
    entry = run()
    assert entry["status"]["status_str"] == "success", entry["status"]
    stamps = {kind: data["timestamp"] for kind, data in entry["status"]["messages"] if "timestamp" in data}
    wall_s = (stamps["execution_success"] - stamps["execution_start"]) / 1000.0
    shown = entry["outputs"]["7"]["speedlab"][0]
    record = server.record(shown["run_id"])
    with (server.output / "speedlab" / "results.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["run_id"] == record["run_id"])
    phases, summary = record["phases_ms"], record["summary"]
    # Rate and step time are the sampling time over the steps, on every surface.
    assert summary["steps"] == len(record["steps"]) == int(row["steps"]) == steps
    for rate, step_s in ((summary["it_per_s"], summary["step_time_ms"] / 1000.0),
                         (shown["summary"]["it_per_s"], shown["summary"]["step_time_ms"] / 1000.0),
                         (float(row["it_per_s"]), float(row["step_time_s"]))):  # fmt: skip
        assert steps / rate == pytest.approx(phases["sample"] / 1000.0, rel=0.01)
        assert steps * step_s == pytest.approx(phases["sample"] / 1000.0, rel=0.01)
    # The phases add up to the time, and the time is what the server's own clock says less what it does besides.
    total_s = sum(phases[phase] for phase in COUNTED if isinstance(phases.get(phase), (int, float))) / 1000.0
    assert float(row["time_s"]) == pytest.approx(total_s, rel=0.01)
    assert phases["total"] / 1000.0 == pytest.approx(total_s, rel=0.01)
    load_s = phases["load"] / 1000.0 if isinstance(phases["load"], (int, float)) else 0.0
    assert total_s + load_s <= wall_s + 0.005
    if name == "repeats":  # the server's clock has all four runs in it, the time one
        assert 3 * phases["sample"] / 1000.0 < wall_s
        assert summary["repeats"] == int(row["repeats"]) == 3
    else:
        assert total_s + load_s >= 0.97 * wall_s - OVERHEAD_S
    # Work is counted, not estimated; the plan's name is what ran.
    assert sum(step["cond_rows"] for step in record["steps"]) == cond_rows
    assert sum(step["uncond_rows"] for step in record["steps"]) == uncond_rows
    assert row["plan"] == record["request"]["plan"] and plan in row["plan"]


def test_a_text_from_the_cache_leaves_the_time_empty(server, graph):
    """Nobody knows what a repeat would have paid for it; no figure is better than one that is too small."""
    prompt = graph(text=f"twice {next(words)}")
    server.run(prompt)
    prompt["5"]["inputs"]["seed"] = 2
    entry = server.run(prompt)
    record = server.record(entry["outputs"]["7"]["speedlab"][0]["run_id"])
    assert record["phases_ms"]["text_encode"] == "cached" and record["phases_ms"]["total"] is None
    assert record["summary"]["it_per_s"] > 0

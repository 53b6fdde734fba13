"""Benchmark on small real models: rows, order, quality, failures, cancel, and nothing left behind."""

from __future__ import annotations

import csv
import ctypes
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

SETTINGS = {
    "positive": "a tree", "negative": "", "axis_x": "steps", "values_x": "1, 2", "axis_y": "none", "values_y": "",
    "width": 64, "height": 64, "batch": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
    "seed": "7", "warmup": 0, "repeats": 1, "plan": "",
}  # fmt: skip


@pytest.fixture
def bench(node, loaded, output):
    """Run the node; keyword arguments override the settings. Gives outputs, rows of the CSV and records by run id."""

    def run(**changes):
        model, clip, vae = loaded
        settings = {"model": model, "clip": clip, "vae": vae, **SETTINGS, **changes}
        result = node("SpeedLabBenchmark").benchmark(**settings)
        return result["result"], rows_of(output), result["ui"]

    return run


def rows_of(output: Path) -> list[dict[str, str]]:
    path = output / "speedlab" / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def record_of(output: Path, row: dict[str, str]) -> dict:
    return json.loads((output / "speedlab" / "runs" / f"{row['run_id']}.json").read_text())


def test_two_axes_make_a_row_a_cell_with_quality_against_the_baseline(bench, output):
    (table, plot, sheet, csv_path), rows, ui = bench(values_x="*2, 1", axis_y="cfg", values_y="*4, 6", repeats=2)
    assert len(rows) == 4
    assert {(row["steps"], row["cfg"]) for row in rows} == {("2", "4"), ("1", "4"), ("2", "6"), ("1", "6")}
    base = [row for row in rows if not row["psnr"]]
    assert [(row["steps"], row["cfg"]) for row in base] == [("2", "4")]
    others = [row for row in rows if row["psnr"]]
    assert all(0 < float(row["psnr"]) < 100 and -1 <= float(row["ssim"]) < 1 for row in others)
    assert all(row["status"] == "ok" and row["repeats"] == "2" and float(row["time_s"]) > 0 for row in rows)
    assert all(float(row["time_min_s"]) <= float(row["time_s"]) <= float(row["time_max_s"]) for row in rows)
    assert csv_path == str(output / "speedlab" / "results.csv")
    assert table.count("\n| stock |") == 4 and "baseline" in table
    assert plot.shape[-1] == 3 and sheet.shape[1] > 2 * 256 and sheet.shape[2] > 2 * 256
    assert {entry["run_id"] for entry in ui["speedlab"]} == {row["run_id"] for row in rows}
    (face,) = ui["speedlab_sweep"]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert [face["header"], *face["rows"]] == [told[0], *told[2:]], "the browser's table is the Markdown one"
    assert table.endswith("\n".join(f"* {note}" for note in face["notes"]))
    (times, *_), order = face["plot"]["panels"], ("2", "1")
    assert face["plot"]["labels"] == list(order) and [one["label"] for one in times["series"]] == ["cfg 4", "cfg 6"]
    for series, cfg in zip(times["series"], ("4", "6"), strict=True):
        for place, *range_s in series["points"]:
            (row,) = [row for row in rows if (row["steps"], row["cfg"]) == (order[place], cfg)]
            told_s = [float(row[name]) for name in ("time_s", "time_min_s", "time_max_s")]
            assert range_s == pytest.approx(told_s, rel=0.01)
    marks, largest = times["marks"], max(point[3] for series in times["series"] for point in series["points"])
    assert marks[0] == 0 and marks[-2] < largest <= marks[-1] and 2 <= len(marks) <= 7
    page = output / face["page"]["subfolder"] / face["page"]["filename"]
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2 and text.count("<td>stock</td>") == 4 and 'src="http' not in text
    assert (output / face["sheet"]["subfolder"] / face["sheet"]["filename"]).is_file()
    for row in rows:
        record = record_of(output, row)
        assert len(record["summary"]["totals_ms"]) == len(record["summary"]["runs_ms"]) == 2
        phases = record["phases_ms"]
        counted = ("text_encode", "to_device", "prepare", "sample", "decode", "save")
        assert sum(phases[name] or 0.0 for name in counted) == pytest.approx(phases["total"], rel=0.01)
        assert float(row["time_s"]) == pytest.approx(phases["total"] / 1000.0, rel=0.01)
        assert float(row["steps"]) / float(row["it_per_s"]) == pytest.approx(phases["sample"] / 1000.0, rel=0.01)
        assert all((output / name).is_file() for name in record["artifacts"]["images"])
    assert len(list((output / "speedlab" / "runs").glob("*.json"))) == 4


def test_there_is_one_sampling_time_where_repeats_swing_in_other_orders(bench, output, engine, monkeypatch):
    """The repeat with the median total is not the one with the median sampling."""
    runner, real = engine("plans.sweep"), engine("plans.sweep").run_once
    times = iter([(90000.0, 10000.0), (60000.0, 50000.0), (70000.0, 60000.0)])

    def timed(*args):
        sample_ms, decode_ms = next(times)
        return replace(real(*args), sample_ms=sample_ms, decode_ms=decode_ms)

    monkeypatch.setattr(runner, "run_once", timed)
    _, (row,), _ = bench(values_x="4", repeats=3)
    record = engine("measure.record").from_json(json.dumps(record_of(output, row)))
    assert record.phases_ms["sample"] == 60000.0 and float(row["it_per_s"]) == pytest.approx(4 / 60, rel=1e-4)
    text = engine("measure.report").summary_text(record)
    assert "stock: 4 steps in 60.000 s, 0.0667 it/s, a step 15000.0 ms" in text
    assert "3 runs: sampling min 60.000 s, max 90.000 s" in text and "70.000 s" not in text


def test_cells_take_turns(bench, engine, monkeypatch):
    runner = engine("plans.sweep")
    order, real = [], runner.run_once

    def noted(prepared, *args):
        order.append(prepared.settings.steps)
        return real(prepared, *args)

    monkeypatch.setattr(runner, "run_once", noted)
    _, rows, _ = bench(values_x="1, *2, 3", warmup=1, repeats=3)
    # The baseline first, then each in another place every round.
    assert order == [2, 1, 3, 2, 1, 3, 1, 3, 2, 3, 2, 1]
    assert [(row["steps"], row["repeats"]) for row in rows] == [("3", "3"), ("2", "3"), ("1", "3")]
    assert [bool(row["psnr"]) for row in rows] == [True, False, True]


@pytest.mark.full
def test_a_cell_on_a_cpu_tells_what_it_adds_to_the_process(bench, output, node, demo_checkpoint, engine):
    """A gigabyte that the process holds is no cell's; what a large batch takes is its own."""
    if engine("measure.peaks").rss_to_grow_from() is None:
        pytest.skip("this system does not let a process reset its peak")
    held = bytearray(b"x") * 10**9
    vae = node("SpeedLabCheckpointLoader").load(demo_checkpoint.name, "fp32", "contiguous")[2]
    # What loading left behind would be taken again before the process grows.
    ctypes.CDLL(None).malloc_trim(0)
    (table, *_), rows, _ = bench(
        vae=vae, axis_x="batch", values_x="1, 4", width=128, height=128, steps=1, warmup=1, cfg=1.0
    )
    small, large = (record_of(output, row)["memory"]["overall"] for row in rows)
    assert [row["peak_rss_gb"] for row in rows] == ["", ""] and len(held) == 10**9
    assert 0.0 <= small["rss_growth_gb"] < large["rss_growth_gb"] < 1.0
    for row in rows:
        # The process's peak stays with each phase, where it is called so.
        assert record_of(output, row)["memory"]["sample"]["peak_rss_gb"] > 1.0
    assert "RAM growth" in table and f"| {large['rss_growth_gb']:.2f} GB |" in table


def test_the_picture_is_profile_samplers_decoded_by_vae_decode(bench, node, loaded, core, output):
    import numpy
    from PIL import Image

    model, clip, vae = loaded
    _, rows, _ = bench(values_x="2")
    encode, zero = node("SpeedLabTextEncode").encode, node("SpeedLabTextEncode").encode(clip, "")[0]
    latent = core.EmptyLatentImage().generate(64, 64, 1)[0]
    sampled = core.KSampler().sample(model, 7, 2, 4.0, "euler", "normal", encode(clip, "a tree")[0], zero, latent)[0]
    wanted = (vae.decode(sampled["samples"]).clamp(0, 1) * 255).to(dtype=importlib.import_module("torch").uint8)
    file = output / record_of(output, rows[0])["artifacts"]["images"][0]
    assert numpy.array_equal(numpy.asarray(Image.open(file)), wanted[0].numpy())


@pytest.fixture
def schedules(core, monkeypatch):
    """Core's nodes that make sigmas, as ComfyUI registers them when it starts."""
    for module, name in (
        ("align_your_steps", "AlignYourStepsScheduler"), ("gits", "GITSScheduler"), ("custom_sampler", "VPScheduler"),
        ("custom_sampler", "KarrasScheduler"),
    ):  # fmt: skip
        cls = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
        monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, name, cls)


def test_schedules_of_core_are_those_of_their_nodes(bench, loaded, node, core, output, schedules):
    """Align Your Steps as AlignYourStepsScheduler, SamplerCustom and VAE Decode make it."""
    import numpy
    from comfy.samplers import sampler_object
    from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from PIL import Image

    model, clip, vae = loaded
    _, rows, _ = bench(axis_x="sigmas", values_x="ays, gits(coeff=1.1), karras(rho=5), simple, vp", steps=4)
    assert [row["status"] for row in rows] == ["ok"] * 5
    by_schedule = {row["scheduler"]: row for row in rows}
    assert set(by_schedule) == {"ays", "gits(coeff=1.1)", "karras(rho=5)", "simple", "vp"}
    assert all(row["steps"] == "4" and row["plan"] == f"sigmas={name}" for name, row in by_schedule.items())
    sigmas = AlignYourStepsScheduler.execute("SD1", 4, 1.0).result[0]
    steps = record_of(output, by_schedule["ays"])["steps"]
    assert [step["sigma"] for step in steps] == pytest.approx(sigmas[:-1].tolist(), rel=1e-3)
    encode, zero = node("SpeedLabTextEncode").encode, node("SpeedLabTextEncode").encode(clip, "")[0]
    latent = core.EmptyLatentImage().generate(64, 64, 1)[0]
    made = SamplerCustom.execute(
        model, True, 7, 4.0, encode(clip, "a tree")[0], zero, sampler_object("euler"), sigmas, latent
    ).result[0]
    wanted = (vae.decode(made["samples"]).clamp(0, 1) * 255).to(dtype=importlib.import_module("torch").uint8)
    file = output / record_of(output, by_schedule["ays"])["artifacts"]["images"][0]
    assert numpy.array_equal(numpy.asarray(Image.open(file)), wanted[0].numpy())


def test_a_schedule_that_a_cell_cannot_have_is_said(bench, engine, schedules):
    error = engine("common.errors").SpeedLabError
    for changes, words in (
        ({"values_x": "gits", "steps": 1}, "steps in gits"),
        ({"values_x": "gits(9)"}, "out of range"),
        ({"values_x": "ays(SD9)"}, "no choice"),
        ({"values_x": "fastest"}, "no scheduler 'fastest'"),
        ({"values_x": "ays", "axis_y": "scheduler", "values_y": "normal"}, "Both axes set the schedule"),
    ):
        with pytest.raises(error, match=words):
            bench(axis_x="sigmas", **changes)


def test_plans_change_techniques_decoder_and_settings(bench, output, taesd_files, base_dir):
    for file in taesd_files.glob("taesd_decoder*"):
        target = base_dir / "models" / "vae_approx" / file.name
        if not target.exists():
            target.symlink_to(file)
    plans = "base=stock\nfast=attention(sdpa)+deepcache(2)+dynamic_cfg(stop_at=0.5)+tiny+settings(steps=4)\n*same=stock"
    (table, *_), rows, _ = bench(axis_x="plan", values_x=plans)
    by_plan = {row["plan"]: row for row in rows}
    assert by_plan["base"]["psnr"] == "inf" and by_plan["base"]["ssim"] == "1"
    assert by_plan["fast"]["steps"] == "4"
    for word in ("attention", "deepcache(cache_interval=2", "dynamic_cfg", "tiny_vae(taesd)"):
        assert word in by_plan["fast"]["accelerators"]
    steps = record_of(output, by_plan["fast"])["steps"]
    assert [step["cached"] for step in steps] == [False, True, False, True]
    assert [step["uncond_rows"] for step in steps] == [1, 1, 0, 0]
    assert by_plan["base"]["accelerators"] == ""
    assert "| fast |" in table


@pytest.fixture
def cached(loaded, node):
    """The model with DeepCache before Benchmark, and how a record tells that."""
    (model,) = node("SpeedLabDeepCache").apply(loaded[0], 2, 0, 0.0, 1.0, "uniform")
    told = "deepcache(cache_interval=2, cache_branch_id=0, start_percent=0, end_percent=1, schedule=uniform)"
    return model, told


def test_what_the_graph_attached_before_is_in_the_plans_name(bench, cached, output):
    model, told = cached
    (table, *_), rows, ui = bench(model=model, values_x="2, 3")
    assert [(row["plan"], row["accelerators"]) for row in rows] == [(told, told)] * 2
    assert table.count(f"\n| {told} |") == 2 and "stock" not in table
    assert [entry["plan"] for entry in ui["speedlab"]] == [told, told]
    assert "label" not in record_of(output, rows[0])["request"]


def test_a_plan_on_top_of_what_the_graph_attached_names_both(bench, cached):
    model, told = cached
    plans = "stock\nmine=attention(sdpa)\nthree=deepcache(3)\nbroken=compile(stable_fast)"
    _, rows, _ = bench(model=model, axis_x="plan", values_x=plans, axis_y="prompt_tokens", values_y="77", steps=4)
    named = {row["plan"]: row for row in rows}
    # DeepCache attached twice acts once, as the later node says.
    assert set(named) == {
        f"{told}, prompt_tokens=77", f"{told}+mine, prompt_tokens=77", "three, prompt_tokens=77",
        f"{told}+broken, prompt_tokens=77",
    }  # fmt: skip
    assert "cache_interval=3" in named["three, prompt_tokens=77"]["accelerators"]
    broken = named[f"{told}+broken, prompt_tokens=77"]
    assert broken["status"] == "error" and broken["accelerators"] == f"{told}+compile(stable_fast)"


def test_a_compiled_vae_is_a_technique_of_the_cells_that_decoded_with_it(bench, node, loaded, output):
    (compiled,) = node("SpeedLabCompileVAE").apply(loaded[2], "jit_trace", "default")
    told = "compile_vae(backend=jit_trace)"
    _, rows, _ = bench(axis_x="plan", values_x="mine=compile_vae(jit_trace)\nplain=stock", steps=1)
    assert {row["plan"]: row["accelerators"] for row in rows} == {"mine": told, "plain": ""}
    # Without a warm-up the only run compiles: the first image has that, the time from text to image does not.
    for row in rows:
        phases, summary = (record_of(output, row)[name] for name in ("phases_ms", "summary"))
        compiled_ms = phases["compile"] or 0.0
        assert (compiled_ms > 0.0) == (row["plan"] == "mine")
        assert summary["first_run_ms"] == pytest.approx(phases["total"] + compiled_ms, abs=0.01)
    _, rows, _ = bench(vae=compiled, values_x="1", steps=1)
    assert (rows[-1]["plan"], rows[-1]["accelerators"]) == (told, told)


def test_a_technique_that_stepped_aside_is_not_credited(bench, output):
    plans = "cfg=dynamic_cfg(0.5)\nboth=deepcache(2)+dynamic_cfg(0.5)"
    (table, *_), rows, _ = bench(axis_x="plan", values_x=plans, sampler_name="euler_cfg_pp", cfg=1.5, steps=4)
    records = [record_of(output, row) for row in rows]
    assert [record["request"]["label"] for record in records] == ["cfg", "both"]
    assert rows[0]["plan"] == "stock"
    assert rows[1]["plan"] == rows[1]["accelerators"]
    assert rows[1]["plan"].startswith("deepcache(cache_interval=2")
    assert "dynamic_cfg" not in rows[1]["plan"]
    assert all(any("uncond stays on" in text for text in record["warnings"]) for record in records)
    assert "| ok, asked for cfg |" in table
    assert "* plan cfg; plan both: Dynamic CFG: uncond stays on" in table


def test_a_branch_that_was_clamped_is_named_by_what_ran(bench, output):
    _, rows, _ = bench(axis_x="plan", values_x="deepcache(2,cache_branch_id=20)\ndeep=deepcache(2,cache_branch_id=20)")
    assert [row["plan"] for row in rows] == [row["accelerators"] for row in rows]
    assert all("cache_branch_id=20" not in row["plan"] and "deepcache" in row["plan"] for row in rows)
    labels = [record_of(output, row)["request"]["label"] for row in rows]
    assert labels == ["deepcache(2,cache_branch_id=20)", "deep"]


@pytest.mark.full
def test_cells_whose_technique_stepped_aside_keep_what_tells_them_apart(bench, output, loaded, core, monkeypatch):
    """Two lengths of the prompt are no repeats of each other, nor are two hand-overs or two strengths of FreeU."""
    aside = {"plan": "off=dynamic_cfg(0.5)", "sampler_name": "euler_cfg_pp", "cfg": 1.5, "repeats": 1}
    bench(axis_x="prompt_tokens", values_x="8, 77", axis_y="cfg_stop_at", values_y="0.25, 0.5", **aside)
    refiner = {"refiner": loaded[0].clone(), "refiner_clip": loaded[1]}
    bench(axis_x="handoff", values_x="1, 0.5", **refiner, **aside)
    free_lunch = importlib.import_module("comfy_extras.nodes_freelunch")
    monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, "FreeU", free_lunch.FreeU)
    plans = "a=freeu(b1=1.2)+dynamic_cfg(0.5)\nb=freeu(b1=1.4)+dynamic_cfg(0.5)"
    _, rows, _ = bench(axis_x="plan", values_x=plans, **aside)
    assert sorted(row["plan"] for row in rows) == sorted([
        "prompt_tokens=8", "prompt_tokens=77", "prompt_tokens=8", "prompt_tokens=77", "handoff=1", "handoff=0.5",
        "freeu(b1=1.2)", "freeu(b1=1.4)",
    ])  # fmt: skip
    labels = [record_of(output, row)["request"]["label"] for row in rows]
    assert labels[0] == "off, prompt_tokens=8, cfg_stop_at=0.25" and labels[-1] == "b"


def test_what_cannot_run_is_a_row_and_the_rest_goes_on(bench):
    (table, *_), rows, _ = bench(axis_x="compile", values_x="off, stable_fast", values_y="")
    states = {row["plan"]: (row["status"], row["error"]) for row in rows}
    assert states["compile=off"] == ("ok", "")
    status, error = states["compile=stable_fast"]
    assert status == "error" and "not installed" in error
    assert "stable_fast: error" in table


def test_out_of_memory_is_a_row_and_the_largest_batch_is_found(bench, engine, monkeypatch):
    runner = engine("plans.sweep")
    real = runner.run_once

    def small_card(prepared, *args):
        if prepared.settings.batch > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(prepared, *args)

    monkeypatch.setattr(runner, "run_once", small_card)
    (table, _, sheet, _), rows, _ = bench(axis_x="batch", values_x="1, 2, max", steps=1)  # one repeat each
    states = {int(row["batch"]): row["status"] for row in rows}
    assert states == {1: "ok", 2: "ok", 4: "ok", 8: "oom", 6: "oom", 5: "ok"}
    assert "The largest batch that fits is 5" in table and "saturates" not in table
    assert sheet.shape[2] > 6 * 256


@pytest.mark.full
def test_a_search_with_the_mark_on_the_other_axis_ends_with_every_row(bench, engine, monkeypatch):
    """A size that the marked row never came to has nothing to be compared with, and is a row all the same."""
    runner = engine("plans.sweep")
    real = runner.run_once

    def small_card(prepared, *args):
        split = any(t.options.get("") == "split" for t in prepared.settings.techniques)
        if prepared.settings.batch > (3 if split else 2):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(prepared, *args)

    monkeypatch.setattr(runner, "run_once", small_card)
    (table, *_), rows, _ = bench(
        axis_x="batch", values_x="1, max@4", axis_y="attention", values_y="split, *sdpa", steps=1
    )
    states = {(row["plan"], int(row["batch"])): row["status"] for row in rows}
    assert len(states) == len(rows)
    assert states["attention=split", 3] == "ok" and states["attention=sdpa", 3] == "oom"
    assert "split: The largest batch that fits is 3" in table and "sdpa: The largest batch that fits is 2" in table
    told = {(row["plan"], int(row["batch"])): row["psnr"] for row in rows}
    assert told["attention=split", 2] and not told["attention=split", 3]


def test_a_search_over_what_cannot_run_writes_no_row_twice(bench):
    (table, *_), rows, _ = bench(
        axis_x="batch", values_x="1, max@2", axis_y="plan", values_y="a=stock\nb=compile(stable_fast)", steps=1
    )
    assert sorted((row["plan"], row["batch"], row["status"]) for row in rows) == [
        ("a", "1", "ok"), ("a", "2", "ok"), ("b", "1", "error")
    ]  # fmt: skip
    assert "b: The search for the largest batch ended in an error at batch 1." in table


def test_labels_may_look_like_formulas(bench):
    (_, plot, *_), rows, _ = bench(axis_x="plan", values_x="$x_$=stock", steps=1)
    assert [row["plan"] for row in rows] == ["$x_$"] and plot.shape[1] > 64


@pytest.mark.full
def test_weights_of_past_cells_are_let_go(bench, engine, monkeypatch):
    runner = engine("plans.sweep")
    kept: list[int] = []
    real = runner.Sweep._prepare

    def noted(self, cell):
        prepared = real(self, cell)
        kept.append(len({id(known.parts.model.model) for known in self._prepared.values()}))
        return prepared

    monkeypatch.setattr(runner.Sweep, "_prepare", noted)
    _, rows, _ = bench(axis_x="precision", values_x="fp32, bf16, fp16, fp8_e4m3fn", steps=1, repeats=2)
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert max(kept) <= 3  # the model given and two loaded ones


def test_on_a_cpu_the_search_stops_by_prediction(bench, engine, monkeypatch):
    ram = engine("plans.batch_search")
    monkeypatch.setattr(ram, "free_ram_bytes", lambda: 10_000_000_000)
    monkeypatch.setattr(ram, "predicted_bytes", lambda peaks, start, batch: 3_000_000_000 * batch)
    (table, *_), rows, _ = bench(axis_x="batch", values_x="1, max", steps=1)
    assert {int(row["batch"]): row["status"] for row in rows} == {1: "ok", 2: "ok", 4: "oom", 3: "oom"}
    assert all("by prediction" in row["error"] for row in rows if row["status"] == "oom")
    assert "80% of the 10.0 GB" in table


def test_a_cancel_keeps_what_is_done(bench, engine, comfy, output, monkeypatch):
    runner, mm = engine("plans.sweep"), importlib.import_module("comfy.model_management")
    real, calls = runner.run_once, []

    def cancelling(prepared, *args):
        calls.append(prepared.settings.steps)
        if len(calls) == 5:
            mm.interrupt_current_processing()
        return real(prepared, *args)

    monkeypatch.setattr(runner, "run_once", cancelling)
    with pytest.raises(mm.InterruptProcessingException):
        bench(values_x="1, 2, 3", repeats=3)
    rows = rows_of(output)
    assert [(row["steps"], row["repeats"], row["status"]) for row in rows] == [
        ("1", "1", "ok"), ("2", "2", "ok"), ("3", "1", "ok")
    ]  # fmt: skip
    assert all("stopped after" in row["error"] for row in rows)
    monkeypatch.undo()


def test_a_cancel_in_the_first_cell_says_so(node, loaded, output, engine, comfy, monkeypatch):
    runner, mm = engine("plans.sweep"), importlib.import_module("comfy.model_management")
    real = runner.run_once

    def cancelling(*args):
        mm.interrupt_current_processing()
        return real(*args)

    monkeypatch.setattr(runner, "run_once", cancelling)
    model, clip, vae = loaded
    with pytest.raises(mm.InterruptProcessingException):
        node("SpeedLabBenchmark").benchmark(model=model, clip=clip, vae=vae, **SETTINGS)
    assert [row["status"] for row in rows_of(output)] == ["cancelled"]


def test_several_prompts_and_seeds_are_averaged(bench, output):
    _, rows, _ = bench(positive="a tree\na stone", seed="1\n2", values_x="1, 2")
    record = record_of(output, rows[1])
    assert rows[1]["seed"] == "1 2" and record["request"]["prompts"] == 2
    assert len(record["artifacts"]["images"]) == 2
    assert float(rows[1]["psnr"]) > 0


def test_precision_reloads_the_checkpoint_and_keeps_patches(bench, output, loaded, node, demo_checkpoint, engine):
    before = loaded[0]
    vae = node("SpeedLabCheckpointLoader").load(demo_checkpoint.name, "fp32", "contiguous")[2]
    attach = engine("techniques.deepcache.attach").attach_deepcache
    patched = attach(before, engine("techniques.deepcache.attach").DeepCacheConfig(interval=2))
    _, rows, _ = bench(model=patched, vae=vae, axis_x="precision", values_x="*fp32, fp16", values_y="")
    assert [row["precision"] for row in rows] == ["fp32", "fp16 computed in fp32"]
    assert all("deepcache(cache_interval=2" in row["accelerators"] for row in rows)
    assert record_of(output, rows[1])["steps"][1]["cached"]
    assert float(rows[1]["psnr"]) > 20
    assert importlib.import_module("torch").float32 == before.model_dtype()


def test_precision_without_the_loaders_mark_is_an_error_row(bench, tiny):
    _, rows, _ = bench(model=tiny.model, axis_x="precision", values_x="fp32")
    assert rows[0]["status"] == "error" and "Load Checkpoint (SpeedLab)" in rows[0]["error"]


def test_handoff_runs_base_and_refiner_on_one_schedule(bench, loaded, output):
    model, clip, _ = loaded
    _, rows, _ = bench(
        refiner=model.clone(), refiner_clip=clip, axis_x="handoff", values_x="*1, 0.5", steps=4, values_y=""
    )
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    roles = [[step["model"] for step in record_of(output, row)["steps"]] for row in rows]
    assert roles == [["base"] * 4, ["base", "base", "refiner", "refiner"]]
    assert float(rows[1]["psnr"]) > 60, "the refiner is the base here, so handing over changes nothing"


def test_handoff_without_a_refiner_is_an_error_row(bench, loaded):
    for given in ({}, {"refiner": loaded[0]}):
        _, rows, _ = bench(axis_x="handoff", values_x="0.5", **given)
        assert rows[-1]["status"] == "error" and "refiner_clip" in rows[-1]["error"]


def test_prompt_tokens_are_exact(bench, loaded, engine):
    tokens = engine("plans.cell")
    for wanted in (2, 8, 77, 154, 231):
        text = tokens.prompt_of_length(loaded[1], "a lighthouse on a rocky coast at dawn", wanted)
        assert tokens.count_tokens(loaded[1], text) + 2 * -(-wanted // 77) == wanted
    _, rows, _ = bench(axis_x="prompt_tokens", values_x="8, 154", steps=1)
    assert [row["plan"] for row in rows] == ["prompt_tokens=8", "prompt_tokens=154"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis_x": "step"}, "Did you mean steps"),
        ({"values_x": ""}, "no values"),
        ({"values_x": "2, two"}, "'two' is no whole number"),
        ({"values_x": "0"}, "choose 1 to 10000"),
        ({"values_x": "2, 2"}, "more than once"),
        ({"axis_y": "steps", "values_y": "3"}, "Both axes"),
        ({"axis_x": "resolution", "values_x": "65x64"}, "multiples of 8"),
        ({"axis_x": "sampler", "values_x": "eulr"}, "no sampler 'eulr'"),
        ({"axis_x": "cfg_stop_at", "values_x": "1.5"}, "choose 0 to 1"),
        ({"axis_x": "plan", "values_x": "a=warp(9)"}, "no technique 'warp'"),
        ({"axis_x": "plan", "values_x": "a=deepcache(cache_interval=0)"}, "out of range"),
        ({"axis_x": "plan", "values_x": "a=deepcache(speed=3)"}, "no option 'speed'"),
        ({"axis_x": "attention", "values_x": "fastest"}, "no choice"),
        ({"plan": "tiny(decoder"}, "without its partner"),
        ({"seed": "x"}, "no whole number"),
        ({"positive": "a\nb", "seed": "1\n2\n3"}, "2 prompts and 3 seeds"),
    ],
)
def test_bad_settings_are_errors_before_anything_runs(bench, output, engine, changes, words):
    with pytest.raises(engine("common.errors").SpeedLabError, match=words):
        bench(**changes)
    assert rows_of(output) == []


def test_the_model_given_is_untouched(bench, loaded):
    model = loaded[0]
    before = (dict(model.wrappers), dict(model.attachments), dict(model.object_patches), str(model.model_options))
    bench(axis_x="plan", values_x="a=deepcache(2)+attention(sdpa)")
    assert before == (model.wrappers, model.attachments, model.object_patches, str(model.model_options))


def test_a_page_holds_texts_as_texts(engine):
    page = engine("plans.page").html_page("<a1>", ["<a2>"], (["<a3>"], [["<a4>"]]), [], {"<a5>": "<a6>", "none": None})
    assert "<a" not in page and all(f"&lt;a{number}&gt;" in page for number in range(1, 7)) and "none" not in page

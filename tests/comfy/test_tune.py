"""Tune on a small real model: what it finds, keeps and says, and how it ends early."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .test_worker_thread import in_worker

SETTINGS = {
    "positive": "a tree", "negative": "", "width": 64, "height": 64, "batch": 1, "steps": 6, "cfg": 4.0,
    "sampler_name": "euler", "scheduler": "normal", "seed": "7", "quality": "any", "budget_minutes": 5.0,
    "budget_gb": 0.0,
}  # fmt: skip
# Ends before the first plan is measured.
NO_TIME = {"budget_minutes": 1e-4}
LINES = "attention(split)\nfast=attention(split)+deepcache(3)+dynamic_cfg(0.5)"


@pytest.fixture
def tune(node: Any, loaded: Any, output: Path) -> Callable[..., Any]:
    """Run the node; keyword arguments override the settings. Gives its outputs and the figures that it wrote."""

    def run(**changes: Any) -> Any:
        model, clip, vae = loaded
        settings = {"model": model, "clip": clip, "vae": vae, **SETTINGS, "candidates": LINES, **changes}
        plan, table, chart, sheet, page = node("SpeedLabTune").find(**settings)["result"]
        return plan, table, chart, sheet, json.loads(Path(page).with_suffix(".json").read_text()), Path(page)

    return run


def tuned_plans(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (output / "speedlab" / "tuned").glob("*.json")]


def test_it_finds_keeps_and_reports_a_plan_and_writes_its_workflow(
    tune: Any, node: Any, core: Any, loaded: Any, output: Path
) -> None:
    import filelock

    folder = output / "speedlab" / "tuned"
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / "tune.lock"), pytest.raises(Exception, match="Another Tune is running"):
        tune()
    prompt = {
        "8": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
        "9": {"class_type": "SpeedLabTune", "inputs": {"model": ["8", 0], "clip": ["8", 1], "vae": ["8", 2]}},
    }
    plan, table, chart, sheet, figures, page = in_worker(lambda: tune(prompt=prompt, unique_id="9"))
    (kept,) = tuned_plans(output)
    assert kept["plan"] == plan and kept["figures"]["confirmed"] is True and kept["figures"]["synthetic"] is True
    assert kept["tuned_for"]["sampler"] == "euler" and kept["tuned_for"]["width"] == 64
    # What the preset takes is what was found.
    assert in_worker(lambda: node("SpeedLabAccelerate").apply(loaded[0], "tuned"))["result"][3] == plan
    plans = figures["plans"]
    # Of ways that differ by rounding the one predicted fastest is tried.
    assert {one["plan"] for one in plans} & {"attention(split)", "stock"}
    assert [one["recommended"] for one in plans].count(True) == 1
    ran = [one for one in plans if one["measured_s"] is not None]
    assert all(one["predicted_s"] > 0 and one["peak_gb"] > 0 and len(one["looks"]) >= 1 for one in ran)
    best = next(one for one in plans if one["recommended"])
    assert {"2", "3"} <= best["looks"].keys(), "the held-out seeds"
    for text in (plan, "recommended", "random", "calibrated" if figures["request"]["quality"] != "any" else "Tune"):
        assert text in page.read_text(), text
    assert "Recommended: " in table and "a distance is no statement on quality" in table
    assert chart.shape[-1] == 3 and sheet.shape[2] > 4 * 256
    assert not list((output / "speedlab" / "tuned" / "unfinished").glob("*.json"))

    assert figures["prompt"] == prompt, "asks the same again"
    assert figures["request"]["prompts"] == [{"text": "a tree", "negative": "", "seed": 7}]
    # The workflow that it writes runs with the plan.
    graph = json.loads(page.with_name(f"{page.stem}_workflow.json").read_text())
    kinds = {node["class_type"]: (key, node["inputs"]) for key, node in graph.items()}
    loader, accelerate = kinds["CheckpointLoaderSimple"], kinds["SpeedLabAccelerate"]
    assert loader[1] == {"ckpt_name": "x.safetensors"} and accelerate[1]["custom"] == plan
    assert accelerate[1]["model"] == [loader[0], 0] and accelerate[1]["vae"] == [loader[0], 2]
    assert kinds["KSampler"][1]["model"] == [accelerate[0], 0]
    assert kinds["KSampler"][1]["steps"] == kept["settings"].get("steps", 6)
    assert all(node["class_type"] in core.NODE_CLASS_MAPPINGS or node["class_type"].startswith("SpeedLab")
               for node in graph.values())  # fmt: skip
    links = [value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert links and set(links) <= set(graph)


@pytest.mark.full
def test_a_schedule_of_core_s_own_node_is_an_axis_and_is_in_the_workflow(
    tune: Any, core: Any, loaded: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.import_module("comfy_extras.nodes_align_your_steps").AlignYourStepsScheduler
    monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, "AlignYourStepsScheduler", found)
    extra = importlib.import_module("comfy_extras.nodes_custom_sampler")
    for name in ("KSamplerSelect", "SamplerCustom"):
        monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, name, getattr(extra, name))
    *_, figures, page = tune(steps=10, candidates="settings(sigmas=ays,steps=3)", samplers_axis="euler/ays")
    assert "ays" in {one["scheduler"] for one in figures["plans"] if one["measured_s"]}, "the fastest one by far"
    graph = json.loads(page.with_name(f"{page.stem}_workflow.json").read_text())
    # Which plan is the fastest is the machine's matter; the workflow is that of the plan that was found.
    (best,) = (one for one in figures["plans"] if one["recommended"])
    written = "AlignYourStepsScheduler" in {one["class_type"] for one in graph.values()}
    assert written == (best["scheduler"] == "ays")
    settings = engine("plans.axes").CellSettings(steps=6).with_sigmas("ays")
    node = engine("plans.techniques").sigmas_node(settings, loaded[0], core.NODE_CLASS_MAPPINGS)
    assert node == ("AlignYourStepsScheduler", {"model_type": "SD1", "steps": 6, "denoise": 1.0})
    made = engine("plans.tune_report")._sampling(settings, 7, node)
    assert made["sigmas"] == node and made["sampler"][1]["sigmas"] == ["sigmas", 0]
    for kind, inputs in made.values():
        assert set(core.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()["required"]) <= inputs.keys(), kind


@pytest.mark.parametrize("line", [
    "deepcache(3)+dynamic_cfg(0.75)", "deepcache(2,start_percent=0.3)", "forecast(mode=fixed,max_skip=2)",
    "forecast(mode=fixed,max_skip=1)+dynamic_cfg(0.5)", "deepcache(5)+dynamic_cfg(0.9)", "dynamic_cfg(0.5)",
])  # fmt: skip
def test_the_counts_are_those_of_a_run(node: Any, tiny: Any, engine: Any, output: Path, line: str) -> None:
    space, axes = engine("plans.tune_space"), engine("plans.axes")
    model = node("SpeedLabAccelerate").apply(tiny.model, "custom", line)["result"][0]
    record = node("SpeedLabProfileSampler").sample(
        model=model, positive=tiny.cond(1), negative=tiny.cond(2), latent_image=tiny.latent(), seed=1, steps=14,
        cfg=4.0, sampler_name="euler", scheduler="normal", denoise=1.0,
    )["result"][1]  # fmt: skip
    kinds: Counter = Counter()
    for row in engine("measure.summary").rows_of(record.steps):
        forecast = not row.cond_rows and not row.uncond_rows
        kind = "forecast" if forecast else "cached" if row.cached else "full"
        kinds[(kind, forecast or bool(row.uncond_rows))] += 1
    assert kinds == space.counts_of(space.of_line(line, axes.CellSettings(steps=14)))


@pytest.mark.full
def test_a_floor_and_fewer_steps(tune: Any) -> None:
    plan, table, *_, figures, _ = tune(quality="exact")
    assert plan in ("stock", "attention(split)")
    tried = {(one["plan"], one["steps"]): one for one in figures["plans"]}
    fewer = [one for one in figures["plans"] if one["steps"] < 6]
    assert fewer and all(look["latent"] > 1e-3 for one in fewer for look in one["looks"].values())
    assert all(look["latent"] <= 1e-3 for look in tried[(plan, 6)]["looks"].values())
    assert "Floor exact: relative latent error up to 0.001" in table and "calibrated" in table


@pytest.fixture
def breaking(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have something happen before the image of a plan that `when` tells by its settings and number."""

    def install(when: Callable[[Any, int], bool], what: Callable[[], None]) -> None:
        module, made = engine("plans.tune_images"), []
        real = module.run_once

        def run(prepared: Any, *args: Any) -> Any:
            made.append(prepared.settings)
            if when(prepared.settings, len(made)):
                what()
            return real(prepared, *args)

        monkeypatch.setattr(module, "run_once", run)

    return install


@pytest.mark.full
def test_out_of_memory_in_a_candidate_takes_that_one_out(tune: Any, breaking: Any) -> None:
    def oom() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    breaking(lambda settings, _: settings.steps == 6 and "deepcache" in settings.plan, oom)
    plan, *_, figures, _ = tune(quality="exact")
    assert "deepcache" not in plan
    gone = next(one for one in figures["plans"] if "deepcache" in one["plan"])
    assert "out of memory" in gone["why"] and gone["measured_s"] is None


@pytest.mark.full
def test_a_cancel_keeps_what_was_found_and_the_next_call_goes_on(
    tune: Any, node: Any, loaded: Any, breaking: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    folder = output / "speedlab" / "tuned" / "unfinished"

    def ends(_settings: Any, _number: int) -> bool:
        return any(len(json.loads(path.read_text())["looks"]) >= 2 for path in folder.glob("*.json"))

    breaking(ends, lambda: mm.interrupt_current_processing())
    with pytest.raises(mm.InterruptProcessingException):
        tune()
    mm.interrupt_current_processing(False)
    monkeypatch.undo()
    (unfinished,) = folder.glob("*.json")
    looks = json.loads(unfinished.read_text())["looks"]
    assert looks
    (kept,) = tuned_plans(output)
    assert kept["figures"]["confirmed"] is False and kept["figures"]["checkpoint"]
    assert "not confirmed on held-out seeds" in node("SpeedLabAccelerate").apply(loaded[0], "tuned")["ui"]["text"][0]
    assert list((output / "speedlab" / "tunes").glob("*.html"))
    assert "earlier call" not in tune(quality="similar", **NO_TIME)[1], "another question is another tune"
    _, table, *_ = tune()
    assert f"{len(looks)} images were measured by an earlier call that was cut off" in table
    assert tuned_plans(output)[0]["figures"]["confirmed"] is True and not unfinished.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget_gb": 0.001}, "no plan to try: .* more than the budget of 0.001 GB"),
        ({"candidates": "gone(3)"}, "no technique 'gone'"),
        ({"candidates": "deepcache(3"}, "parenthesis"),
        ({"sampler_name": "eulr"}, "no sampler 'eulr'"),
        ({"samplers_axis": "euler/karas"}, "no scheduler 'karas'"),
        ({"candidates": "settings(cfg=1)+tiny"}, "keeps your own cfg"),
        ({"candidates": "settings(sampler=eulr)"}, "no sampler 'eulr'"),
        ({"steps_axis": "30:20"}, "no range of steps"),
        ({"samplers_axis": "euler/normal@20"}, "steps stand in the axis of steps"),
        ({"budget_minutes": 0.0}, "budget_minutes above 0"),
        ({"budget_minutes": float("nan")}, "budget_minutes above 0"),
        ({"clip": None}, "no text encoder"),
        ({"vae": None}, "no VAE"),
    ],
)
def test_bad_input_is_told(tune: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=f"(?s){words}"):
        tune(**changes)


def test_no_time_for_even_one_plan_is_told_and_nothing_is_kept(tune: Any, output: Path, breaking: Any) -> None:
    made: list[int] = []
    breaking(lambda _settings, number: not made.append(number), lambda: None)
    plan, table, *_, figures, page = tune(**NO_TIME)
    assert plan == "" and "There was no time for even one plan: give more minutes" in table
    assert "Your own image took" in table and len(made) == 2, "the image and the step before it, and no parts"
    assert tuned_plans(output) == []
    assert figures["checkpoint"]["name"] and len(figures["checkpoint"]["sampled_sha256"]) == 64
    assert not page.with_name(f"{page.stem}_workflow.json").exists()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_cancel_before_the_first_plan_leaves_nothing_behind(
    tune: Any, breaking: Any, output: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import comfy.model_management as mm

    # The step before the user's own image, that image, a short run that measures parts.
    breaking(lambda _settings, made: made == number, mm.interrupt_current_processing)
    with pytest.raises(mm.InterruptProcessingException):
        tune()
    mm.interrupt_current_processing(False)
    monkeypatch.undo()
    assert tuned_plans(output) == [] and not list((output / "speedlab").glob("tunes/*"))
    assert "no time for even one plan" in tune(**NO_TIME)[1], "the lock is free"


def test_what_is_not_confirmed_leaves_a_confirmed_plan(engine: Any, output: Path) -> None:
    tuned, store = engine("plans.tuned"), engine("measure.store").RunStore(output)
    wanted = tuned.TunedFor("card", "SD 1.x", 64, 64, 1, "euler", "normal")

    def plan(confirmed: bool, torch: str = "2", **figures: Any) -> Any:
        figures = {"confirmed": confirmed, "quality": "close", "checkpoint": "a", "steps": 20, "cfg": 8.0, **figures}
        return tuned.TunedPlan(wanted, "deepcache(3)", {}, {"torch": torch}, figures, 1.0)

    assert tuned.confirmed_before(store, plan(False)) is None
    tuned.keep(store, plan(True))
    assert tuned.confirmed_before(store, plan(False)) == plan(True)
    for other in ({"torch": "3"}, {"quality": "exact"}, {"checkpoint": "b"}, {"steps": 30}, {"asked": "6 GB"},
                  {"checkpoint": None}):  # fmt: skip
        assert tuned.confirmed_before(store, plan(False, **other)) is None
    tuned.keep(store, plan(False))
    assert tuned.confirmed_before(store, plan(False)) is None


def test_a_checkpoint_that_changed_on_disk_is_not_measured_as_the_one_in_memory(
    tune: Any, node: Any, loaded: Any, tmp_path: Path
) -> None:
    model = loaded[0]
    source = model.get_attachment("speedlab.source")
    changed = model.clone()
    file = tmp_path / source.path.name
    file.write_bytes(b"other weights")
    changed.set_attachments("speedlab.source", dataclasses.replace(source, path=file))
    # The same bytes at another time are the same weights.
    touched = model.clone()
    touched.set_attachments("speedlab.source", dataclasses.replace(source, written_ns=1))
    touched.get_attachment("speedlab.source").check_unchanged()
    other = bytearray(source.path.read_bytes())
    other[-1] ^= 1
    (tmp_path / "other").write_bytes(other)
    with pytest.raises(Exception, match="has changed since it was loaded"):
        dataclasses.replace(source, path=tmp_path / "other").check_unchanged()
    for act in (lambda: tune(model=changed),
                lambda: node("SpeedLabAccelerate").apply(changed, "custom", "weights(fp16)")):  # fmt: skip
        with pytest.raises(Exception, match=f"{file.name} has changed since it was loaded"):
            act()
    file.unlink()
    with pytest.raises(Exception, match="cannot be read any more"):
        tune(model=changed)


def test_the_workflow_has_the_negative_of_the_images_that_were_compared(engine: Any) -> None:
    negative = engine("plans.tune_report")._negative
    assert negative("SDXL", " ") == ("ConditioningZeroOut", {"conditioning": ["positive", 0]})
    for family, text in (("SDXL", "blurry"), ("SD 1.x", "")):
        assert negative(family, text) == ("CLIPTextEncode", {"clip": ["plan", 1], "text": text})


def test_another_checkpoint_does_not_go_on_with_the_images_of_this_one(
    tune: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, output: Path
) -> None:
    module = engine("plans.tune")
    keys = []
    real = module.Tune._open
    monkeypatch.setattr(module.Tune, "_open", lambda self: (real(self), keys.append(self.known_key))[0])
    tune(**NO_TIME)
    monkeypatch.setattr(module, "sampled_hash", lambda _path: "of another file")
    tune(**NO_TIME)
    assert keys[0] != keys[1]


@pytest.mark.full
def test_the_whole_space_on_a_small_model(tune: Any) -> None:
    _, table, *_, figures, _ = tune(candidates="", quality="similar", budget_minutes=1.0, steps=12)
    count = int(table.split(" plans were predicted")[0].rsplit(" ", 1)[1])
    assert count >= 200
    assert any(one["recommended"] for one in figures["plans"])

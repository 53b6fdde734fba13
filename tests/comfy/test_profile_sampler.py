"""Profile Sampler against core's KSampler: the same latent bit for bit, exact counts, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .tiny_unet import build

SETTINGS = {"seed": 11, "steps": 4, "cfg": 7.0, "scheduler": "karras"}
DETERMINISTIC_COUNTS = {"euler": (20, 20), "heun": (20, 39), "dpmpp_2m": (20, 20), "dpm_2": (20, 39), "ddim": (20, 20),
                        "lms": (20, 20), "dpmpp_sde": (20, 39), "uni_pc": (20, 20), "lcm": (20, 20)}  # fmt: skip


@pytest.fixture
def sample(node, tiny):
    """Run Profile Sampler on the narrow model; keyword arguments override the settings."""

    def run(model=None, latent=None, positive=None, negative=None, **changes):
        settings = {**SETTINGS, "sampler_name": "euler", "denoise": 1.0, **changes}
        return node("SpeedLabProfileSampler").sample(
            model=model or tiny.model, positive=positive or tiny.cond(1), negative=negative or tiny.cond(2),
            latent_image=latent or tiny.latent(), **settings,
        )["result"]  # fmt: skip

    return run


@pytest.fixture
def reference(core, tiny):
    """The same through core's KSampler."""

    def run(model=None, latent=None, positive=None, negative=None, **changes):
        settings = {**SETTINGS, "sampler_name": "euler", "denoise": 1.0, **changes}
        return core.KSampler().sample(
            model=model or tiny.model, positive=positive or tiny.cond(1), negative=negative or tiny.cond(2),
            latent_image=latent or tiny.latent(), **settings,
        )[0]  # fmt: skip

    return run


def assert_equal(ours, theirs):
    import torch

    assert torch.equal(ours["samples"], theirs["samples"])
    assert torch.isfinite(ours["samples"]).all()


@pytest.mark.full
def test_every_sampler_gives_ksamplers_latent(sample, reference, comfy, tiny):
    import importlib

    samplers = importlib.import_module("comfy.samplers").KSampler.SAMPLERS
    different = []
    for name in samplers:
        ours, theirs = sample(sampler_name=name)[0], reference(sampler_name=name)
        if not bool((ours["samples"] == theirs["samples"]).all()):
            different.append(name)
    assert not different


def test_every_scheduler_gives_ksamplers_latent(sample, reference, comfy):
    import importlib

    for name in importlib.import_module("comfy.samplers").KSampler.SCHEDULERS:
        assert_equal(sample(scheduler=name)[0], reference(scheduler=name))


@pytest.mark.parametrize("denoise", [0.05, 0.3, 0.75, 1.0])
def test_partial_denoise(sample, reference, tiny, denoise):
    import torch

    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    assert_equal(sample(latent=latent, denoise=denoise)[0], reference(latent=latent, denoise=denoise))


def test_denoise_zero_returns_the_latent_and_a_record_without_steps(sample, tiny):
    latent = tiny.latent()
    out, record, summary, _ = sample(latent=latent, denoise=0.0)
    assert bool((out["samples"] == latent["samples"]).all())
    assert record.status == "ok"
    assert list(record.steps) == []
    assert summary


def test_batches_and_batch_index(sample, reference, tiny):
    assert_equal(sample(latent=tiny.latent(3))[0], reference(latent=tiny.latent(3)))
    picked = {**tiny.latent(2), "batch_index": [4, 1]}
    ours = sample(latent=picked)[0]
    assert_equal(ours, reference(latent=picked))
    assert ours["batch_index"] == [4, 1]


def test_masks(sample, reference, tiny):
    import torch

    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1.0
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)), "noise_mask": mask}
    ours = sample(latent=latent)[0]
    assert_equal(ours, reference(latent=latent))
    assert torch.equal(ours["noise_mask"], mask)


def test_previews_do_not_change_the_latent(sample, reference, comfy):
    import importlib

    cli = importlib.import_module("comfy.cli_args")
    before = cli.args.preview_method
    cli.args.preview_method = cli.LatentPreviewMethod.Latent2RGB
    try:
        assert_equal(sample()[0], reference())
    finally:
        cli.args.preview_method = before


def test_odd_sizes_and_regional_prompts(sample, reference, tiny):
    assert_equal(sample(latent=tiny.latent(1, 9, 15))[0], reference(latent=tiny.latent(1, 9, 15)))
    left, right = tiny.cond(1), tiny.cond(5)
    regional = [[left[0][0], {**left[0][1], "area": (8, 4, 0, 0), "strength": 1.0}],
                [right[0][0], {**right[0][1], "area": (8, 4, 0, 4), "strength": 1.0}]]  # fmt: skip
    seen = []
    counted = tiny.model.clone()

    def count(executor, *args, **kwargs):
        seen.extend(kwargs.get("transformer_options", args[5])["cond_or_uncond"])
        return executor(*args, **kwargs)

    counted.add_wrapper_with_key("apply_model", "count", count)
    ours, record = sample(positive=regional)[:2]
    assert_equal(ours, reference(model=counted, positive=regional))
    assert [step["cond_rows"] for step in record.steps] == [2] * 4, "one row a region"
    assert sum(step["uncond_rows"] for step in record.steps) == seen.count(1)


def region(cond, width, x):
    return [cond[0][0], {**cond[0][1], "area": (8, width, 0, x), "strength": 1.0}]


def masked(cond):
    import torch

    return [cond[0][0], {**cond[0][1], "mask": torch.ones(1, 8, 8), "mask_strength": 0.5}]


# Batch, positive conds a latent, and the rows of cond and uncond a step; areas of a cond need an uncond each.
CONDS = {
    "batch": (3, lambda cond: cond(1), 3, 3),
    "two conds": (3, lambda cond: [*cond(1), *cond(5)], 6, 3),
    "a mask": (2, lambda cond: [*cond(1), masked(cond(5))], 4, 2),
    "areas of one size": (3, lambda cond: [region(cond(1), 4, 0), region(cond(5), 4, 4)], 6, 9),
    "areas of two sizes": (2, lambda cond: [region(cond(1), 4, 0), region(cond(5), 6, 2)], 4, 6),
    "two conds, one of them longer": (2, lambda cond: [*cond(1), *cond(5, tokens=12)], 4, 2),
}


@pytest.mark.parametrize("name", CONDS)
def test_rows_are_those_of_the_batches_that_the_model_got(sample, reference, tiny, name):
    batch, positive, cond_rows, uncond_rows = CONDS[name]
    seen = []
    counted = tiny.model.clone()

    def count(executor, x, timestep, context=None, *args, **kwargs):
        seen.append(int(x.shape[0]))
        return executor(x, timestep, context, *args, **kwargs)

    counted.add_wrapper_with_key("diffusion_model", "count", count)
    out, record = sample(model=counted, latent=tiny.latent(batch), positive=positive(tiny.cond))[:2]
    assert [step["cond_rows"] for step in record.steps] == [cond_rows] * 4
    assert [step["uncond_rows"] for step in record.steps] == [uncond_rows] * 4
    assert sum(seen) == 4 * (cond_rows + uncond_rows), "what reached the network itself"
    assert_equal(out, reference(latent=tiny.latent(batch), positive=positive(tiny.cond)))


@pytest.mark.parametrize("name", sorted(DETERMINISTIC_COUNTS))
def test_evaluations_are_counted_exactly(sample, name):
    steps, evals = DETERMINISTIC_COUNTS[name]
    record = sample(sampler_name=name, steps=steps, scheduler="normal", latent=None)[1]
    assert len(record.steps) == steps
    assert sum(step["evals"] for step in record.steps) == evals
    assert sum(step["cond_rows"] for step in record.steps) == evals
    assert sum(step["uncond_rows"] for step in record.steps) == evals
    assert all(step["evals"] for step in record.steps)


def test_cfg_one_evaluates_no_uncond(sample, reference):
    ours, record = sample(cfg=1.0)[:2]
    assert_equal(ours, reference(cfg=1.0))
    assert sum(step["uncond_rows"] for step in record.steps) == 0
    assert sum(step["cond_rows"] for step in record.steps) == 4


def test_steps_add_up_to_the_sampling_time(sample):
    record = sample(steps=10)[1]
    total = sum(step["cpu_ms"] for step in record.steps)
    assert total == pytest.approx(record.phases_ms["sample"], rel=0.02)
    assert all(step["gpu_ms"] is None for step in record.steps), "a CPU has no device time of its own"
    sigmas = [step["sigma"] for step in record.steps]
    assert sigmas == sorted(sigmas, reverse=True)


def cached_and_without_cfg(node, model):
    cached = node("SpeedLabDeepCache").apply(model, 3, 0, 0.0, 1.0, "uniform")[0]
    return node("SpeedLabDynamicCFG").apply(cached, "fixed", 0.75, 0.99)[0]


CHANGES = [
    {},
    {"sampler_name": "heun"},
    {"sampler_name": "dpm_2", "steps": 1},
    {"repeats": 3, "warmup": 1},
    {"denoise": 0.5},
    {"scheduler": "ddim_uniform", "steps": 30},
    {"plan": cached_and_without_cfg, "steps": 12},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes) or "plain")
def test_every_surface_tells_the_sampling_time_over_the_steps(sample, node, tiny, engine, changes):
    plan, settings = changes.get("plan"), {name: value for name, value in changes.items() if name != "plan"}
    source = build("sd15") if plan else tiny
    model = plan(node, source.model) if plan else source.model
    record, summary = sample(model=model, positive=source.cond(1), negative=source.cond(2), **settings)[1:3]
    rows = engine("measure.record").csv_row(record)
    shown = engine("web.browser").browser_summary(record)
    sampling_s, steps = record.phases_ms["sample"] / 1000.0, len(record.steps)
    for rate, step_s, count in (
        (record.summary["it_per_s"], record.summary["step_time_ms"] / 1000.0, record.summary["steps"]),
        (shown["summary"]["it_per_s"], shown["summary"]["step_time_ms"] / 1000.0, len(shown["steps"])),
        (float(rows["it_per_s"]), float(rows["step_time_s"]), int(rows["steps"])),
    ):
        assert count == steps
        assert count / rate == pytest.approx(sampling_s, rel=0.01)
        assert count * step_s == pytest.approx(sampling_s, rel=0.01)
    rate, step_ms = record.summary["it_per_s"], record.summary["step_time_ms"]
    assert f"{steps} steps in {sampling_s:.3f} s, {rate:.2f} it/s, a step {step_ms:.1f} ms" in summary
    kinds = {kind: told["steps"] for kind, told in record.summary["step_kinds"].items()}
    if plan:  # steps 0, 3, 6 and 9 are full, the last of them after guidance stopped
        assert kinds == {"full": 3, "cached": 8, "cfg_off": 1}
        assert "8 cached" in summary and "1 CFG off" in summary
    else:
        assert kinds == {"full": steps}


def test_the_move_to_the_device_is_the_one_after_the_text_and_a_first_one_is_said_so(sample, tiny):
    """Warm-up and repeats find the weights in place; what a prompt pays for them is the first run's."""
    import time

    import torch

    model = tiny.model.clone()
    weight = model.model.diffusion_model.out[2].weight
    model.add_patches({"diffusion_model.out.2.weight": ("diff", (torch.zeros_like(weight),))})
    waited = []

    def move(executor, *args, **kwargs):
        if len(waited) % 3 == 0:
            time.sleep(0.3)
        waited.append(1)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("prepare_sampling", "move", move)
    first = sample(model=model, warmup=1, repeats=2)[1]
    again = sample(model=model, warmup=1, repeats=2)[1]
    assert len(waited) == 6
    for record in (first, again):
        assert record.phases_ms["to_device"] >= 300.0
        assert record.phases_ms["prepare"] < record.phases_ms["to_device"], "the move is in one phase only"
    said = [any("moved its weights" in text for text in record.warnings) for record in (first, again)]
    assert said == [True, False]


def test_repeats_and_warmup(sample, reference):
    out, record, summary, _ = sample(repeats=3, warmup=1)
    assert_equal(out, reference())
    assert record.summary["repeats"] == 3
    assert len(record.summary["runs_ms"]) == 3
    run = record.summary["run"]
    assert run["min"] <= run["p10"] <= run["median"] <= run["p90"] <= run["max"]
    assert record.phases_ms["sample"] == pytest.approx(run["median"])
    assert "3 runs" in summary


def test_the_given_model_is_untouched(sample, tiny):
    before = (dict(tiny.model.wrappers), dict(tiny.model.callbacks), dict(tiny.model.attachments))
    options = json.dumps(sorted(tiny.model.model_options["transformer_options"]))
    latent = tiny.latent()
    sample(latent=latent)
    assert (dict(tiny.model.wrappers), dict(tiny.model.callbacks), dict(tiny.model.attachments)) == before
    assert json.dumps(sorted(tiny.model.model_options["transformer_options"])) == options
    assert set(latent) == {"samples"}


def test_wrappers_of_others_still_run(sample, reference, tiny):
    seen = []
    patched = tiny.model.clone()

    def count(executor, *args, **kwargs):
        seen.append(1)
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("apply_model", "somebody", count)
    assert_equal(sample(model=patched)[0], reference())
    assert len(seen) == 4


def test_the_latent_carries_its_format(sample):
    out, record = sample()[:2]
    assert out["speedlab"]["latent_format"] == "SD15"
    assert out["speedlab"]["run_id"] == record.run_id


def test_the_record_is_written_with_the_contracts_fields(sample, base_dir):
    record = sample()[1]
    path = Path(base_dir) / "output" / "speedlab" / "runs" / f"{record.run_id}.json"
    data = json.loads(path.read_text())
    assert data["schema"] == 2
    assert set(data["phases_ms"]) >= {"load", "text_encode", "first_eval", "sample", "decode", "total"}
    columns = "index sigma gpu_ms cpu_ms evals cond_rows uncond_rows cached model"
    assert set(data["steps"][0]) == set(columns.split())
    (steps_gb,) = data["step_memory"].values()
    assert len(steps_gb) == len(data["steps"]) and min(steps_gb) > 0.05
    assert max(steps_gb) <= data["memory"]["sample"]["peak_rss_gb"] + 1e-4, "the peak of all is that of none less"
    assert data["phases_ms"]["to_device"] >= 0
    assert data["phases_ms"]["prepare"] >= 0
    assert data["request"]["sampler"] == "euler"
    assert data["request"]["seed"] == 11
    assert (data["request"]["width"], data["request"]["height"], data["request"]["batch"]) == (64, 64, 1)
    assert data["memory"]["overall"]["peak_rss_gb"] > 0
    assert data["memory"]["overall"]["peak_allocated_gb"] is None
    assert data["env"]["torch"]
    assert len(data["env_hash"]) == 12
    assert data["status"] == "ok"


def test_an_interrupt_is_recorded_and_leaves_nothing(sample, reference, tiny, comfy, base_dir):
    import importlib

    management = importlib.import_module("comfy.model_management")
    patched = tiny.model.clone()
    calls = []

    def cancel(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise management.InterruptProcessingException
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("apply_model", "cancel", cancel)
    with pytest.raises(management.InterruptProcessingException):
        sample(model=patched)
    rows = (Path(base_dir) / "output" / "speedlab" / "results.csv").read_text().splitlines()
    assert ",cancelled," in rows[-1]
    run_id = rows[-1].split(",")[-2]
    data = json.loads((Path(base_dir) / "output" / "speedlab" / "runs" / f"{run_id}.json").read_text())
    assert data["status"] == "cancelled"
    assert_equal(sample()[0], reference())


def test_out_of_memory_and_errors_are_told_apart(sample, tiny, comfy, base_dir):
    import torch

    for error, status in ((torch.cuda.OutOfMemoryError("CUDA out of memory"), "oom"), (ValueError("odd"), "error")):
        patched = tiny.model.clone()

        def fail(executor, *args, error=error, **kwargs):
            raise error

        patched.add_wrapper_with_key("apply_model", "fail", fail)
        with pytest.raises(type(error)):
            sample(model=patched)
        row = (Path(base_dir) / "output" / "speedlab" / "results.csv").read_text().splitlines()[-1]
        assert f",{status}," in row


def test_a_record_that_cannot_be_made_never_hides_why_the_run_failed(sample, engine, tiny, monkeypatch, caplog):
    """A device that failed may refuse to be asked for times: the run's own error is the one to show."""
    import torch

    runner = engine("sampling.run_record")
    patched = tiny.model.clone()

    def fail(executor, *args, **kwargs):
        raise torch.cuda.OutOfMemoryError("the run's own error")

    def refuse(trace):
        raise RuntimeError("CUDA error: device not ready")

    patched.add_wrapper_with_key("apply_model", "fail", fail)
    monkeypatch.setattr(runner, "first_eval_ms", refuse)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="own error"):
        sample(model=patched)
    assert "could not be recorded" in caplog.text


def test_the_clock_settles_before_a_failed_run_is_read(sample, engine, tiny, monkeypatch):
    """Device events cannot be read before the device has come to them, in a cancelled run too."""
    runner, clocks = engine("sampling.profiled"), engine("measure.clock")
    settled = []

    class Waiting(clocks.HostClock):
        def settle(self):
            settled.append(1)

        def device_ms(self, start, end):
            assert settled, "read before the device was done"
            return clocks.host_ms(start, end)

    monkeypatch.setattr(runner, "clock_for", Waiting)
    patched = tiny.model.clone()

    def fail(executor, *args, **kwargs):
        raise ValueError("stop")

    patched.add_wrapper_with_key("apply_model", "fail", fail)
    with pytest.raises(ValueError, match="stop"):
        sample(model=patched)
    assert settled


def test_a_device_that_nothing_waits_for_is_told(sample, engine, monkeypatch):
    """DirectML's device, which PyTorch knows by name alone."""
    from types import SimpleNamespace

    runner, clocks = engine("sampling.profiled"), engine("measure.clock")
    assert not any("cannot wait" in text for text in sample()[1].warnings)
    monkeypatch.setattr(runner, "clock_for", lambda device: clocks.clock_for(SimpleNamespace(type="privateuseone")))
    record = sample()[1]
    assert sum("cannot wait for the device" in text for text in record.warnings) == 1
    assert [step["gpu_ms"] for step in record.steps] == [None] * 4
    assert clocks.can_synchronize("cuda") and clocks.can_synchronize("mps") and clocks.can_synchronize("cpu")


def test_nvtx_ranges_have_fixed_names_and_close(sample, engine, tiny, monkeypatch):
    nvtx = engine("measure.nvtx")
    calls, depth = [], []

    class Recording:
        def push(self, name, payload=None):
            calls.append((name, payload))
            depth.append(name)

        def pop(self):
            depth.pop()

    monkeypatch.setattr(nvtx, "emitter", lambda enabled=True: Recording() if enabled else nvtx.NullEmitter())
    sample(steps=6, sampler_name="heun")
    names = [name for name, _ in calls]
    assert depth == []
    assert names.count("sl/run") == 1
    assert names.count("sl/sample") == 1
    assert names.count("sl/step") == 6
    assert names.count("sl/eval") == 11
    assert names.count("sl/forward") == 11
    assert set(names) <= set(nvtx.NAMES)
    assert [payload for name, payload in calls if name == "sl/step"] == [0, 1, 2, 3, 4, 5]
    calls.clear()
    sample(nvtx=False)
    assert calls == []


def test_an_unknown_detail_is_named_and_an_empty_batch_refused(sample, tiny, engine):
    errors = engine("common.errors")
    with pytest.raises(errors.SpeedLabError, match="batch_size"):
        sample(latent=tiny.latent(0))
    with pytest.raises(errors.UnavailableError, match="timing, kernels, trace"):
        sample(detail="everything")


def test_results_that_cannot_be_written_are_told_before_sampling(sample, engine, monkeypatch, tmp_path, tiny):
    runner = engine("sampling.profiled")
    (tmp_path / "speedlab").write_text("in the way")
    monkeypatch.setattr(runner, "output_directory", lambda: tmp_path)
    touched = []
    patched = tiny.model.clone()
    patched.add_wrapper_with_key(
        "apply_model", "seen", lambda executor, *a, **k: touched.append(1) or executor(*a, **k)
    )
    with pytest.raises(engine("common.errors").ResultsError, match="cannot write to"):
        sample(model=patched)
    assert not touched

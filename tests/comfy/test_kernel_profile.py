"""Details `kernels` and `trace`: apart from the timed run, exact in their counts, and gone without a trace of state."""

from __future__ import annotations

import gzip
import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from .conftest import NOT_DRAWN
from .tiny_unet import build

SETTINGS = {"seed": 11, "steps": 6, "cfg": 7.0, "scheduler": "normal", "sampler_name": "euler"}


@pytest.fixture(scope="module")
def unet(comfy):
    return build("sd15")


@pytest.fixture
def sample(node, tiny):
    """Profile Sampler with detail kernels on the narrow model; keyword arguments override the settings."""

    def run(model=None, latent=None, cond=None, drawn=False, **changes):
        source = cond or tiny
        settings = {**SETTINGS, "denoise": 1.0, "detail": "kernels", **({} if drawn else NOT_DRAWN), **changes}
        out = node("SpeedLabProfileSampler").sample(
            model=model or tiny.model, positive=source.cond(1), negative=source.cond(2),
            latent_image=latent or tiny.latent(), **settings,
        )  # fmt: skip
        latent, record, summary, chart = out["result"]
        return SimpleNamespace(latent=latent, record=record, summary=summary, chart=chart)

    return run


@pytest.fixture
def reference(core, tiny):
    def run(model=None, **changes):
        settings = {**SETTINGS, "denoise": 1.0, **changes}
        latent = settings.pop("latent", None) or tiny.latent()
        return core.KSampler().sample(
            model=model or tiny.model, positive=tiny.cond(1), negative=tiny.cond(2), latent_image=latent, **settings
        )[0]["samples"]

    return run


@pytest.fixture
def evaluations(engine):
    """A model that counts its evaluations from outside of everything, and the list of counts."""

    def counted(model):
        seen = []
        clone = model.clone()

        def count(executor, *args, **kwargs):
            seen.append(1)
            return executor(*args, **kwargs)

        clone.add_wrapper_with_key("predict_noise", "count", count)
        return clone, seen

    return counted


def read(base_dir, record):
    return json.loads((Path(base_dir) / "output" / "speedlab" / "runs" / f"{record.run_id}.json").read_text())


def test_the_table_is_whole_and_readable(sample, base_dir):
    result = sample()
    data = read(base_dir, result.record)
    assert data["schema"] == 2
    assert set(data["kernels"][0]) == {"name", "family", "calls", "ms", "share", "reading"}
    assert sum(row["share"] for row in data["kernels"]) == pytest.approx(100.0, abs=1e-3)
    profile = data["kernel_profile"]
    assert sum(family["share"] for family in profile["families"]) == pytest.approx(100.0, abs=1e-3)
    assert profile["unit"] == "operators"
    assert profile["steps"] == [1, 2, 3]
    assert profile["evaluations"] == 3
    assert profile["device"] is None and profile["runtime"] == []
    assert profile["compile"] is None
    assert profile["total_ms"] <= profile["wall_ms"]
    assert profile["total_ms"] + profile["between_ms"] == pytest.approx(profile["wall_ms"], rel=0.02)
    families = {family["family"] for family in profile["families"]}
    assert {"GEMM", "convolution", "attention", "normalisation", "element-wise"} <= families
    convolutions = [row for row in data["kernels"] if row["name"] == "aten::convolution"]
    assert convolutions[0]["calls"] % 3 == 0, "three like evaluations"
    assert "operators of steps 2 to 4: " in result.summary
    assert "a forward" in result.summary
    assert not any(row["name"].startswith("sl/") for row in data["kernels"])


def test_the_latent_and_the_timed_numbers_are_those_of_the_timed_run(sample, reference, evaluations, tiny):
    import torch

    model, seen = evaluations(tiny.model)
    result = sample(model=model, repeats=2, warmup=1)
    assert torch.equal(result.latent["samples"], reference())
    assert len(result.record.summary["runs_ms"]) == 2
    assert len(result.record.steps) == 6
    # Three whole runs, four evaluations up to the last profiled step, and one to count, since all are alike.
    assert len(seen) == 3 * 6 + 4 + 1
    spent = sum(result.record.summary["runs_ms"])
    timed = sum(step["cpu_ms"] for step in result.record.steps)
    assert timed <= spent, "the passes after it are in no step"


def test_the_extra_passes_leave_nothing(sample, reference, tiny):
    import torch

    before = (dict(tiny.model.wrappers), dict(tiny.model.attachments), sorted(tiny.model.model_options))
    options = sorted(tiny.model.model_options["transformer_options"])
    plain = sample(detail="timing")
    state = torch.get_rng_state()
    deep = sample()
    assert torch.equal(torch.get_rng_state(), state), "the random generator is where the timed run left it"
    assert torch.equal(plain.latent["samples"], deep.latent["samples"])
    assert (dict(tiny.model.wrappers), dict(tiny.model.attachments), sorted(tiny.model.model_options)) == before
    assert sorted(tiny.model.model_options["transformer_options"]) == options
    assert not torch.autograd._profiler_enabled()
    assert torch.equal(sample().latent["samples"], reference())


@pytest.mark.parametrize(
    "sampler_name",
    [
        "heun",
        *(pytest.param(name, marks=pytest.mark.full)
          for name in ("dpmpp_sde", "uni_pc", "dpm_adaptive", "lms", "euler_ancestral")),
    ],
)  # fmt: skip
def test_other_samplers(sample, reference, sampler_name):
    import torch

    result = sample(sampler_name=sampler_name)
    profile = result.record.kernel_profile
    assert profile is not None, result.record.warnings
    counts = {step["index"]: step["evals"] for step in result.record.steps}
    assert profile["evaluations"] == sum(counts[index] for index in profile["steps"])
    assert torch.equal(result.latent["samples"], reference(sampler_name=sampler_name))


def test_a_sampler_that_looks_ahead(sample):
    record = sample(sampler_name="heunpp2", steps=8).record
    assert record.kernel_profile["steps"] == [1, 2, 3]
    assert any("evaluations are theirs" in warning for warning in record.warnings)
    own = sum(record.steps[step]["evals"] for step in (1, 2, 3))
    assert own == 8 and record.roofline["flop_per_step"] * 3 == record.roofline["flop_per_forward"] * own


@pytest.mark.parametrize(("steps", "profiled"), [(1, [0]), (2, [1]), (3, [1, 2])])
def test_short_runs(sample, steps, profiled):
    record = sample(steps=steps).record
    assert record.kernel_profile["steps"] == profiled
    assert record.kernels and record.roofline["flop_per_forward"] > 0
    assert any("include the first" in warning for warning in record.warnings) == (0 in profiled)


def test_partial_denoise_batches_and_no_guidance(sample, tiny):
    partial = sample(denoise=0.3, steps=4).record
    assert partial.kernel_profile["steps"] == [1, 2, 3]
    one, two = (sample(latent=tiny.latent(batch)).record.roofline for batch in (1, 2))
    assert two["flop_per_forward"] > 1.9 * one["flop_per_forward"]
    free = sample(cfg=1.0).record
    assert free.roofline["flop_per_forward"] == pytest.approx(one["flop_per_forward"] / 2)
    assert free.roofline["rows_per_forward"] == 1


def test_no_step_means_no_profile_and_says_so(sample):
    result = sample(denoise=0.0)
    assert result.record.status == "ok"
    assert result.record.kernel_profile is None and result.record.kernels == ()
    assert any("nothing to profile" in warning for warning in result.record.warnings)


def test_a_caching_technique_is_profiled_over_a_whole_interval(sample, node, unet):
    model = node("SpeedLabDeepCache").apply(unet.model, 3, 0, 0.0, 1.0, "uniform")[0]
    record = sample(model=model, cond=unet, steps=8).record
    assert record.kernel_profile["steps"] == [3, 4, 5]
    assert record.kernel_profile["cached_steps"] == 2
    full = sample(model=unet.model, cond=unet, steps=8).record
    assert record.roofline["flop_per_forward"] == full.roofline["flop_per_forward"], "of a whole forward"
    assert record.roofline["flop_per_step"] < 0.6 * full.roofline["flop_per_step"]
    assert "2 of them cached" in sample(model=model, cond=unet, steps=8).summary


def test_steps_without_guidance_are_told(sample, node, tiny):
    model = node("SpeedLabDynamicCFG").apply(tiny.model, "fixed", 0.75, 0.99)[0]
    record = sample(model=model, steps=8).record
    assert record.kernel_profile["steps"] == [1, 2, 3]
    assert any("2 of 8 steps ran without" in warning for warning in record.warnings)


def expected_flops(tiny_model, batch, height, width, tokens):
    """What a forward of the narrow UNet computes, by hooks on its layers and from attention's definition."""
    import torch

    network, total, handles = tiny_model.model.diffusion_model, [0], []

    def count(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            total[0] += 2 * output.numel() * module.in_features
        elif isinstance(module, torch.nn.Conv2d):
            weights = module.weight[0].numel()
            total[0] += 2 * output.numel() * weights

    def attention(module, inputs, kwargs, output):
        x = inputs[0]
        context = inputs[1] if len(inputs) > 1 and inputs[1] is not None else kwargs.get("context")
        keys = x.shape[1] if context is None else context.shape[1]
        total[0] += 4 * x.shape[0] * x.shape[1] * keys * module.heads * module.dim_head

    for module in network.modules():
        if type(module).__name__ == "CrossAttention":
            handles.append(module.register_forward_hook(attention, with_kwargs=True))
        elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            handles.append(module.register_forward_hook(count))
    try:
        network(
            torch.zeros(batch, 4, height, width), torch.zeros(batch), context=torch.zeros(batch, tokens, 32),
            transformer_options={},
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return total[0]


@pytest.mark.parametrize(
    "backend",
    [None, "split", *(pytest.param(name, marks=pytest.mark.full) for name in ("sdpa", "sdpa_math", "sub_quadratic"))],
)
def test_operations_are_exact_whatever_computes_attention(sample, node, tiny, backend):
    model = tiny.model if backend is None else node("SpeedLabAttention").apply(tiny.model, backend)[0]
    roofline = sample(model=model, latent=tiny.latent(1, 16, 8)).record.roofline
    assert roofline["flop_per_forward"] == expected_flops(tiny.model, 2, 16, 8, 8)
    assert roofline["flop_per_step"] == roofline["flop_per_forward"], "euler makes one batched forward a step"
    assert roofline["peak"]["name"].startswith("measured: fp32 matrix product")
    assert roofline["peak"]["tflops"] > 0
    share = 100 * roofline["tflops"] / roofline["peak"]["tflops"]
    assert roofline["peak_share"] == (pytest.approx(share) if share <= 100 else None)


def test_peak_and_flags_are_those_of_the_run(sample, node, tiny, engine, monkeypatch):
    """Precision sets its flags while the model samples; read afterwards they are the others again."""
    import torch

    module, environment = engine("measure.roofline"), engine("measure.environment")
    measured, real = [], module._measure

    def measure(device, dtype, *args):
        measured.append((environment.speed_flags(), dtype))
        return real(device, dtype, *args)

    monkeypatch.setattr(module, "_measure", measure)
    monkeypatch.setattr(module, "_peaks", {})
    outside = environment.speed_flags()
    wanted = not outside["tf32_matmul"]
    precision, flags = engine("techniques.precision.attach"), "on" if wanted else "off"
    config = precision.PrecisionConfig(tf32=flags, cudnn_benchmark="on", autocast="bf16")
    changed = sample(model=precision.attach_precision(tiny.model, config)).record
    plain = sample().record
    (seen, dtype), (later, plain_dtype) = measured
    assert changed.env["flags"] == seen and plain.env["flags"] == later == outside == environment.speed_flags()
    assert (seen["tf32_matmul"], seen["cudnn_benchmark"]) == (wanted, True)
    assert (dtype, plain_dtype) == (torch.bfloat16, torch.float32)
    assert changed.roofline["peak"]["name"].startswith("measured: bf16")
    assert changed.env_hash == plain.env_hash, "a technique makes no other environment"
    timed = sample(model=precision.attach_precision(tiny.model, config), detail="timing").record
    assert timed.env["flags"] == seen, "also without a closer look"


def test_a_share_of_a_peak_is_never_above_it(sample, engine, monkeypatch):
    module = engine("measure.roofline")
    monkeypatch.setattr(module, "_measure", lambda *args: module.Peak("measured: a busy machine", 1e-9))
    monkeypatch.setattr(module, "_peaks", {})
    result = sample()
    assert result.record.roofline["tflops"] > 1e-9 and result.record.roofline["peak_share"] is None
    assert any("so no share of it is given" in text for text in result.record.warnings)
    assert "%" not in engine("measure.report")._operations(result.record.roofline)
    old = {**result.record.roofline, "peak_share": 250.0}
    assert "%" not in engine("measure.report")._operations(old)
    assert module.share_of_peak(1.0, 2.0) == 50.0 and module.share_of_peak(1.0, 0.0) is None


def test_cond_and_uncond_apart_are_two_forwards(sample, comfy):
    unet = build("mini")
    together = sample(model=unet.model, cond=unet).record.roofline
    with unet.split():
        apart = sample(model=unet.model, cond=unet).record.roofline
    assert apart["rows_per_forward"] == 1
    assert apart["flop_per_forward"] == pytest.approx(together["flop_per_forward"] / 2)
    assert apart["flop_per_step"] == together["flop_per_step"]


def test_a_compiled_model(sample, engine, tiny):
    import torch

    compiled = engine("patching.compiled")
    torch._dynamo.reset()
    model = tiny.model.clone()
    network = model.model.diffusion_model
    block = network.input_blocks[1][0]

    def broken(x):
        torch._dynamo.graph_break()
        return x * 1.0

    assert not compiled.is_compiled(model)
    block.compile(backend="aot_eager", dynamic=False)
    hook = block.register_forward_pre_hook(lambda module, args: (broken(args[0]), *args[1:]))
    try:
        assert compiled.is_compiled(model)
        first = sample(model=model).record
        again = sample(model=model).record
        wider = sample(model=model, latent=tiny.latent(1, 16, 16)).record
    finally:
        hook.remove()
        block._compiled_call_impl = None
        torch._dynamo.reset()
    assert first.kernel_profile["compile"]["graphs"] > 0
    assert first.kernel_profile["compile"]["graph_breaks"] > 0
    assert again.kernel_profile["compile"] == {"compilations": 0, "graphs": 0, "graph_breaks": 0, "recompiles": 0}
    assert wider.kernel_profile["compile"]["recompiles"] > 0
    assert first.roofline["flop_per_forward"] == sample().record.roofline["flop_per_forward"], "counted in full"


def test_a_trace_is_beside_the_record(sample, base_dir, node):
    import platform

    result = sample(detail="trace", sampler_name="heun")
    name = result.record.artifacts["trace"]
    assert name == f"speedlab/runs/{result.record.run_id}.trace.json.gz"
    path = Path(base_dir) / "output" / name
    trace = json.loads(gzip.decompress(path.read_bytes()))
    steps = result.record.kernel_profile["steps"]
    assert trace["speedlab"] == {"run_id": result.record.run_id, "steps": steps}
    ranges = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert ranges.count("sl/sample") == 1
    assert ranges.count("sl/step") == 3
    assert ranges.count("sl/eval") == ranges.count("sl/forward") == 6, "Heun evaluates twice a step"
    inside = [event for event in trace["traceEvents"] if event.get("name") == "aten::conv2d"]
    (window,) = (event for event in trace["traceEvents"] if event.get("name") == "sl/sample")
    assert inside and all(window["ts"] <= e["ts"] <= window["ts"] + window["dur"] for e in inside)
    assert platform.node() not in json.dumps({k: v for k, v in trace.items() if k != "traceEvents"})
    assert result.record.kernels, "the table comes with it"
    assert not list(path.parent.glob(".*")), "no half file is left"
    report = node("SpeedLabProfileReport").report(result.record)
    assert json.loads(Path(report["result"][3]).read_text())["artifacts"]["trace"] == name
    for words in ("ui.perfetto.dev", "operators of steps 2 to 4", "aten::", "between the operators", "matrix products"):
        assert words in report["result"][1]


def test_a_trace_never_leaves_the_output_folder(sample, engine, monkeypatch, tmp_path, base_dir):
    runner = engine("sampling.profiled")
    outside, output = tmp_path / "outside", tmp_path / "output"
    (output / "speedlab").mkdir(parents=True)
    outside.mkdir()
    (output / "speedlab" / "runs").symlink_to(outside)
    monkeypatch.setattr(runner, "output_directory", lambda: output)
    with pytest.raises(engine("common.errors").ResultsError, match="link"):
        sample(detail="trace")
    assert not list(outside.iterdir())
    store = engine("measure.store").RunStore(output)
    with pytest.raises(engine("common.errors").ResultsError, match="not a run id"):
        store.trace_path("../../x")


@pytest.mark.parametrize("detail", ["kernels", "trace"])
@pytest.mark.parametrize(
    ("variable", "words"),
    [("NSYS_PROFILING_SESSION_ID", "nsys"), ("CUDA_INJECTION64_PATH", "CUDA_INJECTION64_PATH")],
)
def test_another_profiler_is_refused_before_sampling(
    sample, evaluations, tiny, engine, monkeypatch, detail, variable, words
):
    monkeypatch.setenv(variable, "7")
    model, seen = evaluations(tiny.model)
    with pytest.raises(engine("common.errors").UnavailableError, match=words) as caught:
        sample(model=model, detail=detail)
    assert "'timing'" in str(caught.value)
    assert not seen
    assert sample(model=model, detail="timing").record.status == "ok"


def test_a_running_torch_profiler_is_refused(sample, engine):
    import torch

    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(engine("common.errors").UnavailableError, match=r"torch\.profiler is already running"),
    ):
        sample()
    assert sample().record.kernels


def cancelling(tiny, comfy, at):
    """A model that is cancelled in its forward number `at`, counted over all runs and passes."""
    management = importlib.import_module("comfy.model_management")
    model, calls = tiny.model.clone(), []

    def cancel(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise management.InterruptProcessingException
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "cancel", cancel)
    return model, management.InterruptProcessingException


@pytest.mark.parametrize("at", [6 + 1, 6 + 3, 6 + 4 + 1])
def test_a_cancel_in_an_extra_pass_keeps_the_timed_run(sample, reference, tiny, comfy, base_dir, at):
    import torch

    model, interrupt = cancelling(tiny, comfy, at)
    with pytest.raises(interrupt):
        sample(model=model)
    output = Path(base_dir) / "output" / "speedlab"
    row = (output / "results.csv").read_text().splitlines()[-1]
    assert ",cancelled," in row
    data = json.loads((output / "runs" / f"{row.split(',')[-2]}.json").read_text())
    assert data["status"] == "cancelled"
    assert len(data["steps"]) == 6
    assert data["summary"]["step_time_ms"] > 0
    assert not torch.autograd._profiler_enabled()
    again = sample()
    assert again.record.kernels and torch.equal(again.latent["samples"], reference())


def test_a_profiler_that_cannot_stop_never_hides_a_cancel(sample, engine, tiny, comfy, monkeypatch, caplog):
    recorder = engine("measure.profile_window")
    real = recorder.new_profiler

    def stubborn(device):
        profiler = real(device)
        stop = profiler.stop

        def refuse():
            stop()
            raise RuntimeError("cannot stop")

        profiler.stop = refuse
        return profiler

    monkeypatch.setattr(recorder, "new_profiler", stubborn)
    model, interrupt = cancelling(tiny, comfy, 6 + 3)
    with pytest.raises(interrupt):
        sample(model=model)
    assert "cannot stop" in caplog.text
    result = sample()
    assert any("could not be profiled: RuntimeError: cannot stop" in warning for warning in result.record.warnings)


def test_comfyuis_cancel_button_is_heeded_in_the_extra_pass(sample, engine, tiny, comfy, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    extra = engine("measure.kernel_profile")
    real = extra.run_pass

    def pressed(*args, **kwargs):
        management.interrupt_current_processing(True)
        return real(*args, **kwargs)

    monkeypatch.setattr(extra, "run_pass", pressed)
    with pytest.raises(management.InterruptProcessingException):
        sample()


def test_a_failing_profiler_is_told_and_costs_no_picture(sample, reference, engine, monkeypatch, caplog):
    import torch

    recorder = engine("measure.profile_window")

    def refuse(device):
        raise RuntimeError("CUPTI said no")

    monkeypatch.setattr(recorder, "new_profiler", refuse)
    with caplog.at_level(logging.ERROR):
        result = sample()
    assert torch.equal(result.latent["samples"], reference())
    assert result.record.status == "ok"
    assert any("could not be profiled: RuntimeError: CUPTI said no" in w for w in result.record.warnings)
    assert "CUPTI said no" in result.summary and "CUPTI said no" in caplog.text
    assert result.record.kernels == () and result.record.kernel_profile is None
    assert result.record.roofline["flop_per_forward"] > 0, "what can be told is told"


def test_a_model_that_fails_in_the_extra_pass_is_told(sample, tiny):
    import torch

    model, calls = tiny.model.clone(), []

    def fail(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) > 6:
            raise torch.cuda.OutOfMemoryError("no memory for the profiler")
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "fail", fail)
    record = sample(model=model).record
    assert record.status == "ok" and len(record.steps) == 6
    assert sum("no memory for the profiler" in warning for warning in record.warnings) == 2
    assert not torch.autograd._profiler_enabled()


def test_a_trace_that_cannot_be_written_is_told(sample, engine, monkeypatch):
    trace_file = engine("measure.torch_trace")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace_file, "write_atomically", full)
    record = sample(detail="trace").record
    assert record.status == "ok"
    assert "trace" not in record.artifacts
    assert any("No space left" in warning for warning in record.warnings)
    assert record.kernels, "the table does not need the file"


def test_memory_of_the_passes_is_not_the_runs(sample, engine, monkeypatch):
    depth = engine("measure.kernel_profile")
    kept = []
    real = depth.count_flops

    def hungry(*args, **kwargs):
        import numpy

        kept.append(numpy.ones(60_000_000))  # 480 MB, touched
        kept.clear()
        return real(*args, **kwargs)

    sample()  # what the passes keep for good, such as the profiler's own tables
    monkeypatch.setattr(depth, "count_flops", hungry)
    plain = sample(detail="timing").record.memory["overall"]["peak_rss_gb"]
    deep = sample().record.memory["overall"]["peak_rss_gb"]
    assert deep < plain + 0.3
    with engine("measure.peaks").measure_peak("cpu") as reading:
        pass
    assert reading.before.rss < (plain + 0.3) * 1e9, "nor that of what runs next"


def test_the_charts_are_one_batch(sample, node, engine):
    result = sample(drawn=True)
    assert result.chart.shape == (2, 520, 900, 3)
    assert sample(drawn=True, detail="timing").chart.shape == (1, 520, 900, 3)
    report = node("SpeedLabProfileReport").report(result.record)["result"][2]
    assert report.shape == (4, 520, 900, 3)
    assert all(float(picture.std()) > 0.02 for picture in report), "every image shows something"
    charts = engine("measure.charts")
    failed = result.record.changed(status="oom", steps=(), kernels=(), phases_ms={}, memory={})
    assert charts.run_chart(failed, charts.OF_REPORT).shape == (1, 520, 900, 3)
    strange = result.record.changed(kernels=({"name": "a$b$ \\frac{x}", "family": "other", "share": 100.0},))
    assert charts.run_chart(strange).shape[0] == 2


def test_only_the_step_chart_is_drawn_where_nobody_looks(sample, node, base_dir):
    prompt = {"1": {"class_type": "SpeedLabProfileReport", "inputs": {}}}
    out = node("SpeedLabProfileReport").report(sample().record, prompt=prompt, unique_id="1")
    assert out["result"][2].shape[0] == 1
    data = json.loads(Path(out["result"][3]).read_text())
    assert (Path(base_dir) / "output" / data["artifacts"]["chart"]).is_file()

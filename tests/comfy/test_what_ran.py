"""What did not happen as it was asked for stands in the record and in the row, and the plan's name is what ran."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

CACHED = {
    "cache_interval": 3, "cache_branch_id": 0, "start_percent": 0.0, "end_percent": 1.0, "schedule": "uniform",
}  # fmt: skip
FIXED = {"mode": "fixed", "stop_at": 0.5, "similarity": 0.99}


@pytest.fixture
def deepcache(node: Any) -> Callable[..., Any]:
    return lambda model, **options: node("SpeedLabDeepCache").apply(model, **{**CACHED, **options})[0]


@pytest.fixture
def dynamic_cfg(node: Any) -> Callable[..., Any]:
    return lambda model, **options: node("SpeedLabDynamicCFG").apply(model, **{**FIXED, **options})[0]


@pytest.fixture
def record(node: Any, tiny: Any) -> Callable[..., Any]:
    """The record of Profile Sampler with this model."""

    def run(model: Any, *, steps: int = 6, cfg: float = 5.0, sampler: str = "euler", **more: Any) -> Any:
        return node("SpeedLabProfileSampler").sample(
            model, 1, steps, cfg, sampler, "normal", tiny.cond(1), tiny.cond(2), tiny.latent(), **more
        )["result"][1]

    return run


@pytest.fixture
def guided(engine: Any, tiny: Any) -> Callable[..., Any]:
    """The trace of a run on sigmas of one's own, as the samplers for custom sigmas make it."""
    import comfy.samplers

    trace, nvtx, clock = (engine(f"measure.{name}") for name in ("trace", "nvtx", "clock"))

    def run(model: Any, sigmas: Any, sampler: Any = None) -> Any:
        seen = trace.SamplingTrace(clock.clock_for(model.load_device), nvtx.emitter(False))
        guider = comfy.samplers.CFGGuider(trace.traced(model, seen))
        guider.set_conds(tiny.cond(1), tiny.cond(2))
        guider.set_cfg(5.0)
        latent = torch.randn(1, 4, 8, 8)
        sampler = sampler or comfy.samplers.sampler_object("euler")
        guider.sample(latent, latent, sampler, sigmas, disable_pbar=True, seed=0)
        return seen

    return run


@pytest.fixture
def sigmas(tiny: Any) -> Any:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "karras", 12)


def told(record: Any, text: str) -> bool:
    """Whether exactly one warning of the record says so."""
    return sum(text in warning for warning in record.warnings) == 1


def test_a_run_that_fell_back_to_eager_is_not_called_compiled(record, node, tiny):
    """tensorrt needs an NVIDIA GPU, which the tiny model is not on."""
    compiled = node("SpeedLabCompileModel").apply(tiny.model, "tensorrt", "auto", "default", "auto", "eager")[0]
    made = record(compiled, steps=2)
    assert told(made, "The run is uncompiled, as on_failure asks")
    assert made.request["accelerators"] == [] and made.request["plan"] == "stock"
    assert [name.partition("(")[0] for name in made.request["asked"]] == ["compile"]


def test_precision_credits_what_can_act_on_this_device(record, node, tiny):
    keep = dict.fromkeys(("tf32", "cudnn_tf32", "cudnn_benchmark", "fp16_accumulation", "memory_format"), "keep")
    flags = node("SpeedLabPrecision").apply(tiny.model, **{**keep, "autocast": "off", "tf32": "on"})[0]
    made = record(flags, steps=2)
    assert told(made, "Precision: tf32 had no effect on cpu")
    assert made.request["plan"] == "stock" and made.request["asked"] == ["precision(tf32=on)"]
    both = node("SpeedLabPrecision").apply(
        tiny.model, **{**keep, "autocast": "off", "tf32": "on", "memory_format": "channels_last"}
    )[0]
    assert record(both, steps=2).request["plan"] == "precision(memory_format=channels_last)"


def test_attention_that_another_node_overrides_is_not_credited(record, node, tiny):
    from comfy.ldm.modules import attention

    def theirs(_function: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("transformer_options")
        return attention.attention_split(*args, **kwargs)

    model = node("SpeedLabAttention").apply(tiny.model, "sdpa")[0]
    assert record(model, steps=2).request["plan"] == "attention(backend=sdpa)"
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    made = record(model, steps=2)
    assert told(made, "'sdpa' had no effect")
    assert made.request["plan"] == "stock" and made.request["asked"] == ["attention(backend=sdpa)"]


def test_dynamic_cfg_that_steps_aside(record, dynamic_cfg, deepcache, tiny, engine):
    made = record(deepcache(dynamic_cfg(tiny.model)), sampler="euler_cfg_pp", cfg=1.5)
    assert told(made, "uncond stays on in this run, because the sampler (a cfg_pp one)")
    assert [name.partition("(")[0] for name in made.request["accelerators"]] == ["deepcache"]
    assert [name.partition("(")[0] for name in made.request["asked"]] == ["dynamic_cfg", "deepcache"]
    row = engine("measure.record").csv_row(made)
    assert "dynamic_cfg" not in row["plan"] + row["accelerators"]
    assert all(step["uncond_rows"] == step["cond_rows"] for step in made.steps)
    alone = record(dynamic_cfg(tiny.model), sampler="euler_cfg_pp", cfg=1.5)
    assert alone.request["plan"] == "stock"
    assert "uncond stays on" in engine("measure.report").summary_text(alone)


def test_dynamic_cfg_beside_a_late_reader_of_uncond_still_ran(record, dynamic_cfg, tiny):
    """A function that reads uncond in some steps only is left out where there is none, and the record says so."""
    seen = []

    def late(args: dict) -> Any:
        seen.append(args["sigma"])
        return args["denoised"] if len(seen) < 5 else args["denoised"] + 0.0 * args["uncond_denoised"]

    model = dynamic_cfg(tiny.model)
    model.set_model_sampler_post_cfg_function(late)
    made = record(model)
    assert told(made, "acts in the steps with uncond alone")
    assert "asked" not in made.request
    assert made.request["plan"].startswith("dynamic_cfg(")


@pytest.mark.parametrize(
    ("options", "run", "why"),
    [
        ({}, {"cfg": 1.0}, "at CFG 1"),
        ({"stop_at": 0.99}, {"denoise": 0.4}, None),
        ({"mode": "adaptive", "similarity": 1.0 - 1e-7}, {}, "never agreed"),
    ],
)
def test_dynamic_cfg_that_left_out_nothing(record, dynamic_cfg, tiny, options, run, why):
    made = record(dynamic_cfg(tiny.model, **options), **run)
    dropped = any(step["uncond_rows"] == 0 for step in made.steps)
    assert (made.request["plan"] == "stock") is (why is not None)
    assert why is None or told(made, why)
    assert dropped is (why is None or run.get("cfg") == 1.0)


def test_nonuniform_deepcache_that_falls_back(record, deepcache, tiny):
    made = record(deepcache(tiny.model, schedule="nonuniform", power=1.0, center=3))
    assert told(made, "the uniform one is used")
    assert made.request["accelerators"] == record(deepcache(tiny.model)).request["accelerators"]
    assert "schedule=nonuniform" in made.request["asked"][0]
    assert "schedule=uniform" in made.request["plan"]
    assert [step["cached"] for step in made.steps] == [False, True, True] * 2


def test_a_branch_that_is_too_deep(record, deepcache, tiny):
    model = deepcache(tiny.model, cache_branch_id=20)
    for _ in range(2):
        made = record(model)
        assert told(made, "cache_branch_id 20 is too deep for this model; the largest, 3, is used")
        assert "cache_branch_id=3" in made.request["plan"]
        assert made.request["plan"] == "+".join(made.request["accelerators"])
        assert "cache_branch_id=20" in made.request["asked"][0]
    nothing = record(model, steps=1).request
    assert (nothing["plan"], nothing["accelerators"]) == ("stock", [])
    uniform = record(deepcache(tiny.model, cache_branch_id=20, schedule="nonuniform", power=1.0, center=3)).request
    assert uniform["accelerators"] == record(deepcache(tiny.model, cache_branch_id=3)).request["accelerators"]


def test_deepcache_that_cached_nothing(record, deepcache, tiny):
    made = record(deepcache(tiny.model), steps=1)
    assert told(made, "no step of this run was cached")
    assert made.request["plan"] == "stock"
    assert "asked" not in record(deepcache(tiny.model), steps=4).request


def test_a_sampler_without_a_schedule(guided, deepcache, dynamic_cfg, sigmas, tiny):
    import comfy.samplers

    def sample(model, noise, _sigmas, extra_args, callback, **_: Any) -> Any:
        extra_args["model_options"]["transformer_options"].pop("sample_sigmas", None)
        return model(noise, sigmas[:1], **extra_args)

    model = dynamic_cfg(deepcache(tiny.model))
    seen = guided(model, sigmas, comfy.samplers.KSAMPLER(sample))
    assert sum("DeepCache: this sampler gives no schedule" in note for note in seen.notes) == 1
    assert sum("uncond stays on in this run, because this sampler gives no schedule" in n for n in seen.notes) == 1
    assert seen.ran == {"deepcache": None, "dynamic_cfg": None}


def test_a_part_whose_place_is_not_known(guided, deepcache, dynamic_cfg, sigmas, tiny):
    """SplitSigmas, then SetFirstSigma: the latter copies, so nothing lies behind the part any more."""
    from comfy_extras.nodes_custom_sampler import SetFirstSigma, SplitSigmas

    high, low = SplitSigmas.execute(sigmas, 6).args
    changed = SetFirstSigma.execute(low, float(low[0]) * 0.98).args[0]
    model = dynamic_cfg(deepcache(tiny.model, end_percent=0.9))
    for lost in (changed, high.clone()):
        notes = guided(model, lost).notes
        assert sum("a part of a schedule" in note and note.startswith("DeepCache") for note in notes) == 1
        assert sum("a part of a schedule" in note and note.startswith("Dynamic CFG") for note in notes) == 1
    # Where no share of the whole is asked for, or the whole is there, there is nothing to say.
    everywhere = dynamic_cfg(deepcache(tiny.model), mode="adaptive", similarity=-1.0)
    for run in (guided(everywhere, changed), guided(model, high), guided(model, low), guided(model, sigmas.clone())):
        assert not any("a part of a schedule" in note for note in run.notes)


def test_a_padded_buffer_counts_its_schedule_alone(guided, dynamic_cfg, sigmas, tiny):
    import torch

    buffer = torch.cat([sigmas, torch.zeros(20)])
    seen = guided(dynamic_cfg(tiny.model), buffer[: len(sigmas)])
    assert [e.uncond_rows for e in seen.evaluations] == [1] * 6 + [0] * 6
    assert not any("a part of a schedule" in note for note in seen.notes)
    # Here only the part lies in the buffer.
    padded = torch.cat([sigmas[6:], torch.full((20,), -1.0)])
    notes = guided(dynamic_cfg(tiny.model), padded[:7]).notes
    assert any("a part of a schedule" in note for note in notes)


@pytest.mark.parametrize("scheduler", ["normal", "karras", "simple", "sgm_uniform", "ddim_uniform", "beta"])
@pytest.mark.parametrize("steps", [1, 4, 7, 30])
def test_a_whole_schedule_is_no_part(engine, tiny, scheduler, steps):
    import comfy.samplers

    model_sampling = tiny.model.get_model_object("model_sampling")
    whole = comfy.samplers.KSampler(tiny.model, steps, "cpu", "euler", scheduler, 1.0, {}).sigmas
    module = engine("patching.position")
    assert module.is_whole(whole, model_sampling)
    cut = comfy.samplers.KSampler(tiny.model, steps, "cpu", "dpm_2", scheduler, 1.0, {}).sigmas
    assert module.is_whole(cut, model_sampling), "DPM2 leaves out the penultimate sigma"


def test_a_given_name_that_is_no_longer_true_is_a_label(record, deepcache, node, engine, tiny):
    """`stock` of a shipped workflow, in a graph that the user put DeepCache into."""
    graph = {
        "1": {"class_type": "Loader", "inputs": {}},
        "2": {"class_type": "SpeedLabProfileSampler", "inputs": {"model": ["1", 0]}},
    }
    named = {
        "speedlab": {
            "scenario": "s",
            "plan": "default",
            "made_of": {"2": engine("measure.plan_names").made_of(graph, "2")},
        }
    }
    here = {"extra_pnginfo": named, "unique_id": "2"}
    made = record(tiny.model, prompt=graph, **here)
    assert (made.request["plan"], made.request["scenario"]) == ("default", "s")
    assert "label" not in made.request
    graph["3"] = {"class_type": "SpeedLabDeepCache", "inputs": {"model": ["1", 0]}}
    graph["2"]["inputs"]["model"] = ["3", 0]
    made = record(deepcache(tiny.model), prompt=graph, **here)
    assert made.request["plan"] == "+".join(made.request["accelerators"])
    assert made.request["plan"].startswith("deepcache(cache_interval=3")
    assert (made.request["label"], made.request["scenario"]) == ("default", "s")
    assert engine("measure.record").csv_row(made)["plan"] == made.request["plan"]


def test_a_name_whose_technique_did_nothing_is_a_label(record, dynamic_cfg, engine, tiny):
    graph = {
        "1": {"class_type": "SpeedLabDynamicCFG", "inputs": {"stop_at": 0.5}},
        "2": {"class_type": "SpeedLabProfileSampler", "inputs": {"model": ["1", 0]}},
    }
    told = engine("measure.plan_names").made_of(graph, "2")
    here = {
        "prompt": graph,
        "extra_pnginfo": {"speedlab": {"plan": "CFG off", "made_of": {"2": told}}},
        "unique_id": "2",
    }
    assert record(dynamic_cfg(tiny.model), **here).request["plan"] == "CFG off"
    made = record(dynamic_cfg(tiny.model), sampler="euler_cfg_pp", **here)
    assert (made.request["plan"], made.request["label"]) == ("stock", "CFG off")


@pytest.mark.parametrize(("allowed", "told"), [({0, 1, 2, 5, 7, 8}, "0-2,5,7-8"), ({3}, "3")])
def test_threads_and_cpus_are_of_the_record(
    record: Callable[..., Any], tiny: Any, monkeypatch: pytest.MonkeyPatch, allowed: set[int], told: str
) -> None:
    """What `serve` and `bench` chose, or the user did."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: allowed, raising=False)
    env = record(tiny.model, steps=1).env
    assert (env["cpu_threads"], env["cpus"]) == (torch.get_num_threads(), told)

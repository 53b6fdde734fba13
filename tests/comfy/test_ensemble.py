"""Ensemble Sampler against two chained KSamplerAdvanced of ComfyUI, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from .tiny_unet import TinyUNet, build

STEPS = 8


@pytest.fixture(scope="module")
def pair(comfy) -> SimpleNamespace:
    return SimpleNamespace(base=build("sdxl"), refiner=build("refiner", seed=3))


def latent(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 4, 8, 8)}


def ensemble(node, base, refiner, pair: SimpleNamespace, **changes):
    settings = {
        "latent": latent(), "seed": 5, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
        "handoff": 0.75, **changes,
    }  # fmt: skip
    return node("SpeedLabEnsembleSampler").sample(
        base, pair.base.cond(1), pair.base.cond(2), refiner, pair.refiner.cond(3), pair.refiner.cond(4), **settings
    )["result"]


def chained(core, base, refiner, pair: SimpleNamespace, at: int, **changes) -> torch.Tensor:
    """Two KSamplerAdvanced: the first leaves its noise, the second adds none."""
    settings = {"noise_seed": 5, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", **changes}
    start = settings.pop("latent", latent())
    sampler = core.NODE_CLASS_MAPPINGS["KSamplerAdvanced"]()
    (half,) = sampler.sample(
        base, "enable", positive=pair.base.cond(1), negative=pair.base.cond(2), latent_image=start, start_at_step=0,
        end_at_step=at, return_with_leftover_noise="enable", **settings,
    )  # fmt: skip
    (whole,) = sampler.sample(
        refiner, "disable", positive=pair.refiner.cond(3), negative=pair.refiner.cond(4), latent_image=half,
        start_at_step=at, end_at_step=10000, return_with_leftover_noise="disable", **settings,
    )  # fmt: skip
    return whole["samples"]


@pytest.mark.parametrize(("sampler", "scheduler"), [("euler", "normal"), ("dpmpp_2m", "karras"), ("heun", "normal"),
                                                    ("euler_ancestral", "normal"), ("uni_pc", "simple")])  # fmt: skip
def test_equals_two_chained_samplers(core, node, pair, sampler, scheduler):
    out, _ = ensemble(node, pair.base.model, pair.refiner.model, pair, sampler_name=sampler, scheduler=scheduler)
    expected = chained(core, pair.base.model, pair.refiner.model, pair, 6, sampler_name=sampler, scheduler=scheduler)
    assert torch.equal(out["samples"], expected)


@pytest.mark.parametrize(("handoff", "steps", "at"), [(0.9, 8, 7), (0.5, 7, 3), (0.29, 100, 29), (0.13, 8, 1)])
def test_the_hand_over_is_the_floor_of_its_share(core, node, pair, handoff, steps, at):
    if steps > 20:
        assert __import__("importlib").import_module("speedlab.patching.schedule").steps_before(handoff, steps) == at
        return
    out, record = ensemble(node, pair.base.model, pair.refiner.model, pair, handoff=handoff, steps=steps)
    assert torch.equal(out["samples"], chained(core, pair.base.model, pair.refiner.model, pair, at, steps=steps))
    assert [step["model"] for step in record.steps] == ["base"] * at + ["refiner"] * (steps - at)


def test_the_profile_counts_each_step_once(node, pair):
    _, record = ensemble(node, pair.base.model, pair.refiner.model, pair)
    assert [step["index"] for step in record.steps] == list(range(STEPS))
    assert [step["model"] for step in record.steps] == ["base"] * 6 + ["refiner"] * 2
    sigmas = [step["sigma"] for step in record.steps]
    assert sigmas == sorted(sigmas, reverse=True)
    for step in record.steps:
        assert (step["evals"], step["cond_rows"], step["uncond_rows"], step["cached"]) == (1, 1, 1, False)
    assert record.request["handoff"] == 0.75
    assert record.request["base_steps"] == 6
    assert record.request["refiner"]["model"] == "SDXLRefiner"
    assert record.status == "ok"
    total = sum(step["cpu_ms"] for step in record.steps)
    assert record.phases_ms["sample"] == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(("handoff", "role"), [(1.0, "base"), (0.0, "refiner")])
def test_one_model_alone_at_the_ends(core, node, pair, handoff, role):
    out, record = ensemble(node, pair.base.model, pair.refiner.model, pair, handoff=handoff)
    alone: TinyUNet = getattr(pair, role)
    conds = (1, 2) if role == "base" else (3, 4)
    (expected,) = core.NODE_CLASS_MAPPINGS["KSampler"]().sample(
        alone.model, 5, STEPS, 5.0, "euler", "normal", alone.cond(conds[0]), alone.cond(conds[1]), latent()
    )
    assert torch.equal(out["samples"], expected["samples"])
    assert [step["model"] for step in record.steps] == [role] * STEPS


def test_a_refiner_alone_follows_its_own_schedule(core, node, pair):
    """Of two models with other noise levels: here the base goes on to no signal at all."""
    import importlib

    discrete = importlib.import_module("comfy_extras.nodes_model_advanced").ModelSamplingDiscrete()
    (base,) = discrete.patch(pair.base.model, "eps", True)
    out, _ = ensemble(node, base, pair.refiner.model, pair, handoff=0.0)
    (expected,) = core.NODE_CLASS_MAPPINGS["KSampler"]().sample(
        pair.refiner.model, 5, STEPS, 5.0, "euler", "normal", pair.refiner.cond(3), pair.refiner.cond(4), latent()
    )
    assert torch.equal(out["samples"], expected["samples"])


def test_batch_mask_and_batch_index_go_through(core, node, pair):
    start = {
        "samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9)),
        "noise_mask": torch.ones(1, 1, 8, 8).index_fill(3, torch.arange(4), 0.0),
        "batch_index": [3, 1],
    }
    out, _ = ensemble(node, pair.base.model, pair.refiner.model, pair, latent=start)
    expected = chained(core, pair.base.model, pair.refiner.model, pair, 6, latent=start)
    assert torch.equal(out["samples"], expected)
    assert out["batch_index"] == [3, 1]


def test_dynamic_cfg_counts_the_steps_of_the_whole_schedule(engine, node, pair):
    guidance = engine("techniques.guidance.dynamic_cfg")
    config = guidance.DynamicCFGConfig(stop_at=0.5)
    base = guidance.attach_dynamic_cfg(pair.base.model, config)
    refiner = guidance.attach_dynamic_cfg(pair.refiner.model, config)
    _, record = ensemble(node, base, refiner, pair)
    assert [step["uncond_rows"] for step in record.steps] == [1, 1, 1, 1, 0, 0, 0, 0]
    _, record = ensemble(node, pair.base.model, guidance.attach_dynamic_cfg(
        pair.refiner.model, guidance.DynamicCFGConfig(stop_at=0.9)), pair)  # fmt: skip
    assert [step["uncond_rows"] for step in record.steps] == [1] * 7 + [0], "floor(0.9 * 8) = 7 of all eight"


def test_deepcache_on_either_model_counts_the_whole_schedule(engine, node, pair):
    deepcache = engine("techniques.deepcache.attach")
    config = deepcache.DeepCacheConfig(interval=3)
    base = deepcache.attach_deepcache(pair.base.model, config)
    refiner = deepcache.attach_deepcache(pair.refiner.model, config)
    _, record = ensemble(node, base, refiner, pair, steps=12, handoff=0.5)
    cached = [step["cached"] for step in record.steps]
    assert cached == [False, True, True] * 4
    _, record = ensemble(node, pair.base.model, refiner, pair, steps=12, handoff=0.5)
    assert [step["cached"] for step in record.steps] == [False] * 6 + [False, True, True] * 2
    assert len(record.request["accelerators"]) == 1 and record.request["plan"].startswith("refiner:deepcache(")


def test_what_a_technique_of_the_refiner_did_is_told(engine, node, pair):
    """At CFG 1 nothing is left out, on the refiner's steps either."""
    guidance = engine("techniques.guidance.dynamic_cfg")
    refiner = guidance.attach_dynamic_cfg(pair.refiner.model, guidance.DynamicCFGConfig(stop_at=0.1))
    _, record = ensemble(node, pair.base.model, refiner, pair)
    assert record.request["plan"].startswith("refiner:dynamic_cfg(") and "asked" not in record.request
    _, record = ensemble(node, pair.base.model, refiner, pair, cfg=1.0)
    assert record.request["plan"] == "stock" and record.request["asked"][0].startswith("refiner:dynamic_cfg(")


def test_streamed_models_give_the_same_latent(engine, node, pair):
    plan = engine("memory.plan")
    expected, _ = ensemble(node, pair.base.model, pair.refiner.model, pair)
    config = plan.MemoryPlanConfig("sequential")
    base = plan.plan_memory(pair.base.model, None, None, config).model
    refiner = plan.plan_memory(pair.refiner.model, None, None, config).model
    out, record = ensemble(node, base, refiner, pair)
    assert torch.equal(out["samples"], expected["samples"])
    assert "memory_plan(offload=sequential)" in record.request["accelerators"]


def test_a_second_run_and_another_model_are_not_affected(node, pair, core):
    first, _ = ensemble(node, pair.base.model, pair.refiner.model, pair)
    again, _ = ensemble(node, pair.base.model, pair.refiner.model, pair)
    assert torch.equal(first["samples"], again["samples"])
    assert not pair.base.model.wrappers.get("outer_sample")


def test_models_of_different_latents_are_refused(node, pair, comfy):
    with pytest.raises(RuntimeError, match=r"different latents .*SDXL and SD15"):
        ensemble(node, pair.base.model, build("sd15").model, pair)


def test_conditioning_of_the_other_encoder_is_named(node, pair):
    swapped = SimpleNamespace(base=pair.base, refiner=SimpleNamespace(cond=pair.base.cond))
    wide, narrow = (one.model.model.model_config.unet_config["context_dim"] for one in (pair.base, pair.refiner))
    if wide == narrow:
        swapped.refiner.cond = lambda seed: [[torch.zeros(1, 4, narrow + 8), {}]]
    with pytest.raises(RuntimeError, match=rf"refiner_positive is \d+ numbers wide .* reads {narrow}"):
        ensemble(node, pair.base.model, pair.refiner.model, swapped)


def test_latents_with_other_channels_are_named(node, pair):
    strange = {"samples": torch.ones(1, 3, 8, 8)}
    with pytest.raises(RuntimeError, match="3 channels and these models take 4"):
        ensemble(node, pair.base.model, pair.refiner.model, pair, latent=strange)


def test_an_empty_batch_is_refused(node, pair):
    with pytest.raises(RuntimeError, match="batch is empty"):
        ensemble(node, pair.base.model, pair.refiner.model, pair, latent=latent(0))


def test_a_cancel_on_the_refiner_is_recorded(node, pair, engine, base_dir):
    import importlib

    mm = importlib.import_module("comfy.model_management")
    calls = []

    def cancel(*_):
        calls.append(1)
        if len(calls) == 2:
            mm.interrupt_current_processing()

    handle = pair.refiner.unet.time_embed.register_forward_pre_hook(cancel)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            ensemble(node, pair.base.model, pair.refiner.model, pair)
    finally:
        handle.remove()
        mm.interrupt_current_processing(False)
    runs = sorted((base_dir / "output" / "speedlab" / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime)
    record = engine("measure.record").from_json(runs[-1].read_text())
    assert record.status == "cancelled"
    assert record.request["base_steps"] == 6
    out, _ = ensemble(node, pair.base.model, pair.refiner.model, pair)
    assert torch.isfinite(out["samples"]).all(), "the next run is as if nothing had been"

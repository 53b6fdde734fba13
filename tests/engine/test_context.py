"""What the prompt tells about a node, however the prompt looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.measure.context import NodeContext
from speedlab.measure.peaks import MemoryPeak
from speedlab.measure.plan_names import made_of
from speedlab.measure.timeline import PhaseEntry
from speedlab_tools.scenarios import workflows
from speedlab_tools.scenarios.catalog import SCENARIOS

PROMPT = {
    "1": {"class_type": "SpeedLabCheckpointLoader", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "SpeedLabTextEncode", "inputs": {"clip": ["1", 1], "text": "x"}},
    "3": {"class_type": "SpeedLabProfileSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0]},
          "_meta": {"title": "t", "speedlab": {"scenario": "txt2img-default", "plan": "stock"}}},
    "4": {"class_type": "SpeedLabVAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
    "5": {"class_type": "SpeedLabProfileReport", "inputs": {"profile": ["3", 1], "images": ["4", 0]}},
    "9": {"class_type": "SpeedLabTextEncode", "inputs": {"clip": ["1", 1], "text": "another"}},
}  # fmt: skip


def entry(phase, node_id, ms):
    return PhaseEntry(phase, node_id, ms, MemoryPeak())


def test_only_nodes_upstream_count():
    context = NodeContext.of(PROMPT, {}, "3")
    entries = [entry("text_encode", "2", 10.0), entry("text_encode", "9", 99.0)]
    assert context.ancestors() == {"1", "2", "3"}
    assert context.phase_ms("text_encode", entries) == 10.0


def test_a_pack_node_that_did_not_run_was_cached_and_a_core_node_is_unknown():
    assert NodeContext.of(PROMPT, {}, "3").phase_ms("load", []) == "cached"
    core = {**PROMPT, "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "b.safetensors"}}}
    context = NodeContext.of(core, {}, "3")
    assert context.phase_ms("load", []) is None
    assert context.checkpoint_name() == "b.safetensors"


def test_nodes_made_while_the_prompt_runs_count_for_it():
    context = NodeContext.of(PROMPT, {}, "3")
    assert context.phase_ms("text_encode", [entry("text_encode", "2", 3.0), entry("text_encode", "3.0.1", 4.0)]) == 7.0


def test_text_of_which_a_part_was_cached_is_cached():
    both = {**PROMPT, "3": {**PROMPT["3"], "inputs": {"positive": ["2", 0], "negative": ["9", 0]}}}
    context = NodeContext.of(both, {}, "3")
    assert context.phase_ms("text_encode", [entry("text_encode", "2", 10.0)]) == "cached"
    assert context.phase_ms("text_encode", [entry("text_encode", "2", 10.0), entry("text_encode", "9", 5.0)]) == 15.0


def test_the_scenario_comes_from_client_workflow_or_node():
    assert NodeContext.of(PROMPT, {}, "3").scenario() == {"scenario": "txt2img-default", "plan": "stock"}
    assert NodeContext.of(PROMPT, {"speedlab": {"plan": "mine"}}, "3").scenario()["plan"] == "mine"
    workflow = {"workflow": {"extra": {"speedlab": {"scenario": "ui"}}}}
    assert NodeContext.of({}, workflow, "3").scenario() == {"scenario": "ui"}


def shipped(scenario):
    """A shipped workflow as a browser sends it: nothing stands at its nodes; the workflow has the names."""
    api = workflows.api_graph(SCENARIOS[scenario])
    prompt = {node: {**entry, "_meta": {"title": "t"}} for node, entry in api.items()}
    sampler = next(node for node, entry in api.items() if entry["class_type"] == "SpeedLabProfileSampler")
    return prompt, {"workflow": workflows.ui_graph(SCENARIOS[scenario])}, sampler


def inputs_of(prompt, class_type):
    return next(entry["inputs"] for entry in prompt.values() if entry["class_type"] == class_type)


def test_every_shipped_name_is_true_of_its_graph():
    for scenario in SCENARIOS:
        api = workflows.api_graph(SCENARIOS[scenario])
        extra = {"workflow": workflows.ui_graph(SCENARIOS[scenario])}
        for node, entry in api.items():
            if entry["class_type"] in ("SpeedLabProfileSampler", "SpeedLabEnsembleSampler"):
                assert NodeContext.of(api, {}, node).is_plan_as_named(), scenario
                assert NodeContext.of(api, extra, node).is_plan_as_named(), scenario


def test_a_shipped_name_lasts_as_long_as_its_graph():
    prompt, extra, sampler = shipped("txt2img-default")
    context = NodeContext.of(prompt, extra, sampler)
    assert (context.scenario()["plan"], context.is_plan_as_named()) == ("stock", True)
    # Other files, sizes and prompts are the same plan; so is an input that a node gained since.
    inputs_of(prompt, "SpeedLabCheckpointLoader").update(ckpt_name="mine.safetensors", gained_since=1)
    inputs_of(prompt, "EmptyLatentImage").update(width=768, batch_size=4)
    prompt[sampler]["inputs"].update(steps=50, seed=3, cfg=3.5)
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    # The user puts DeepCache and Dynamic CFG before the sampler.
    model = prompt[sampler]["inputs"]["model"]
    more = {
        "90": {"class_type": "SpeedLabDeepCache", "inputs": {"model": model, "cache_interval": 3}},
        "91": {"class_type": "SpeedLabDynamicCFG", "inputs": {"model": ["90", 0], "stop_at": 0.5}},
    }
    changed = {**prompt, **more, sampler: {**prompt[sampler], "inputs": {**prompt[sampler]["inputs"]}}}
    changed[sampler]["inputs"]["model"] = ["91", 0]
    assert not NodeContext.of(changed, extra, sampler).is_plan_as_named()
    assert NodeContext.of(changed, extra, sampler).scenario()["plan"] == "stock"


def test_other_settings_of_a_technique_are_another_plan():
    prompt, extra, sampler = shipped("sdxl-fastest-deepcache")
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    cached = inputs_of(prompt, "SpeedLabDeepCache")
    cached["end_percent"] = 1  # as a browser writes 1.0
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    cached["cache_interval"] += 2
    assert not NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    prompt, extra, sampler = shipped("sdxl-tiny-vae")
    tiny = next(entry for entry in prompt.values() if entry["class_type"] == "SpeedLabTinyVAEDecode")
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    tiny["class_type"] = "SpeedLabVAEDecode"
    assert not NodeContext.of(prompt, extra, sampler).is_plan_as_named()


def node_of(prompt, class_type):
    return next(number for number, entry in prompt.items() if entry["class_type"] == class_type)


@pytest.mark.parametrize("scenario", ["sdxl-staged-batch", "sdxl-refiner-img2img"])
def test_another_decoder_is_another_plan_wherever_the_latent_passes_before(scenario):
    prompt, extra, sampler = shipped(scenario)
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    # What does not lead to an image is no part of the plan, nor is the order in which a client sends the nodes.
    looked_at = {"class_type": "SpeedLabCompareLatents", "inputs": {"samples_a": [sampler, 0], "samples_b": ["1", 0]}}
    more = dict(reversed([*prompt.items(), ("900", looked_at)]))
    assert NodeContext.of(more, extra, sampler).is_plan_as_named()
    decoder = node_of(prompt, "SpeedLabVAEDecode")
    prompt[decoder] = {
        "class_type": "SpeedLabTinyVAEDecode",
        "inputs": {"samples": prompt[decoder]["inputs"]["samples"]},
    }
    assert not NodeContext.of(prompt, extra, sampler).is_plan_as_named()


def test_a_staged_batch_is_made_of_what_frees_memory():
    prompt, extra, sampler = shipped("sdxl-staged-batch")
    inputs_of(prompt, "SpeedLabPromptQueue")["prompts"] = "another text"
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    first = prompt[prompt[sampler]["inputs"]["positive"][0]]
    behind = next(entry for entry in prompt.values() if entry["inputs"].get("value") == [sampler, 0])
    for freeing in (first, behind):
        before = freeing["inputs"]["what"]
        freeing["inputs"]["what"] = "all"
        assert not NodeContext.of(prompt, extra, sampler).is_plan_as_named()
        freeing["inputs"]["what"] = before
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    inputs_of(prompt, "SpeedLabVAEDecode")["samples"] = [sampler, 0]
    assert not NodeContext.of(prompt, extra, sampler).is_plan_as_named(), "nothing is freed behind the sampler"


def test_a_second_pass_is_a_part_of_the_plan_with_its_model_and_without_its_settings():
    prompt, extra, sampler = shipped("sdxl-refiner-img2img")
    second = next(entry for entry in prompt.values() if entry["inputs"].get("latent_image") == [sampler, 0])
    second["inputs"].update(steps=9, denoise=0.5, cfg=2.0, scheduler="karras")
    assert NodeContext.of(prompt, extra, sampler).is_plan_as_named()
    cached = {"class_type": "SpeedLabDeepCache", "inputs": {"model": second["inputs"]["model"], "cache_interval": 3}}
    second["inputs"]["model"] = ["900", 0]
    assert not NodeContext.of({**prompt, "900": cached}, extra, sampler).is_plan_as_named()


def test_a_name_that_nothing_vouches_for_is_not_taken_for_true():
    assert not NodeContext.of(PROMPT, {"speedlab": {"plan": "mine"}}, "3").is_plan_as_named()
    assert not NodeContext.of(PROMPT, {}, "3").is_plan_as_named()
    told = {"plan": "mine", "made_of": {"3": made_of(PROMPT, "3")}}
    assert NodeContext.of(PROMPT, {"speedlab": told}, "3").is_plan_as_named()
    for odd in ("", "x" * 100_000, "(((", "+,+", {"3": 7}, ["3"], None):
        assert not NodeContext.of(PROMPT, {"speedlab": {"plan": "mine", "made_of": odd}}, "3").is_plan_as_named()


def test_a_loop_in_the_graph_ends():
    loop = {"1": {"inputs": {"a": ["2", 0]}}, "2": {"inputs": {"a": ["1", 0]}}}
    assert NodeContext.of(loop, {}, "1").ancestors() == {"1", "2"}
    loop = {"1": {"inputs": {"model": ["2", 0]}}, "2": {"inputs": {"model": ["1", 0]}}}
    assert made_of(loop, "1").count("(") == 1
    decode = {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0]}}
    loop = {"1": {"inputs": {"samples": ["2", 0]}}, "2": {"inputs": {"samples": ["1", 0]}}, "3": decode}
    assert made_of(loop, "1").count("(") == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(JSON, JSON, JSON)
def test_no_prompt_however_odd_is_an_error(prompt, extra, node_id):
    context = NodeContext.of(prompt, extra, node_id)
    context.ancestors()
    context.scenario()
    context.is_plan_as_named()
    made_of(context.prompt, "1")
    context.checkpoint_name()
    context.phase_ms("load", [entry("load", "1", 1.0)])

"""What the prompt tells about a node, however the prompt looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from speedlab.profiling.context import NodeContext
from speedlab.profiling.memory import MemoryPeak
from speedlab.profiling.timeline import PhaseEntry

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


def test_a_loop_in_the_graph_ends():
    loop = {"1": {"inputs": {"a": ["2", 0]}}, "2": {"inputs": {"a": ["1", 0]}}}
    assert NodeContext.of(loop, {}, "1").ancestors() == {"1", "2"}


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
    context.checkpoint_name()
    context.phase_ms("load", [entry("load", "1", 1.0)])

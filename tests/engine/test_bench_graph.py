"""The graph builder, both formats, and the layout."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab_tools.client import graph as signatures
from speedlab_tools.client.graph import Graph, GraphError, is_link, split_rows, types_match, upstream
from speedlab_tools.scenarios.canvas import Box, frame, place, to_ui, ui_to_api
from speedlab_tools.scenarios.catalog import find


def small_graph() -> Graph:
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", group="Load", ckpt_name="a.safetensors")
    latent = graph.add("EmptyLatentImage", group="Load", width=64)
    text = graph.add("CLIPTextEncode", group="Prompt", clip=loader["CLIP"], text="hello")
    sampler = graph.add(
        "KSampler",
        group="Sample",
        model=loader["MODEL"],
        positive=text[0],
        negative=text[0],
        latent_image=latent[0],
        seed=7,
        sampler_name="euler",
        scheduler="normal",
    )
    image = graph.add("VAEDecode", group="Decode", samples=sampler[0], vae=loader["VAE"])
    graph.add("SaveImage", group="Measure", images=image[0])
    return graph


def test_api_format_has_defaults_links_and_titles():
    api = small_graph().to_api()
    assert list(api) == ["1", "2", "3", "4", "5", "6"]
    assert api["2"]["inputs"] == {"width": 64, "height": 512, "batch_size": 1}
    assert api["4"]["inputs"]["model"] == ["1", 0]
    assert api["4"]["inputs"]["denoise"] == 1.0
    assert api["6"]["_meta"] == {"title": "SaveImage"}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text": "x"}, "'clip' \\(CLIP\\) is missing"),
        ({"text": "x", "clip": "no link"}, "takes a link"),
        ({"text": "x", "clip": None, "colour": 1}, "no input 'colour'"),
    ],
)
def test_wrong_inputs_are_errors_while_building(inputs, words):
    with pytest.raises(GraphError, match=words):
        Graph().add("CLIPTextEncode", group="Prompt", **inputs)


def test_a_link_of_another_type_is_refused():
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", group="Load", ckpt_name="a")
    with pytest.raises(GraphError, match="takes CLIP, not MODEL"):
        graph.add("CLIPTextEncode", group="Prompt", clip=loader["MODEL"], text="x")
    with pytest.raises(GraphError, match="no output 'LATENT'"):
        _ = loader["LATENT"]
    with pytest.raises(GraphError, match="no output 3"):
        _ = loader[3]


def test_unknown_nodes_and_groups_are_errors():
    with pytest.raises(signatures.UnknownNodeError, match="NoSuchNode"):
        Graph().add("NoSuchNode", group="Load")
    with pytest.raises(GraphError, match="group 'Somewhere'"):
        Graph().add("EmptyLatentImage", group="Somewhere")


def test_a_combo_without_default_must_be_given():
    with pytest.raises(GraphError, match="'ckpt_name' \\(COMBO\\) is missing"):
        Graph().add("CheckpointLoaderSimple", group="Load")


def test_types_match_any_and_lists():
    assert types_match("*", "IMAGE")
    assert types_match("IMAGE", "IMAGE,MASK")
    assert not types_match("IMAGE", "MASK")


def test_set_changes_a_node_in_place_of_the_old_one():
    graph = small_graph()
    changed = graph.set(graph.find("EmptyLatentImage")[0], width=128)
    assert graph.to_api()["2"]["inputs"]["width"] == 128
    with pytest.raises(GraphError, match="no input 'depth'"):
        graph.set(changed, depth=1)


def test_ui_format_is_the_same_graph_with_widgets_in_order():
    graph = small_graph()
    ui = to_ui(graph, name="small", note="# Note", extra={"speedlab": {"scenario": "small"}})
    assert ui_to_api(ui) == graph.to_api()
    sampler = next(node for node in ui["nodes"] if node["type"] == "KSampler")
    assert sampler["widgets_values"] == [7, "fixed", 20, 8.0, "euler", "normal", 1.0]
    assert [slot["name"] for slot in sampler["inputs"]][:4] == ["model", "positive", "negative", "latent_image"]
    assert sampler["inputs"][4]["widget"] == {"name": "seed"}
    assert ui["version"] == 0.4
    assert ui["extra"]["speedlab"] == {"scenario": "small"}


def test_a_linked_widget_keeps_its_place_among_the_widget_values():
    graph = Graph()
    loader = graph.add("SpeedLabCheckpointLoader", group="Load", ckpt_name="a")
    graph.add("SpeedLabTextEncode", group="Prompt", clip=loader["clip"], text=loader["info"])
    ui = to_ui(graph, name="linked", note="", extra={})
    assert ui["nodes"][1]["widgets_values"] == [""]
    assert ui_to_api(ui) == graph.to_api()


def test_upstream_keeps_only_what_is_needed():
    api = small_graph().to_api()
    assert list(upstream(api, ["3"])) == ["1", "3"]
    assert upstream(api, ["6"]) == api


def test_lanes_split_into_graphs_of_their_own():
    graph = find("sdxl-tiny-vae").graph()
    parts = split_rows(graph)
    assert len(parts) == 4
    for part in parts:
        classes = [node["class_type"] for node in part.values()]
        assert classes.count("SpeedLabProfileSampler") == 1
        assert classes.count("SpeedLabProfileReport") == 1
        links = [value[0] for node in part.values() for value in node["inputs"].values() if is_link(value)]
        assert set(links) <= set(part)
    assert {node_id for part in parts for node_id in part} == set(graph.to_api())


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 60), st.integers(1, 60))
def test_overlap_is_symmetric_and_true_of_itself(x, y, width, height):
    box, other = Box(0, 0, 30, 30), Box(x, y, width, height)
    assert box.overlaps(other) == other.overlaps(box)
    assert other.overlaps(other)
    assert not box.overlaps(Box(30, y, width, height))


def test_layout_runs_from_left_to_right_in_groups():
    graph = small_graph()
    boxes = place(graph)
    for node in graph.nodes:
        for link in node.links().values():
            assert boxes[link.node].right < boxes[node.id].x
    frames = list(frame(graph, boxes).values())
    assert all(left.right <= right.x for left, right in pairwise(frames))


def test_signature_from_object_info_reads_all_kinds_of_inputs():
    info = {
        "input": {
            "required": {
                "image": [["a.png"], {"image_upload": True}],
                "mode": ["COMBO", {"options": ["x"], "default": "x"}],
                "noise_seed": ["INT", {"default": 3}],
                "strength": ["FLOAT", {"forceInput": True}],
            },
            "optional": {"anything": ["*"]},
        },
        "input_order": {"required": ["mode", "image", "noise_seed", "strength"], "optional": ["anything"]},
        "output": ["IMAGE", ["a", "b"]],
        "output_name": ["picture", "choice"],
    }
    known = signatures.signature_from_info("Thing", info)
    assert [entry.name for entry in known.inputs] == ["mode", "image", "noise_seed", "strength", "anything"]
    assert [entry.extra for entry in known.widgets] == [None, "image", "fixed"]
    assert known.outputs == (("picture", "IMAGE"), ("choice", "COMBO"))
    assert known.inputs[-1].optional
    assert signatures.signature_from_json("Thing", known.to_json()) == known


def test_which_inputs_are_advanced_is_known_of_our_nodes_alone():
    """Of core's, newer versions mark some; the same snapshot holds for all."""
    spec = {"power": ["FLOAT", {"default": 1.0, "advanced": True}], "model": ["MODEL", {"advanced": True}]}
    info = {"input": {"required": spec}, "output": [], "output_name": []}
    ours = signatures.signature_from_info("SpeedLabThing", info)
    assert [entry.advanced for entry in ours.inputs] == [True, False]
    assert signatures.signature_from_json("SpeedLabThing", ours.to_json()) == ours
    assert not any(entry.advanced for entry in signatures.signature_from_info("Thing", info).inputs)

"""A report's phases are those of its own image, all of them, or there is no total and a warning says why."""

from __future__ import annotations

import csv
import itertools

import pytest

pytestmark = pytest.mark.server

COUNTED = (
    "text_encode", "core_text_encode", "free", "to_device", "prepare", "sample", "decode", "after_sampling", "save",
)  # fmt: skip
UNKNOWN = "the time from text to image is not known"
words = itertools.count()

# Expands into rounds of encode, sample, decode and report, as loops and efficiency packs do; `depth` expansions deep.
EXPANDING = """
class Rounds:
    @classmethod
    def INPUT_TYPES(cls):
        numbers = {name: ("INT", {"default": 1}) for name in ("n", "depth", "chained", "core_negative", "seed")}
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "latent": ("LATENT",), **numbers}}

    RETURN_TYPES = ("LATENT", "SPEEDLAB_PROFILE", "IMAGE")
    FUNCTION = "go"
    CATEGORY = "test"

    def go(self, model, clip, vae, latent, n, depth, chained, core_negative, seed):
        from comfy_execution.graph_utils import GraphBuilder

        graph = GraphBuilder()
        if depth > 1:
            inner = graph.node("TestRounds", model=model, clip=clip, vae=vae, latent=latent, n=n, depth=depth - 1,
                               chained=chained, core_negative=core_negative, seed=seed)
            return {"result": (inner.out(0), inner.out(1), inner.out(2)), "expand": graph.finalize()}
        current = latent
        for i in range(n):
            positive = graph.node("SpeedLabTextEncode", clip=clip, text=f"cat {seed} {i}")
            negative = graph.node("CLIPTextEncode" if core_negative else "SpeedLabTextEncode", clip=clip,
                                  text=f"bad {seed} {i}")
            sampled = graph.node("SpeedLabProfileSampler", model=model, positive=positive.out(0),
                                 negative=negative.out(0), latent_image=current, seed=seed + i, steps=2, cfg=5.0,
                                 sampler_name="euler", scheduler="normal", denoise=0.6 if chained and i else 1.0,
                                 detail="timing", warmup=0, repeats=1, nvtx=True)
            decoded = graph.node("SpeedLabVAEDecode", samples=sampled.out(0), vae=vae, slicing=False, tile_size=0,
                                 overlap=64, precision="auto")
            graph.node("SpeedLabProfileReport", profile=sampled.out(1), images=decoded.out(0))
            if chained:
                current = sampled.out(0)
        return {"result": (sampled.out(0), sampled.out(1), decoded.out(0)), "expand": graph.finalize()}


NODE_CLASS_MAPPINGS = {"TestRounds": Rounds}
"""


@pytest.fixture(scope="module")
def whose(start_server, tmp_path_factory):
    base = tmp_path_factory.mktemp("whose")
    folder = base / "custom_nodes" / "expanding"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(EXPANDING)
    return start_server(base=base)


@pytest.fixture
def job(graph):
    """The main job with new texts, so that nothing comes from the cache."""

    def build(**sampler):
        prompt = graph(text=f"a tree {next(words)}", tiny=False, **sampler)
        prompt["3"]["inputs"]["text"] = f"blurred {next(words)}"
        del prompt["8"]
        return prompt

    return build


def core_sampler(model, latent, steps=3, denoise=0.6):
    return {"class_type": "KSampler", "inputs": {
        "model": model, "positive": ["2", 0], "negative": ["3", 0], "latent_image": latent, "seed": 7, "steps": steps,
        "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": denoise}}  # fmt: skip


def upscaled(latent):
    return {"class_type": "LatentUpscaleBy", "inputs": {
        "samples": latent, "upscale_method": "bilinear", "scale_by": 2.0}}  # fmt: skip


def report_of(profile, images):
    return {"class_type": "SpeedLabProfileReport", "inputs": {"profile": profile, "images": images}}


def core_decoder(latent):
    return {"class_type": "VAEDecode", "inputs": {"samples": latent, "vae": ["1", 2]}}


def records(server, prompt):
    """Each record by the node that reported it, and the server's time for the prompt in milliseconds."""
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    stamps = {kind: data["timestamp"] for kind, data in entry["status"]["messages"] if "timestamp" in data}
    shown = {n: out["speedlab"] for n, out in entry["outputs"].items() if "speedlab" in out}
    found = {n: [server.record(run["run_id"]) for run in runs] for n, runs in shown.items()}
    return found, stamps["execution_success"] - stamps["execution_start"]


def row_of(server, record):
    with (server.output / "speedlab" / "results.csv").open(newline="") as file:
        return next(row for row in csv.DictReader(file) if row["run_id"] == record["run_id"])


def assert_whole(server, record):
    """A total that is the sum of its phases, and no word of it not being known."""
    phases = record["phases_ms"]
    counted = sum(phases[name] for name in COUNTED if isinstance(phases.get(name), (int, float)))
    assert phases["total"] == pytest.approx(counted, rel=1e-6)
    assert float(row_of(server, record)["time_s"]) == pytest.approx(counted / 1000.0, rel=1e-3)
    assert "others" not in phases
    assert not [text for text in record["warnings"] if "is not known" in text]


def assert_empty(server, record, *said):
    """No total anywhere, and a warning that says why."""
    row = row_of(server, record)
    assert record["phases_ms"]["total"] is None
    assert record["summary"]["images_per_min"] is None
    assert (row["time_s"], row["time_min_s"], row["images_per_min"]) == ("", "", "")
    warnings = [text for text in record["warnings"] if "is not known" in text]
    assert all(any(word in text for text in warnings) for word in (UNKNOWN, *said)), record["warnings"]
    assert record["summary"]["it_per_s"] > 0, "the sampler's own figures stand"


def test_hires_fix_with_a_core_sampler_has_no_total(whose, job):
    prompt = job()
    prompt |= {"20": upscaled(["5", 0]), "21": core_sampler(["1", 0], ["20", 0]), "22": core_decoder(["21", 0])}
    prompt["6"]["inputs"]["samples"] = ["21", 0]
    prompt["23"] = report_of(["5", 1], ["22", 0])
    found, _ = records(whose, prompt)
    (ours,), (cores,) = found["7"], found["23"]
    assert_empty(whose, ours, "KSampler (21)")
    assert ours["phases_ms"]["decode"] > 0, "the decode of its own image is measured all the same"
    assert_empty(whose, cores, "KSampler (21)")
    assert cores["phases_ms"]["decode"] is None
    assert "after_sampling" not in cores["phases_ms"]


def test_hires_fix_with_two_profile_samplers_has_no_total_at_either(whose, job):
    prompt = job()
    second = {**prompt["5"], "inputs": {**prompt["5"]["inputs"], "latent_image": ["20", 0], "denoise": 0.6}}
    prompt |= {"20": upscaled(["5", 0]), "21": second, "23": report_of(["21", 1], ["6", 0])}
    prompt["6"]["inputs"]["samples"] = ["21", 0]
    found, _ = records(whose, prompt)
    assert_empty(whose, found["7"][0], "SpeedLabProfileSampler (21)")
    assert_empty(whose, found["23"][0], "SpeedLabProfileSampler (5)")
    assert found["23"][0]["phases_ms"]["decode"] > 0


@pytest.mark.full
def test_hires_fix_over_pixels_counts_no_part_of_the_work_as_the_whole(whose, job):
    """Decode, scale, encode, sample, decode."""
    prompt = job()
    first = {**prompt["6"], "inputs": {**prompt["6"]["inputs"], "samples": ["5", 0]}}
    prompt |= {
        "20": first,
        "21": {"class_type": "ImageScaleBy", "inputs": {
            "image": ["20", 0], "upscale_method": "bilinear", "scale_by": 2.0}},
        "22": {"class_type": "VAEEncode", "inputs": {"pixels": ["21", 0], "vae": ["1", 2]}},
        "23": core_sampler(["1", 0], ["22", 0]),
    }  # fmt: skip
    prompt["6"]["inputs"]["samples"] = ["23", 0]
    assert_empty(whose, records(whose, prompt)[0]["7"][0], "KSampler (23)", "VAEEncode (22)")


@pytest.mark.full
def test_a_refined_latent_is_the_work_of_the_sampler_before_too(whose, job):
    prompt = job(denoise=0.6)
    prompt["20"] = core_sampler(["1", 0], ["4", 0], denoise=1.0)
    prompt["5"]["inputs"]["latent_image"] = ["20", 0]
    assert_empty(whose, records(whose, prompt)[0]["7"][0], "KSampler (20)")


@pytest.mark.full
def test_what_no_network_does_in_between_is_no_work(whose, job):
    prompt = job()
    prompt["20"] = upscaled(["5", 0])
    prompt["6"]["inputs"]["samples"] = ["20", 0]
    assert_whole(whose, records(whose, prompt)[0]["7"][0])


def test_samplers_side_by_side_have_their_own(whose, job):
    """Two profiles and a core sampler in one graph, on other branches."""
    prompt = job()
    texts = {"30": f"a house {next(words)}", "31": f"grey {next(words)}"}
    prompt |= {n: {"class_type": "SpeedLabTextEncode", "inputs": {"clip": ["1", 1], "text": text}}
               for n, text in texts.items()}  # fmt: skip
    own = {"positive": ["30", 0], "negative": ["31", 0], "seed": 9}
    prompt["35"] = {**prompt["5"], "inputs": {**prompt["5"]["inputs"], **own}}
    prompt["36"] = {**prompt["6"], "inputs": {**prompt["6"]["inputs"], "samples": ["35", 0]}}
    prompt["37"] = report_of(["35", 1], ["36", 0])
    prompt["40"] = core_sampler(["1", 0], ["4", 0], denoise=1.0)
    prompt["41"] = core_decoder(["40", 0])
    prompt["42"] = {"class_type": "PreviewImage", "inputs": {"images": ["41", 0]}}
    found, wall_ms = records(whose, prompt)
    for node in ("7", "37"):
        assert_whole(whose, found[node][0])
    assert sum(found[node][0]["phases_ms"]["total"] for node in ("7", "37")) <= wall_ms + 5


@pytest.mark.full
def test_pictures_of_another_sampler_are_not_this_profiles(whose, job):
    prompt = job()
    prompt["20"] = core_sampler(["1", 0], ["4", 0], denoise=1.0)
    prompt["6"]["inputs"]["samples"] = ["20", 0]
    assert_empty(whose, records(whose, prompt)[0]["7"][0], "do not come from the sampler of this profile")


def test_a_core_decoder_alone_is_timed_from_the_end_of_sampling(whose, job):
    prompt = job()
    prompt["6"] = core_decoder(["5", 0])
    record = records(whose, prompt)[0]["7"][0]
    assert record["phases_ms"]["after_sampling"] > 0
    assert_whole(whose, record)


def free_memory(value, what):
    return {"class_type": "SpeedLabFreeMemory", "inputs": {"value": value, "what": what}}


def freed_before(prompt):
    prompt["20"] = free_memory(["2", 0], "text_encoders")
    prompt["5"]["inputs"]["positive"] = ["20", 0]


def freed_behind(prompt):
    prompt["21"] = free_memory(["5", 0], "diffusion")
    prompt["6"]["inputs"]["samples"] = ["21", 0]


@pytest.mark.parametrize("changes", [(freed_before,), (freed_behind,), (freed_before, freed_behind)])
def test_freeing_memory_on_the_way_to_the_image_is_a_phase_of_it(whose, job, changes):
    prompt = job()
    for change in changes:
        change(prompt)
    found, wall_ms = records(whose, prompt)
    (record,) = found["7"]
    assert record["phases_ms"]["free"] > 0
    assert record["memory"]["free"]["peak_rss_gb"] is None or record["memory"]["free"]["peak_rss_gb"] > 0
    assert_whole(whose, record)
    assert record["phases_ms"]["total"] <= wall_ms + 5


@pytest.mark.full
def test_freeing_memory_before_a_core_decoder_is_in_the_span_to_the_report_alone(whose, job):
    prompt = job()
    freed_behind(prompt)
    prompt["6"] = core_decoder(["21", 0])
    record = records(whose, prompt)[0]["7"][0]
    assert record["phases_ms"]["free"] is None
    assert record["phases_ms"]["after_sampling"] > 0
    assert_whole(whose, record)


@pytest.mark.full
def test_freeing_memory_for_another_branch_is_no_phase_of_this_image(whose, job):
    prompt = job()
    prompt["20"] = free_memory(["2", 0], "text_encoders")
    prompt["21"] = {"class_type": "PreviewAny", "inputs": {"source": ["20", 0]}}
    record = records(whose, prompt)[0]["7"][0]
    assert record["phases_ms"]["free"] is None
    assert_whole(whose, record)


@pytest.mark.full
def test_a_core_decoder_beside_other_work_counts_for_itself_alone(whose, job):
    """What ComfyUI runs between sampling and report is then not only this image's; its progress tells the decoder's."""
    prompt = job()
    prompt["6"] = core_decoder(["5", 0])
    prompt["20"] = core_sampler(["1", 0], ["4", 0], denoise=1.0)
    prompt["21"] = core_decoder(["20", 0])
    prompt["22"] = {"class_type": "PreviewImage", "inputs": {"images": ["21", 0]}}
    record = records(whose, prompt)[0]["7"][0]
    assert_whole(whose, record)
    decoded = f"its {record['phases_ms']['after_sampling']:.0f} ms"
    assert any(text.startswith(f"VAEDecode (6) decoded: {decoded}") for text in record["warnings"])


def queue_of(prompt, count):
    prompts = "\n".join(f"a hill {next(words)}" for _ in range(count))
    prompt["2"] = {"class_type": "SpeedLabPromptQueue", "inputs": {
        "clip": ["1", 1], "prompts": prompts, "negative": f"blurred {next(words)}", "seeds": "1"}}  # fmt: skip
    del prompt["3"]
    prompt["5"]["inputs"].update(positive=["2", 0], negative=["2", 1], seed=["2", 2])
    return prompt


def test_each_item_of_a_list_has_its_own(whose, job):
    found, wall_ms = records(whose, queue_of(job(), 3))
    assert len(found["7"]) == 3
    for record in found["7"]:
        assert_whole(whose, record)
        assert len(record["request"]["decode"]) == 1
    assert sum(record["phases_ms"]["total"] for record in found["7"]) <= wall_ms + 5


@pytest.mark.full
def test_a_core_decoder_of_a_list_is_not_timed(whose, job):
    prompt = queue_of(job(), 3)
    prompt["6"] = core_decoder(["5", 0])
    for record in records(whose, prompt)[0]["7"]:
        assert_empty(whose, record, "other items of the list")


def rounds(prompt, **inputs):
    """The main job's loader and latent, and the node that expands; inner reports are shown under its id."""
    given = {"n": 4, "depth": 1, "chained": 0, "core_negative": 0, "seed": next(words) + 100, **inputs}
    made = {n: prompt[n] for n in ("1", "4")}
    made["9"] = {"class_type": "TestRounds", "inputs": {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "latent": ["4", 0], **given}}  # fmt: skip
    made["10"] = {"class_type": "PreviewImage", "inputs": {"images": ["9", 2]}}
    return made


def made_by_rounds(server, prompt):
    """Records of the reports inside of an expansion, in the order in which they were written, and the server's time."""
    folder = server.output / "speedlab" / "runs"
    before = set(folder.glob("*.json"))
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    stamps = {kind: data["timestamp"] for kind, data in entry["status"]["messages"] if "timestamp" in data}
    new = sorted(set(folder.glob("*.json")) - before, key=lambda path: path.stat().st_mtime_ns)
    return [server.record(path.stem) for path in new], stamps["execution_success"] - stamps["execution_start"]


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.full), 2])
def test_each_round_of_an_expansion_has_its_own(whose, job, depth):
    made, wall_ms = made_by_rounds(whose, rounds(job(), depth=depth))
    assert len(made) == 4
    for record in made:
        assert_whole(whose, record)
        # The loader stands outside, and is upstream all the same; a second prompt finds it in the cache.
        assert record["phases_ms"]["load"] == "cached" or record["phases_ms"]["load"] > 0
    assert sum(record["phases_ms"]["total"] for record in made) <= wall_ms + 5


@pytest.mark.full
def test_a_chain_of_rounds_has_a_total_only_where_it_begins(whose, job):
    made, _ = made_by_rounds(whose, rounds(job(), chained=1))
    made.sort(key=lambda record: record["request"]["seed"])
    assert_whole(whose, made[0])
    for record in made[1:]:
        assert_empty(whose, record, "SpeedLabProfileSampler")
        assert record["phases_ms"]["text_encode"] > 0
        assert record["phases_ms"]["decode"] > 0


@pytest.mark.full
def test_text_of_a_core_node_in_a_round_counts_as_in_a_flat_graph(whose, job):
    made, _ = made_by_rounds(whose, rounds(job(), core_negative=1))
    flat = job()
    flat["3"]["class_type"] = "CLIPTextEncode"
    for record in (*made, records(whose, flat)[0]["7"][0]):
        assert record["phases_ms"]["text_encode"] is None
        assert record["phases_ms"]["core_text_encode"] > 0
        assert_whole(whose, record)
        assert any(text.startswith("A core node encoded the text: its") for text in record["warnings"])


@pytest.mark.full
def test_text_of_a_core_node_is_unknown_where_it_is_from_the_cache_or_of_a_list(whose, job):
    prompt = job()
    prompt["2"]["class_type"] = "CLIPTextEncode"
    records(whose, prompt)
    prompt["5"]["inputs"]["seed"] = 77
    again = records(whose, prompt)[0]["7"][0]
    assert again["phases_ms"]["core_text_encode"] == "cached"
    assert_empty(whose, again, "in its cache")
    listed = queue_of(job(), 2)
    listed["3"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": f"blurred {next(words)}"}}
    listed["5"]["inputs"]["negative"] = ["3", 0]
    for record in records(whose, listed)[0]["7"]:
        assert_empty(whose, record)


@pytest.mark.full
@pytest.mark.parametrize("depth", [1, 2])
def test_a_report_outside_of_an_expansion_knows_what_was_inside(whose, job, depth):
    prompt = rounds(job(), n=1, depth=depth)
    prompt["11"] = report_of(["9", 1], ["9", 2])
    record = records(whose, prompt)[0]["11"][0]
    assert record["phases_ms"]["text_encode"] > 0
    assert record["phases_ms"]["decode"] > 0
    assert_whole(whose, record)


@pytest.mark.full
def test_a_sampler_behind_an_expansion_is_not_alone(whose, job):
    prompt = {**job(denoise=0.6), **rounds(job(), n=2)}
    prompt["5"]["inputs"]["latent_image"] = ["9", 0]
    assert_empty(whose, records(whose, prompt)[0]["7"][0], "SpeedLabProfileSampler")


def test_nodes_in_subgraphs_are_nodes_like_others(whose, job):
    """The canvas flattens subgraphs before it queues; ids are then paths."""
    names = {n: f"50:7:{n}" for n in ("2", "3", "5", "6")}

    def renamed(value):
        return [names.get(value[0], value[0]), value[1]] if isinstance(value, list) else value

    prompt = {
        names.get(n, n): {**node, "inputs": {key: renamed(value) for key, value in node["inputs"].items()}}
        for n, node in job().items()
    }
    assert_whole(whose, records(whose, prompt)[0]["7"][0])


@pytest.mark.full
def test_a_part_from_the_cache_leaves_the_total_of_that_image_empty(whose, job):
    prompt = job()
    prompt["35"] = {**prompt["5"], "inputs": {**prompt["5"]["inputs"], "seed": 9, "positive": ["30", 0]}}
    prompt["30"] = {**prompt["2"], "inputs": {**prompt["2"]["inputs"], "text": f"a house {next(words)}"}}
    prompt["36"] = {**prompt["6"], "inputs": {**prompt["6"]["inputs"], "samples": ["35", 0]}}
    prompt["37"] = report_of(["35", 1], ["36", 0])
    records(whose, prompt)
    prompt["2"]["inputs"]["text"] = f"a tree {next(words)}"
    prompt["3"]["inputs"]["text"] = f"blurred {next(words)}"
    found, _ = records(whose, prompt)
    assert_whole(whose, found["7"][0])
    assert found["37"][0]["phases_ms"]["text_encode"] == "cached"
    assert_empty(whose, found["37"][0], "in its cache")


@pytest.mark.full
def test_a_second_pass_that_was_changed_leaves_the_time_empty_again(whose, job):
    """Hires fix, queued again: what is before the second pass did not change, and the image is not its work alone."""
    prompt = job()
    prompt |= {"20": upscaled(["5", 0]), "21": core_sampler(["1", 0], ["20", 0])}
    prompt["6"]["inputs"]["samples"] = ["21", 0]
    first = records(whose, prompt)[0]["7"][0]
    prompt["21"]["inputs"]["seed"] = 8
    again = records(whose, prompt)[0]["7"][0]
    assert again["request"]["sampled_as"] != first["request"]["sampled_as"], "a measurement never is from the cache"
    assert again["phases_ms"]["text_encode"] == "cached"
    assert_empty(whose, again, "KSampler (21)")


@pytest.mark.full
def test_an_expansion_from_the_cache_leaves_the_time_empty(whose, job):
    prompt = rounds(job(), n=1)
    prompt["11"] = report_of(["9", 1], ["9", 2])
    assert_whole(whose, records(whose, prompt)[0]["11"][0])
    del prompt["10"]
    prompt["12"] = prompt.pop("11")
    assert_empty(whose, records(whose, prompt)[0]["12"][0], "of an earlier prompt")


@pytest.mark.full
def test_the_encoding_of_a_picture_to_start_from_is_work_on_the_image_too(whose, job):
    prompt = job(denoise=0.6)
    prompt["20"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 99}}
    prompt["21"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["20", 0], "vae": ["1", 2]}}
    prompt["5"]["inputs"]["latent_image"] = ["21", 0]
    assert_empty(whose, records(whose, prompt)[0]["7"][0], "VAEEncode (21)")

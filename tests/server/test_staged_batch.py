"""A staged batch on a real server: the order of the phases, and the same images as one by one."""

from __future__ import annotations

import asyncio
import io

import pytest

from speedlab_tools.client.client import ComfyClient
from speedlab_tools.client.events import node_spans

CHECKPOINT = "speedlab_demo_sd15.safetensors"
PROMPTS, SEEDS = ("a tree", "a house by the sea", "a dog"), (5567822456, 7, 123)
SAMPLER = {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
pytestmark = pytest.mark.server


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def staged(prefix: str, profiled: bool = False) -> dict:
    sampler = "SpeedLabProfileSampler" if profiled else "KSampler"
    extra = {"detail": "timing", "warmup": 0, "repeats": 1, "nvtx": True} if profiled else {}
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "2": node("SpeedLabPromptQueue", clip=["1", 1], prompts="\n".join(PROMPTS), negative="",
                  seeds="\n".join(map(str, SEEDS))),
        "3": node("SpeedLabFreeMemory", value=["2", 0], what="text_encoders", wait_for=["2", 1]),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node(sampler, model=["1", 0], seed=["2", 2], positive=["3", 0], negative=["2", 1],
                  latent_image=["4", 0], **SAMPLER, **extra),
        "6": node("SpeedLabFreeMemory", value=["5", 0], what="diffusion"),
        "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": node("SaveImage", images=["7", 0], filename_prefix=prefix),
    }  # fmt: skip
    if profiled:
        graph["7"] = node("SpeedLabVAEDecode", samples=["6", 0], vae=["1", 2], slicing=False, tile_size=0, overlap=64,
                          precision="auto")  # fmt: skip
        graph["8"] = node("SpeedLabProfileReport", profile=["5", 1], images=["7", 0])
    return graph


def alone(text: str, seed: int, prefix: str) -> dict:
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "2": node("CLIPTextEncode", clip=["1", 1], text=text),
        "3": node("ConditioningZeroOut", conditioning=["2", 0]),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node("KSampler", model=["1", 0], seed=seed, positive=["2", 0], negative=["3", 0],
                  latent_image=["4", 0], **SAMPLER),
        "7": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "8": node("SaveImage", images=["7", 0], filename_prefix=prefix),
    }  # fmt: skip


def run(server, *graphs: dict) -> list:
    """The result of each graph, and the pixels of every image it saved."""
    import numpy
    from PIL import Image

    async def session():
        results = []
        async with ComfyClient(server.url) as client:
            for graph in graphs:
                result = await client.run(graph, timeout_s=300)
                files = [await client.view(image) for image in result.images("SaveImage")]
                results.append((result, [numpy.asarray(Image.open(io.BytesIO(data))) for data in files]))
        return results

    return asyncio.run(session())


def test_phases_run_in_order_and_pictures_are_those_of_one_by_one(server):
    import numpy

    singles = [alone(text, seed, f"alone{n}") for n, (text, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True))]
    (whole, pictures), *others = run(server, staged("staged"), *singles)
    order = [span.node for span in node_spans(whole.log.events) if span.node in ("2", "3", "5", "6", "7", "8")]
    assert order == ["2", "3", "5", "6", "7", "8"], "each phase runs once, and wholly before the next"
    assert "SD1ClipModel" in whole.outputs["3"]["text"][0] or "Unloaded" in whole.outputs["3"]["text"][0]
    assert len(whole.outputs["3"]["text"]) == len(whole.outputs["6"]["text"]) == 1, "freed once for the whole list"
    assert "Unloaded SD15" in whole.outputs["6"]["text"][0] or "BaseModel" in whole.outputs["6"]["text"][0]
    assert len(pictures) == len(PROMPTS)
    for ours, (_, theirs) in zip(pictures, others, strict=True):
        assert numpy.array_equal(ours, theirs[0])
    assert not numpy.array_equal(pictures[0], pictures[1])


def test_every_item_has_a_record_with_its_own_seed_and_encoding_time(server):
    ((result, _),) = run(server, staged("profiled", profiled=True))
    shown = result.outputs["8"]["speedlab"]
    records = [server.record(item["run_id"]) for item in shown]
    assert [record["request"]["seed"] for record in records] == list(SEEDS)
    times = [record["phases_ms"]["text_encode"] for record in records]
    assert all(isinstance(ms, float) and ms > 0 for ms in times)
    assert len(set(times)) == len(times), "each its own, not the time of the whole list"
    assert all(len(record["request"]["decode"]) == 1 for record in records)
    assert all(record["phases_ms"]["total"] > 0 for record in records)
    freed = {record["phases_ms"]["free"] for record in records}
    assert len(freed) == 1 and freed.pop() > 0, "freed once for the list, an equal share for each"
    counted = ("text_encode", "free", "to_device", "prepare", "sample", "decode", "save")
    for phases in (record["phases_ms"] for record in records):
        assert phases["total"] == pytest.approx(sum(phases[name] or 0.0 for name in counted), rel=1e-6)


def test_bad_texts_stop_the_prompt_and_name_the_line(server):
    graph = staged("bad")
    graph["2"]["inputs"]["seeds"] = "1\ntwo\n3"
    assert "seeds, line 2: 'two' is not a whole number" in server.error(server.run(graph))
    graph["2"]["inputs"]["seeds"] = "1\n2"
    assert "3 prompts and 2 seeds" in server.error(server.run(graph))

"""A short soak on a real server, and that it would see what it looks for. `run.py stress` soaks longer."""

from __future__ import annotations

import asyncio

import pytest

from speedlab_tools.client.client import ComfyClient
from speedlab_tools.client.errors import ExecutionFailed, PromptRejected
from speedlab_tools.stress import soak
from speedlab_tools.stress.command import soak_rows, write_soak
from speedlab_tools.stress.server import bring_probe, node
from speedlab_tools.stress.soak import BOUNDS, demo_kit, growths, read
from speedlab_tools.stress.soak_graph import Kit, SoakPrompts

pytestmark = pytest.mark.server
PROMPTS, SEED = 30, 3

# What a technique that keeps what it should let go would leave.
LEAK = """
import threading, time, torch
kept = []

class Leak:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "leak", True, "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"error": ("BOOLEAN", {"default": False})}}

    def leak(self, error):
        if error:
            return {}["a key of ours"]
        kept.append((torch.nn.Linear(8000, 8000), [open(__file__) for _ in range(5)], [[] for _ in range(50000)]))
        for _ in range(5):
            threading.Thread(target=time.sleep, args=(600,), daemon=True, name="left behind").start()
        torch.set_num_threads(torch.get_num_threads())
        return {}

NODE_CLASS_MAPPINGS = {"TestLeak": Leak}
"""


@pytest.fixture(scope="module")
def kit() -> Kit:
    return demo_kit(large=False)[0]


@pytest.fixture(scope="module")
def start(start_server, tmp_path_factory):
    """Servers with the probe, the demo models and a node that leaks."""

    def make():
        base = tmp_path_factory.mktemp("soak")
        bring_probe(base)
        (base / "custom_nodes" / "leak").mkdir()
        (base / "custom_nodes" / "leak" / "__init__.py").write_text(LEAK)
        for kind, paths in demo_kit(large=False)[1].items():
            (base / "models" / kind).mkdir(parents=True, exist_ok=True)
            for path in paths:
                (base / "models" / kind / path.name).symlink_to(path)
        return start_server(base=base)

    return make


@pytest.fixture(scope="module")
def soaked(start):
    return start()


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


@pytest.mark.full
def test_random_prompts_leave_nothing_and_give_the_same_bits_in_a_fresh_process(soaked, start, kit, tmp_path):
    told = []
    tally = soak.soak(soaked.url, kit, PROMPTS, SEED, told.append)
    assert not tally.broken, told
    assert tally.prompts == PROMPTS and tally.fine >= PROMPTS / 2
    assert tally.fine + tally.refused.total() + tally.failed_in_core.total() == PROMPTS
    numbers = soak.sample(tally, SEED)
    assert len(numbers) == soak.LEAST_REPEATED
    soak.repeat(start().url, kit, numbers, SEED, tally)
    assert tally.repeated == len(numbers) and not tally.broken
    rows = {row[0]: row for row in soak_rows(tally)}
    assert rows["prompts"][1] == str(PROMPTS) and set(BOUNDS) <= set(rows)
    assert "errors without one,0,,,0" in write_soak(tmp_path, tally, SEED).read_text()


def test_every_node_of_the_pack_has_its_place(info, kit):
    prompts = SoakPrompts(info, kit, SEED)
    ours = {name for name in info if name.startswith("SpeedLab") and not name.startswith("SpeedLabStress")}
    assert ours == ours & {name for n in range(500) for name in prompts.prompt(n).classes}
    large = SoakPrompts(info, Kit(kit.sd15, sdxl="xl.safetensors", refiner="refiner.safetensors"), SEED)
    loaded = {str(prompt.loads) for prompt in map(large.prompt, range(1000))}
    assert any("'xl.safetensors" in text for text in loaded) and any("'refiner.safetensors" in text for text in loaded)


def test_a_prompt_follows_from_seed_and_number(info, kit):
    prompts, others = SoakPrompts(info, kit, 1), SoakPrompts(info, kit, 2)
    assert [prompts.prompt(n) for n in (7, 3)] == [prompts.prompt(n) for n in (7, 3)]
    assert prompts.prompt(7).graph != prompts.prompt(8).graph != others.prompt(8).graph
    measured = next(p for p in map(prompts.prompt, range(300)) if "'backend': 'auto'" in str(p.graph))
    assert not measured.repeatable


@pytest.mark.full
def test_what_is_kept_would_be_seen(soaked):
    """After the soak: what leaks here stays in the server."""

    async def leak():
        async with ComfyClient(soaked.url) as client:
            before = await read(client)
            await client.run({"1": node("TestLeak", error=False)}, timeout_s=120)
            return growths([before, await read(client)], 1)

    broken = {growth.what for growth in asyncio.run(leak()) if growth.broken}
    assert {"rss_mb", "open_files", "threads", "python_threads", "modules", "objects"} <= broken


@pytest.mark.full
def test_an_error_without_words_would_be_seen(soaked, kit):
    async def fail(graph):
        async with ComfyClient(soaked.url) as client:
            with pytest.raises((ExecutionFailed, PromptRejected)) as caught:
                await client.run(graph, timeout_s=120)
            return caught.value

    assert not soak.is_readable(asyncio.run(fail({"1": node("TestLeak", error=True)})))
    loader = node("SpeedLabCheckpointLoader", ckpt_name=kit.sd15, precision="auto", memory_format="contiguous")
    attention = node("SpeedLabAttention", model=["1", 0], backend="sage")
    sampled = {"1": loader, "2": attention, "3": node("SpeedLabStressProbe", model=["2", 0])}
    assert soak.is_readable(asyncio.run(fail(sampled)))
    assert soak.is_readable(
        asyncio.run(fail({"1": {**loader, "inputs": {}}, "2": node("PreviewImage", images=["1", 0])}))
    )


@pytest.mark.full
def test_an_unequal_result_would_be_seen(soaked, kit, info):
    prompts = SoakPrompts(info, kit, SEED)
    number = next(n for n in range(99) if prompts.prompt(n).classes >= {"SpeedLabTinyVAEDecode"})
    tally = soak.SoakTally(digests={number: "another"})
    soak.repeat(soaked.url, kit, [number], SEED, tally)
    assert tally.unequal and str(number) in tally.unequal[0]

"""Prompts cancelled at random moments of each phase on a real server; afterwards nothing of them may be left.

The phases: loading, encoding, preparing, compiling, the first, a cached and the last step, decoding, writing.

A stock KSampler on the same loaded model has to give the same latents bit for bit, and a probe in the server's process
has to see the same wrappers, hooks, torch flags, threads and objects as before.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from speedlab.measure.store import RunStore
from speedlab.web.library import RunLibrary

from ..client.client import ComfyClient, ImageRef, RunResult
from ..client.errors import BenchError, ExecutionInterrupted
from ..client.events import Event
from .writers import FaultTally

PROBE = Path(__file__).with_name("probe")
# Phase -> the node whose start, or the sampler's step whose end, opens it.
PHASES: dict[str, tuple[str, int | None]] = {
    "load": ("1", None),
    "text encoding": ("2", None),
    "preparing": ("5", None),
    "compiling": ("5", None),
    "first step": ("5", 1),
    "cached step": ("5", 2),
    "last step": ("5", 7),
    "decoding": ("6", None),
    "writing": ("7", None),
}
_STEPS = 8
_CHECK_EVERY = 10
_SOON_S = 0.15
TIMEOUT_S = 300.0


def bring_probe(base: Path) -> None:
    """Put the probe among a server's custom nodes, before it starts."""
    shutil.copytree(PROBE, base / "custom_nodes" / "speedlab_stress_probe", dirs_exist_ok=True)


def cancel_at_random(url: str, output: Path, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    """Cancel so many prompts, the phases in turn. `output` is the server's output folder. Raises BenchError."""
    return asyncio.run(_cancel_all(url, output, checkpoint, faults, rng))


async def _cancel_all(url: str, output: Path, checkpoint: str, faults: int, rng: Random) -> FaultTally:
    tally, ended = FaultTally("cancelled"), Counter[str]()
    started = time.perf_counter()
    async with ComfyClient(url) as client:
        await client.run(stressed(checkpoint, seed=0), timeout_s=TIMEOUT_S)
        compiling_s = await _time_compiling(client, checkpoint)
        before = await look(client, checkpoint)
        for number in range(faults):
            phase = list(PHASES)[number % len(PHASES)]
            if phase == "load":
                await client.free()
            graph, longest_s = stressed(checkpoint, seed=number + 1), _SOON_S
            if phase == "compiling":
                graph, longest_s = compiled(checkpoint, number + 1, _side(rng), _side(rng)), compiling_s
            ended[await _cancel(client, graph, phase, rng.uniform(0.0, longest_s))] += 1
            tally.faults += 1
            if tally.faults % _CHECK_EVERY == 0 or tally.faults == faults:
                tally.broken += differences(before, await look(client, checkpoint), tally.faults)
    tally.broken += [f"{count} prompts failed: {what}" for what, count in ended.items() if what not in _GOOD_ENDS]
    tally.halves, tally.runs = ended["cancelled"], sum(ended.values())
    tally.broken += left_on_disk(output)
    tally.seconds = time.perf_counter() - started
    return tally


_GOOD_ENDS = ("cancelled", "finished")


async def _time_compiling(client: ComfyClient, checkpoint: str) -> float:
    """Seconds from the sampler's start to the end of its first step, for a size that was not compiled before."""
    graph = compiled(checkpoint, 0, 72, 72)
    events = (await client.run(graph, timeout_s=TIMEOUT_S)).log.events
    started = next(event.time_s for event in events if event.kind == "executing" and event.node == "5")
    return next(event.time_s for event in events if event.kind == "progress" and event.node == "5") - started


def _side(rng: Random) -> int:
    """An image's side: jit_trace compiles every size for itself, and keeps few."""
    return 64 + 8 * rng.randrange(9)


async def _cancel(client: ComfyClient, graph: dict[str, Any], phase: str, delay_s: float) -> str:
    """Run a prompt and interrupt it so long after its phase began; how it ended."""
    opening, step = PHASES[phase]
    reached = asyncio.Event()

    def listen(event: Event) -> None:
        if event.node == opening and (event.kind == "executing" if step is None else event.value >= step):
            reached.set()

    async def interrupt() -> None:
        await reached.wait()
        await asyncio.sleep(delay_s)
        await client.interrupt()

    waiting = asyncio.create_task(interrupt())
    try:
        await client.run(graph, listener=listen, timeout_s=TIMEOUT_S)
        return "finished"
    except ExecutionInterrupted:
        return "cancelled"
    except BenchError as error:
        return f"{phase}: {error}"
    finally:
        if reached.is_set():
            await waiting
        waiting.cancel()


async def look(client: ComfyClient, checkpoint: str) -> dict[str, Any]:
    """A stock run's latents and what the probe sees."""
    result = await client.run(stock(checkpoint), timeout_s=TIMEOUT_S)
    seen: dict[str, Any] = json.loads(result.outputs["22"]["text"][0])
    return {**seen, "latents": await _latents(client, result)}


async def _latents(client: ComfyClient, result: RunResult) -> str:
    """The samples that SaveLatent wrote, without the header, which holds the prompt."""
    (saved,) = result.outputs["21"]["latents"]
    data = await client.view(ImageRef(saved["filename"], saved["subfolder"], saved["type"]))
    return data[8 + int.from_bytes(data[:8], "little") :].hex()


def differences(before: dict[str, Any], after: dict[str, Any], faults: int) -> list[str]:
    lines = []
    for what in before:
        if before[what] != after[what]:
            shown = "" if what == "latents" else f": {before[what]} became {after[what]}"
            lines.append(f"after {faults} cancels the {what} differ{shown}")
    return lines


def left_on_disk(output: Path) -> list[str]:
    """Temporary files, records that are not whole, and runs with a wrong number of rows or an end in an error.

    A run that did not end well has one row. One that was sampled to its end gets its row from the report, where that
    was reached.
    """
    store = RunStore(output)
    lines = [f"{path.name} is left" for path in output.rglob("*.tmp")]
    page = RunLibrary(store).page(limit=200)
    lines += [f"{page.skipped} files are no whole records"] if page.skipped else []
    text = store.csv_path.read_text(encoding="utf-8")
    allowed = {"ok": (0, 1), "cancelled": (1,), "oom": (1,)}
    for run in page.runs:
        rows = text.count(run.run_id)
        if rows not in allowed.get(run.status, ()):
            lines.append(f"{run.run_id} ({run.status}) has {rows} rows")
    return lines


def stressed(checkpoint: str, seed: int) -> dict[str, Any]:
    """A prompt with several techniques, each of which has something to undo."""
    return {
        **_shared(checkpoint),
        "10": node("SpeedLabDeepCache", model=["1", 0], cache_interval=2, cache_branch_id=0, start_percent=0.0,
                    end_percent=1.0, schedule="uniform"),
        "11": node("SpeedLabDynamicCFG", model=["10", 0], mode="fixed", stop_at=0.5, similarity=0.99),
        "12": node("SpeedLabAttention", model=["11", 0], backend="sdpa"),
        "13": node("SpeedLabPrecision", model=["12", 0], tf32="on", cudnn_tf32="off", cudnn_benchmark="on",
                    fp16_accumulation="keep", memory_format="keep", autocast="bf16"),
        "5": node("SpeedLabProfileSampler", model=["13", 0], seed=seed, steps=_STEPS, cfg=5.0, sampler_name="euler",
                   scheduler="normal", positive=["2", 0], negative=["3", 0], latent_image=["4", 0], denoise=1.0,
                   detail="timing", warmup=0, repeats=1, nvtx=True),
        "6": node("SpeedLabVAEDecode", samples=["5", 0], vae=["1", 2], slicing=True, tile_size=0, overlap=64,
                   precision="auto"),
        "7": node("SpeedLabProfileReport", profile=["5", 1], images=["6", 0]),
    }  # fmt: skip


def compiled(checkpoint: str, seed: int, width: int, height: int) -> dict[str, Any]:
    """The stressed prompt with the network compiled as a whole, where DeepCache cannot be."""
    graph = stressed(checkpoint, seed)
    graph["4"]["inputs"].update(width=width, height=height)
    graph["10"] = node("SpeedLabCompileModel", model=["1", 0], backend="jit_trace", scope="model", mode="default",
                       dynamic="auto", on_failure="error", freeze_weights=False)  # fmt: skip
    return graph


def stock(checkpoint: str) -> dict[str, Any]:
    """Core's sampler on the model that the stressed prompts ran on, and the probe."""
    return {
        **_shared(checkpoint),
        "20": node("KSampler", model=["1", 0], seed=42, steps=3, cfg=5.0, sampler_name="euler", scheduler="normal",
                    positive=["2", 0], negative=["3", 0], latent_image=["4", 0], denoise=1.0),
        "21": node("SaveLatent", samples=["20", 0], filename_prefix="latents/stock"),
        "22": node("SpeedLabStressProbe", model=["1", 0]),
    }  # fmt: skip


def _shared(checkpoint: str) -> dict[str, Any]:
    return {
        "1": node("SpeedLabCheckpointLoader", ckpt_name=checkpoint, precision="auto", memory_format="contiguous"),
        "2": node("SpeedLabTextEncode", clip=["1", 1], text="a tree"),
        "3": node("SpeedLabTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}

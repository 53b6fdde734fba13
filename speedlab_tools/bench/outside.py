"""A run seen from outside as a record: the same measure for graphs with and without this pack's nodes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from speedlab import __version__
from speedlab.measure.environment import cpu_name, environment_hash
from speedlab.measure.plan_names import plan_of
from speedlab.measure.record import RunRecord
from speedlab.measure.store import new_run_id
from speedlab.measure.summary import rows_of, summarise
from speedlab.plans.plan_text import PRESETS

from ..client.client import ComfyClient, RunResult
from ..client.errors import BenchError, ServerGone
from ..client.events import SAVERS, TEXT_ENCODERS, node_spans, nodes_of, text_to_image_s

SAMPLE_EVERY_S = 0.05
PROFILER = frozenset({"SpeedLabProfileSampler"})
DECODERS = frozenset({"VAEDecode", "SpeedLabVAEDecode", "SpeedLabTinyVAEDecode"})
SAMPLED = "memory was sampled from outside every 0.05 s, so that short peaks may be missing"


@dataclass
class OutsideMemory:
    """Peaks in bytes seen by sampling; None where nothing could be seen."""

    vram: int | None = None
    rss: int | None = None

    def see(self, vram: int | None, rss: int | None) -> None:
        """Take one sample in."""
        self.vram = vram if self.vram is None else max(self.vram, vram or 0)
        self.rss = rss if self.rss is None else max(self.rss, rss or 0)

    def gigabytes(self) -> dict[str, float | None]:
        """The record's memory of one phase."""
        gb = [None if value is None else round(value / 1e9, 4) for value in (self.vram, self.rss)]
        return {"peak_allocated_gb": gb[0], "peak_reserved_gb": None, "peak_rss_gb": gb[1], "device_used_gb": None}


def rss_reader(pid: int | None) -> Callable[[], int | None]:
    """A function that reads a process's resident memory in bytes; None without psutil or without the process."""
    try:
        import psutil
    except ImportError:
        return lambda: None
    if pid is None:
        return lambda: None
    process = psutil.Process(pid)

    def read() -> int | None:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return None

    return read


async def _vram(client: ComfyClient) -> int | None:
    """Bytes that the server's tensors hold on its device now; None on a CPU."""
    try:
        device = (await client.system_stats())["devices"][0]
    except (ServerGone, KeyError, IndexError):
        return None
    if device.get("type") == "cpu":
        return None
    return int(device["torch_vram_total"]) - int(device["torch_vram_free"])


@contextlib.asynccontextmanager
async def watch(client: ComfyClient, pid: int | None, with_vram: bool) -> AsyncIterator[OutsideMemory]:
    """Sample the server's memory while the block runs. Asking for VRAM costs the server time: not in a timed run."""
    seen, read = OutsideMemory(), rss_reader(pid)

    async def sample() -> None:
        while True:
            seen.see(await _vram(client) if with_vram else None, read())
            await asyncio.sleep(SAMPLE_EVERY_S)

    task = asyncio.create_task(sample())
    try:
        yield seen
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def server_env(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The record's `env`, as far as a server tells it."""
    system, device = stats["system"], stats["devices"][0]
    kind = str(device.get("type", "cpu"))
    return {
        "device": cpu_name() if kind == "cpu" else str(device.get("name")),
        "device_type": kind,
        "device_memory_gb": None if kind == "cpu" else round(int(device["vram_total"]) / 1e9, 2),
        "torch": system.get("pytorch_version"),
        "comfyui": system.get("comfyui_version"),
        "speedlab": __version__,
        "python": str(system.get("python_version", "")).split(" ")[0] or None,
        "platform": system.get("os"),
        "ram_gb": round(int(system.get("ram_total", 0)) / 1e9, 1),
    }


def sampled(result: RunResult) -> dict[str, Any]:
    """What the Profile Sampler of the graph reports of its run. Raises BenchError where it reports nothing."""
    for node in nodes_of(result.graph, PROFILER):
        shown = (result.outputs.get(node) or {}).get("speedlab") or []
        if shown and shown[0].get("steps") and (shown[0].get("summary") or {}).get("runs_ms"):
            return dict(shown[0])
    raise BenchError("the server's Profile Sampler gave no step times: is its SpeedLab of this version?")


def phases(result: RunResult) -> dict[str, float | str | None]:
    """Milliseconds of each phase: sampling from the sampler, others from the times at which nodes started.

    `prepare` is what lies between the others; moving the model to the device is in it.
    """
    total = text_to_image_s(result.log, result.graph)
    if total is None:
        raise BenchError(
            "the run could not be timed: the connection to the server dropped, or nodes came from its cache"
        )
    spans = node_spans(result.log.events)

    def spent(classes: frozenset[str]) -> float:
        nodes = set(nodes_of(result.graph, classes))
        return 1000.0 * sum(span.seconds for span in spans if span.node in nodes)

    sample = float(sampled(result)["summary"]["runs_ms"][0])
    named = {
        "text_encode": spent(TEXT_ENCODERS), "sample": sample, "decode": spent(DECODERS), "save": spent(SAVERS)
    }  # fmt: skip
    rest = max(1000.0 * total - sum(named.values()), 0.0)
    return {"load": None, "prepare": rest, "first_eval": None, **named, "total": 1000.0 * total}


def _tiny_decoders(result: RunResult) -> list[str]:
    """The decoders of Tiny VAE Decode in the graph, and of Accelerate's VAE, as a record names them."""
    nodes = nodes_of(result.graph, frozenset({"SpeedLabTinyVAEDecode"}))
    stacks = [result.graph[node]["inputs"] for node in nodes_of(result.graph, frozenset({"SpeedLabAccelerate"}))]
    tiny = [inputs for inputs in stacks if "vae" in inputs and PRESETS.get(inputs["preset"], "").endswith("+tiny")]
    return ["tiny_vae(auto)" for _ in tiny] + [
        f"tiny_vae({result.graph[node]['inputs'].get('decoder')})" for node in nodes
    ]


def outside_record(
    result: RunResult, *, request: Mapping[str, Any], env: Mapping[str, Any], memory: OutsideMemory
) -> RunRecord:
    """The record of a run that was timed from outside, with the sampler's own steps and what it says that ran."""
    spent, info = phases(result), sampled(result)
    ran = [*info.get("accelerators", ()), *_tiny_decoders(result)]
    fell_back = info.get("asked") is not None
    request = {**request, "accelerators": ran, **({"plan": plan_of(ran), "asked": info["asked"]} if fell_back else {})}
    total, sample = spent["total"], spent["sample"]
    rows = rows_of(info["steps"])
    assert isinstance(total, float) and isinstance(sample, float)
    return RunRecord(
        run_id=new_run_id(),
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        status="ok",
        error=None,
        env=env,
        env_hash=environment_hash(dict(env)),
        request=request,
        phases_ms=spent,
        steps=tuple(info["steps"]),
        summary={
            **summarise([sample], [rows], info["summary"].get("first_eval_ms"), rows[0].ms),
            "totals_ms": [round(total, 3)],
            "images_per_min": 60_000.0 * int(request.get("batch", 1)) / total,
            "timed": "from outside: from the first text encoding to the last image saved, without load",
        },
        memory={"overall": memory.gigabytes()},
        # What the node could not know of its own total is known here: it was timed from outside.
        warnings=(*(text for text in info.get("warnings", ()) if "from text to image" not in text), SAMPLED),
    )

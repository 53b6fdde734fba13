"""What a server's process holds while it is soaked, and how much of it may grow.

The whole soak: demo models, a server for all prompts, and a fresh one for the prompts that are run again.

A soak: many random prompts on one server, which may not grow by it, each with a result or a message to read.

Some of them are run again in a fresh process afterwards and have to give the same bits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from speedlab.techniques.compile.backends import NAMES

from ..client.client import ComfyClient
from ..client.errors import BenchError, ExecutionFailed, PromptRejected, ServerGone
from ..client.files import demo_checkpoint, demo_lora, demo_tiny_vae, demo_vae
from ..client.graph import ApiGraph
from .server import TIMEOUT_S, node, stressed_server
from .soak_graph import Kit, SoakPrompt, SoakPrompts

Measures = Mapping[str, float]
# How many readings are put together at either end.
_TOGETHER = 3


@dataclass(frozen=True)
class Bound:
    """What may grow: so much at once, and so much more with each prompt."""

    once: float
    each: float = 0.0

    def after(self, prompts: int) -> float:
        """The most that may be added by so many prompts."""
        return self.once + self.each * prompts


BOUNDS: Mapping[str, Bound] = {
    "rss_mb": Bound(150.0, 0.05),  # oneDNN keeps its last 1,024 kernels, one for each size that it met
    "open_files": Bound(2),
    "threads": Bound(4),
    "python_threads": Bound(0),
    "device_mb": Bound(16.0),
    "dynamo_graphs": Bound(64),
    "compiled_networks": Bound(2),
    "modules": Bound(0),
    "tensors": Bound(64),
    "objects": Bound(20_000, 2.0),
}


@dataclass(frozen=True)
class Growth:
    """One thing that was counted: after the warm-up, at the end, and what may lie between."""

    what: str
    start: float
    end: float
    bound: float

    @property
    def broken(self) -> bool:
        return self.end - self.start > self.bound

    def __str__(self) -> str:
        return f"{self.what} grew from {self.start:.0f} to {self.end:.0f}, by more than {self.bound:.0f}"


async def read(client: ComfyClient) -> Measures:
    """What the process holds once the server has released models, results and history."""
    await client.forget()
    await client.free()
    # A prompt that is queued before the server sees the request runs first: one that does nothing.
    await client.run({"1": node("SpeedLabStressDigest")}, timeout_s=TIMEOUT_S)
    result = await client.run({"1": node("SpeedLabStressMeasures")}, timeout_s=TIMEOUT_S)
    measures: dict[str, float] = json.loads(result.outputs["1"]["text"][0])
    return measures


def growths(readings: Sequence[Measures], prompts: int) -> list[Growth]:
    """What grew between the first readings and the last ones, in `prompts` prompts."""
    together = min(_TOGETHER, len(readings) // 2)
    return [
        Growth(
            what,
            median(reading[what] for reading in readings[:together]),
            median(reading[what] for reading in readings[-together:]),
            bound.after(prompts),
        )
        for what, bound in BOUNDS.items()
    ]


# The SDXL family's demo models take 4 GB on the disk and 8 GB of memory, and every backend of Compile Model up to a
# minute for its first program: a short soak leaves them out.
LARGE_FROM = 200


def run_soak(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> SoakTally:
    """Soak a server with `count` prompts, reported as they run. Raises SpeedLabError where there is no server."""
    kit, models = demo_kit(large=count >= LARGE_FROM)
    with stressed_server(folder / "soaked", models) as server:
        tally = soak(server.url, kit, count, seed, say)
    with stressed_server(folder / "fresh", models) as server:
        repeat(server.url, kit, sample(tally, seed), seed, tally)
    return tally


def demo_kit(large: bool) -> tuple[Kit, Mapping[str, Sequence[Path]]]:
    """What the prompts may use, and its files by the folder that they belong to; made where they are not there yet."""
    sd15 = demo_checkpoint("sd15")
    sdxl = [demo_checkpoint("sdxl"), demo_checkpoint("refiner")] if large else []
    loras = [demo_lora("sd15", "lora"), demo_lora("sd15", "lora_2")]
    vae = demo_vae("speedlab_demo_vae.safetensors")
    tiny = [*demo_tiny_vae("sd15"), *(demo_tiny_vae("sdxl") if large else ())]
    names = Kit(
        sd15.name,
        loras=[path.name for path in loras],
        vaes=[vae.name, "taesd"],
        tiny=["taesd", *(["taesdxl"] if large else [])],
        sdxl=sdxl[0].name if large else "",
        refiner=sdxl[1].name if large else "",
        **({"backends": NAMES} if large else {}),
    )
    return names, {"checkpoints": [sd15, *sdxl], "loras": loras, "vae": [vae], "vae_approx": tiny}


LEAST_PROMPTS = 20
WARM_UP_SHARE, LEAST_WARM_UP = 0.2, 8
REPEATED_SHARE, LEAST_REPEATED = 0.03, 3
MOST_READINGS, LEAST_READINGS, _PROMPTS_A_READING = 20, 4, 6
_REPORTED_EVERY = 100


@dataclass
class SoakTally:
    """What a soak did. `digests`: prompt number -> its result's digest, for prompts that may be run again."""

    prompts: int = 0
    fine: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed_in_core: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    nodes: Counter[str] = field(default_factory=Counter)
    readings: list[Measures] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    repeated: int = 0
    unequal: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def broken(self) -> list[str]:
        """Everything that should not have been."""
        return [*self.unreadable, *(str(growth) for growth in self.growths if growth.broken), *self.unequal]


def soak(url: str, kit: Kit, count: int, seed: int, say: Callable[[str], None]) -> SoakTally:
    """Run `count` prompts on the server at `url`, which has the probe. Raises ServerGone where it dies of one."""
    return asyncio.run(_soak(url, kit, count, seed, say))


async def _soak(url: str, kit: Kit, count: int, seed: int, say: Callable[[str], None]) -> SoakTally:
    tally, started = SoakTally(), time.perf_counter()
    warm_up = min(max(LEAST_WARM_UP, int(count * WARM_UP_SHARE)), count)
    readings = min(max(count // _PROMPTS_A_READING, LEAST_READINGS), MOST_READINGS)
    marks = {round(warm_up + (count - warm_up) * part / (readings - 1)) for part in range(readings)}
    async with ComfyClient(url) as client:
        prompts = SoakPrompts(await client.object_info(), kit, seed)
        for graph in prompts.first():
            with contextlib.suppress(ExecutionFailed):  # a backend that cannot run here
                await client.run(graph, timeout_s=TIMEOUT_S)
        for number in range(count):
            if number in marks:
                tally.readings.append(await read(client))
            await _run(client, prompts, number, tally, say)
            if tally.prompts % _REPORTED_EVERY == 0:
                say(f"    {tally.prompts} prompts, {tally.prompts - tally.fine} refused")
        tally.readings.append(await read(client))
    tally.growths = growths(tally.readings, count - warm_up)
    tally.seconds = time.perf_counter() - started
    return tally


async def _run(
    client: ComfyClient, prompts: SoakPrompts, number: int, tally: SoakTally, say: Callable[[str], None]
) -> None:
    prompt = prompts.prompt(number)
    tally.prompts += 1
    tally.nodes.update(name for name in prompt.classes if name.startswith("SpeedLab"))
    try:
        digest = await _digest(client, prompt)
    except ServerGone:
        say(f"    prompt {prompt.number} ended the server")
        raise
    except (ExecutionFailed, PromptRejected) as error:
        if is_readable(error):
            tally.refused[_reason(error)] += 1
        elif await _fails_in_core(client, prompts.stock_twin(prompt), error):
            tally.failed_in_core[_reason(error)] += 1
        else:
            tally.unreadable.append(f"prompt {prompt.number}: {_reason(error)}")
            say(f"    {tally.unreadable[-1]}"[:400])
    except BenchError as error:
        tally.unreadable.append(f"prompt {prompt.number}: {error}")
    else:
        tally.fine += 1
        if prompt.repeatable:
            tally.digests[prompt.number] = digest


async def _digest(client: ComfyClient, prompt: SoakPrompt) -> str:
    result = await client.run(prompt.graph, timeout_s=TIMEOUT_S)
    (node,) = (number for number, n in prompt.graph.items() if n["class_type"] == "SpeedLabStressDigest")
    return "\n".join(result.outputs[node]["text"])


def is_readable(error: BenchError) -> bool:
    """Whether a prompt ended with a message that was written for its user: one of this pack's, or lack of memory."""
    if isinstance(error, PromptRejected):
        return True
    if not isinstance(error, ExecutionFailed) or not error.reason.strip() or "Traceback" in error.reason:
        return False
    return ".speedlab." in error.kind or "OutOfMemory" in error.kind


async def _fails_in_core(client: ComfyClient, twin: ApiGraph | None, error: BenchError) -> bool:
    """Whether core's own sampler says the very same of these settings without anything of this pack on the model."""
    if twin is None or not isinstance(error, ExecutionFailed):
        return False
    try:
        await client.run(twin, timeout_s=TIMEOUT_S)
    except ExecutionFailed as other:
        return (other.kind, other.reason) == (error.kind, error.reason)
    return False


def _reason(error: BenchError) -> str:
    if not isinstance(error, ExecutionFailed):
        return str(error).splitlines()[0]
    return (
        f"{error.class_type}: {error.kind.rpartition('.')[2]}: {error.reason.splitlines()[0] if error.reason else ''}"
    )


def sample(tally: SoakTally, seed: int) -> list[int]:
    """The numbers of the prompts that are to be run again."""
    wanted = max(LEAST_REPEATED, int(tally.prompts * REPEATED_SHARE))
    return Random(seed).sample(sorted(tally.digests), min(wanted, len(tally.digests)))


def repeat(url: str, kit: Kit, numbers: Sequence[int], seed: int, tally: SoakTally) -> None:
    """Run the prompts `numbers` once more on a fresh server and compare; the outcome goes into `tally`."""
    asyncio.run(_repeat(url, kit, numbers, seed, tally))


async def _repeat(url: str, kit: Kit, numbers: Sequence[int], seed: int, tally: SoakTally) -> None:
    async with ComfyClient(url) as client:
        prompts = SoakPrompts(await client.object_info(), kit, seed)
        for prompt in sorted(map(prompts.prompt, numbers), key=lambda prompt: prompt.loads):
            tally.repeated += 1
            try:
                digest = await _digest(client, prompt)
            except BenchError as error:
                tally.unequal.append(f"prompt {prompt.number} fails in a fresh process: {_reason(error)}")
                continue
            if digest != tally.digests[prompt.number]:
                tally.unequal.append(f"prompt {prompt.number} gives another result in a fresh process")

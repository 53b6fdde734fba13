"""A server to be stressed: on the CPU, with a probe in its process, and nothing but the models that are given.

A stock KSampler on the model that stressed prompts ran on has to give the same latents bit for bit, and the probe has
to see the same wrappers, hooks, torch flags, threads and objects as before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speedlab.measure.store import RunStore
from speedlab.web.library import RunLibrary

from ..client.client import ComfyClient, ImageRef, RunResult
from ..client.files import link_model
from ..host.base import from_environment, pack_root
from ..host.server import ComfyServer

PROBE = Path(__file__).with_name("probe")
TIMEOUT_S = 300.0
STEPS = 8


def bring_probe(base: Path) -> None:
    """Put the probe among a server's custom nodes, before it starts."""
    shutil.copytree(PROBE, base / "custom_nodes" / "speedlab_stress_probe", dirs_exist_ok=True)


@contextmanager
def stressed_server(
    base: Path, models: Mapping[str, Sequence[Path]], output: Path | None = None
) -> Iterator[ComfyServer]:
    """`models`: folder below `models/` -> files. Raises ServerError."""
    for kind, files in models.items():
        for file in files:
            link_model(file, base / "models" / kind)
    bring_probe(base)
    with ComfyServer(from_environment(), pack=pack_root(), base=base, output=output, cpu=True) as server:
        yield server


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
            lines.append(f"after {faults} faults the {what} differ{shown}")
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
        "5": node("SpeedLabProfileSampler", model=["13", 0], seed=seed, steps=STEPS, cfg=5.0, sampler_name="euler",
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

"""Memory Plan: the predicted peak of each phase against the measured one.

    COMFYUI_PATH=... python benchmarks/memory_plan.py [--minutes 9] [--checkpoint FILE --family NAME]

Every plan runs in a process of its own: load, encode, sample two steps, decode. On a GPU the peak is the allocator's,
against what `plan` says. On a CPU it is the resident set over what there was before loading, and all weights lie in
there whatever the plan, so that the prediction is: weights of all parts, two layers where weights are streamed, and the
phase's activations. Without a checkpoint the demo ones are used. Attention is SDPA. Free memory of the C library is
given back between phases. Rows that the file has are kept, so a run that was cut off goes on where it stopped. Target:
within 10 %.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import inprocess

COLUMNS = ("offload", "checkpoint", "width", "height", "batch", "phase", "predicted_gb", "measured_gb", "error_percent",
           "measured_as", "device", "torch", "comfyui", "date")  # fmt: skip
OFFLOADS = ("none", "model", "sequential")
JOBS = [(family, side, batch) for family, side, batch in
        (("sd15", 256, 1), ("sd15", 512, 1), ("vega", 512, 1), ("sd15", 256, 4), ("vega", 768, 1),
         ("vega", 1024, 1))]  # fmt: skip


def main() -> None:
    """Measure what is missing, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint file in place of the demo ones")
    parser.add_argument("--only", nargs="*", default=[], help="side lengths to run")
    parser.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    parser.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    parser.add_argument("--row", nargs=4)
    args = parser.parse_args()
    if args.row:
        family, offload, side, batch = args.row
        print(json.dumps(measure(args, family, offload, int(side), int(batch))))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    for family, side, batch in JOBS:
        for offload in OFFLOADS:
            if (args.only and str(side) not in args.only) or time.monotonic() > end:
                continue
            run(args, family, offload, side, batch)


def run(args: argparse.Namespace, family: str, offload: str, side: int, batch: int) -> None:
    """One process; its rows are appended, unless they are there."""
    name = args.checkpoint.name if args.checkpoint else f"speedlab_demo_{family}"
    for file in args.results.glob("*_memory-plan.csv"):
        with file.open(newline="", encoding="utf-8") as text:
            if any((row["offload"], row["checkpoint"], row["width"], row["batch"])
                   == (offload, name, str(side), str(batch)) for row in csv.DictReader(text)):  # fmt: skip
                return
    command = [sys.executable, __file__, "--base", str(args.base), "--row", family, offload, str(side), str(batch)]
    if args.checkpoint:
        command += ["--checkpoint", str(args.checkpoint)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode != 0:
        print(f"{name} {offload} {side}: failed\n{out.stderr[-2000:]}", file=sys.stderr)
        return
    rows = json.loads(out.stdout.strip().splitlines()[-1])
    path = args.results / inprocess.result_name("memory-plan", rows[0]["device"], rows[0]["torch"], rows[0]["date"])
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            print(f"{name} {offload} {side} x{batch} {row['phase']}: predicted {row['predicted_gb']} GB, measured "
                  f"{row['measured_gb']} GB, {row['error_percent']} %", flush=True)  # fmt: skip


def measure(args: argparse.Namespace, family: str, offload: str, side: int, batch: int) -> list[dict[str, Any]]:
    """Predicted and measured bytes of every phase of one plan, in this process."""
    import importlib

    pack = inprocess.start(args.base)
    engine = lambda name: importlib.import_module(f"speedlab.{name}")  # noqa: E731
    import torch

    memory, environment = engine("measure.peaks"), engine("measure.environment")
    name = checkpoint(args, family)
    nodes = pack.NODE_CLASS_MAPPINGS
    with torch.inference_mode():
        warm_up(nodes, name)  # libraries and what they keep are none of a plan's
    trim()
    before = memory.rss_bytes()
    latent = {"samples": torch.zeros(batch, 4, side // 8, side // 8)}
    peaks: dict[str, Any] = {}
    with torch.inference_mode():
        model, clip, vae, _ = nodes["SpeedLabCheckpointLoader"]().load(name, "auto", "contiguous")
        plans, activations = engine("memory.predict"), engine("memory.predict")
        parts = plans.parts_of(model, clip, vae, activations.ImageSize(side, side, batch))
        model, clip, vae, _ = nodes["SpeedLabMemoryPlan"]().plan(model, offload, 0.0, clip, vae, latent)["result"]
        (model,) = nodes["SpeedLabAttention"]().apply(model, "sdpa")
        device = model.load_device
        trim()
        with memory.measure_peak(device) as reading:
            conds = [nodes["SpeedLabTextEncode"]().encode(clip, words)[0] for words in ("a lighthouse", "blurry")]
        peaks["text encoding"] = reading
        trim()
        with memory.measure_peak(device) as reading:
            (out,) = (
                importlib.import_module("nodes")
                .KSampler()
                .sample(model, 1, 2, 5.0, "euler", "normal", conds[0], conds[1], latent)
            )
        peaks["sampling"] = reading
        trim()
        with memory.measure_peak(device) as reading:
            vae.decode(out["samples"])
        peaks["decoding"] = reading
    env = environment.environment(device)
    rows = []
    for part, phase in zip(parts, plans.predict(parts, offload).phases, strict=True):
        if device.type == "cpu":
            streamed = part.streamed if offload == "sequential" else 0
            predicted = sum(one.weights for one in parts) + streamed + part.activations
            measured = peaks[phase.name].peak.rss - before
        else:
            predicted, measured = phase.total, peaks[phase.name].peak.allocated
        rows.append({
            "offload": offload, "checkpoint": args.checkpoint.name if args.checkpoint else f"speedlab_demo_{family}",
            "width": side, "height": side, "batch": batch, "phase": phase.name,
            "predicted_gb": round(predicted / 1e9, 3), "measured_gb": round(measured / 1e9, 3),
            "error_percent": round(100 * (predicted - measured) / measured, 1),
            "measured_as": "rss over the process before loading" if device.type == "cpu" else "peak allocated",
            "device": env.get("cpu") if device.type == "cpu" else env.get("device"), "torch": torch.__version__,
            "comfyui": env.get("comfyui"), "date": time.strftime("%Y-%m-%d"),
        })  # fmt: skip
    return rows


def warm_up(nodes: Any, name: str) -> None:
    """A whole small image, so that every library and kernel is in memory; its models are released afterwards."""
    import importlib

    import comfy.model_management
    import torch

    model, clip, vae, _ = nodes["SpeedLabCheckpointLoader"]().load(name, "auto", "contiguous")
    (model,) = nodes["SpeedLabAttention"]().apply(model, "sdpa")
    (cond,) = nodes["SpeedLabTextEncode"]().encode(clip, "a tree")
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    core = importlib.import_module("nodes")
    (out,) = core.KSampler().sample(model, 1, 1, 5.0, "euler", "normal", cond, cond, latent)
    vae.decode(out["samples"])
    comfy.model_management.unload_all_models()


def trim() -> None:
    """Give back what is free: the C library keeps it, and the resident set of the next phase would count it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def checkpoint(args: argparse.Namespace, family: str) -> str:
    """The name of the checkpoint in ComfyUI's folder; a demo one is written on first use."""
    from speedlab_tools import synthetic

    folder = args.base / "models" / "checkpoints"
    if args.checkpoint:
        link = folder / args.checkpoint.name
        if not link.exists():
            link.symlink_to(args.checkpoint.resolve())
        return str(link.name)
    name = f"speedlab_demo_{family}.safetensors"
    # In a process of its own would be cleaner; the file is written once and kept.
    synthetic.write_checkpoint(folder / name, synthetic.CheckpointSpec(family=family, size="small"))
    return name


if __name__ == "__main__":
    main()

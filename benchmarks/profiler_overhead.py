"""What Profile Sampler costs: KSampler and Profile Sampler in turn on one model and seed, as paired ratios.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/profiler_overhead.py

Each pair runs both nodes, in alternating order so that drift cancels. The ratio of a pair is the wall time of the
whole Profile Sampler node, its record on disk included, over KSampler's. Target: a median under 1.01. Beside it stands
how far the sum of the step times is from the sampler's wall time (target: within 2 %).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import inprocess

CHECKPOINT = "speedlab_demo_sd15.safetensors"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", type=int, default=20)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    args = options.parse_args()
    pack = inprocess.start(args.base)
    import torch

    with torch.inference_mode():
        rows = measure(pack, args)
    write(rows, args)


def measure(pack: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    import importlib

    import torch

    from speedlab.plans.in_turn import turned
    from speedlab_tools import synthetic

    spec = synthetic.CheckpointSpec(family="sd15", size="small")
    synthetic.write_checkpoint(args.base / "models" / "checkpoints" / CHECKPOINT, spec)
    nodes = pack.NODE_CLASS_MAPPINGS
    model, clip, _, _ = nodes["SpeedLabCheckpointLoader"]().load(CHECKPOINT, "auto", "contiguous")
    positive, negative = (nodes["SpeedLabTextEncode"]().encode(clip, text)[0] for text in ("a tree", ""))
    latent = {"samples": torch.zeros(1, 4, args.size // 8, args.size // 8)}
    settings = {"model": model, "seed": 1, "steps": args.steps, "cfg": 8.0, "sampler_name": "euler",
                "scheduler": "normal", "positive": positive, "negative": negative, "latent_image": latent}  # fmt: skip
    stock, ours = importlib.import_module("nodes").KSampler(), nodes["SpeedLabProfileSampler"]()
    prompt = {"5": {"class_type": "SpeedLabProfileSampler", "inputs": {}}}

    def run_stock() -> float:
        start = time.perf_counter()
        stock.sample(**settings)
        return time.perf_counter() - start

    def run_ours() -> tuple[float, float]:
        start = time.perf_counter()
        record = ours.sample(**settings, prompt=prompt, unique_id="5")["result"][1]
        wall = time.perf_counter() - start
        steps = sum(s["cpu_ms"] if s["gpu_ms"] is None else s["gpu_ms"] for s in record.steps)
        return wall, steps / 1000.0

    run_stock(), run_ours()
    rows = []
    for pair in range(args.pairs):
        made: dict[Any, Any] = {run: run() for run in turned((run_stock, run_ours), pair)}
        plain, (profiled, steps) = made[run_stock], made[run_ours]
        rows.append({"pair": pair, "ksampler_s": plain, "profile_sampler_s": profiled, "steps_sum_s": steps,
                     "ratio": profiled / plain, "steps_over_wall": steps / profiled})  # fmt: skip
        print(f"pair {pair + 1:>2} of {args.pairs}: {plain:.3f} s, {profiled:.3f} s, ratio {profiled / plain:.4f}")
    return rows


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    import torch

    from speedlab.measure.environment import device_name

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    name = inprocess.result_name("profiler-overhead", device_name(device), torch.__version__, time.strftime("%Y-%m-%d"))
    facts = {"size": args.size, "steps": args.steps, "device": device_name(device), "torch": torch.__version__}
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(
            {**{k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()}, **facts} for r in rows
        )
    ratios = [row["ratio"] for row in rows]
    print(
        f"Profile Sampler over KSampler: median {statistics.median(ratios):.4f} of {len(rows)} pairs "
        f"(min {min(ratios):.4f}, max {max(ratios):.4f}); step sum over node wall "
        f"{statistics.median(row['steps_over_wall'] for row in rows):.4f}; written to {args.results / name}"
    )


if __name__ == "__main__":
    main()

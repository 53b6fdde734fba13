"""Whether the details `kernels` and `trace` change what Profile Sampler times, and what they cost beside it.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/profiler_detail.py

Every round runs Profile Sampler with each detail on one model and seed, the first one changing from round to round so
that drift cancels. A step's time is sampling time over steps. A detail's ratio is its step time over that of `timing`
in the same round: it must be 1 within the noise that `timing` has from round to round. `extra_s` is the node's wall
time less its measured sampling.
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
DETAILS = ("timing", "kernels", "trace")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=10)
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
    import torch

    from speedlab.plans.in_turn import turned
    from speedlab_tools import synthetic

    spec = synthetic.CheckpointSpec(family="sd15", size="small")
    synthetic.write_checkpoint(args.base / "models" / "checkpoints" / CHECKPOINT, spec)
    nodes = pack.NODE_CLASS_MAPPINGS
    model, clip, _, _ = nodes["SpeedLabCheckpointLoader"]().load(CHECKPOINT, "auto", "contiguous")
    positive, negative = (nodes["SpeedLabTextEncode"]().encode(clip, text)[0] for text in ("a tree", ""))
    sampler = nodes["SpeedLabProfileSampler"]()
    settings = {"model": model, "seed": 1, "steps": args.steps, "cfg": 8.0, "sampler_name": "euler",
                "scheduler": "normal", "positive": positive, "negative": negative,
                "latent_image": {"samples": torch.zeros(1, 4, args.size // 8, args.size // 8)}}  # fmt: skip
    prompt = {"5": {"class_type": "SpeedLabProfileSampler", "inputs": {}}}

    def run(detail: str) -> dict[str, Any]:
        start = time.perf_counter()
        latent, record = sampler.sample(**settings, detail=detail, prompt=prompt, unique_id="5")["result"][:2]
        wall = time.perf_counter() - start
        sampling = record.phases_ms["sample"] / 1000.0
        return {"detail": detail, "step_ms": record.summary["step_time_ms"], "sample_s": sampling,
                "extra_s": wall - sampling, "latent": latent["samples"]}  # fmt: skip

    reference = run("timing").pop("latent")
    rows = []
    for index in range(args.rounds):
        for detail in turned(DETAILS, index):
            row = run(detail)
            if not torch.equal(row.pop("latent"), reference):
                sys.exit(f"detail {detail} made another latent")
            rows.append({"round": index, **row})
        print(f"round {index + 1} of {args.rounds}")
    timing = {row["round"]: row["step_ms"] for row in rows if row["detail"] == "timing"}
    return [{**row, "step_ratio": row["step_ms"] / timing[row["round"]]} for row in rows]


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    import torch

    from speedlab.measure.environment import device_name

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    name = inprocess.result_name("profiler-detail", device_name(device), torch.__version__, time.strftime("%Y-%m-%d"))
    facts = {"size": args.size, "steps": args.steps, "device": device_name(device), "torch": torch.__version__}
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(
            {**{k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()}, **facts} for r in rows
        )
    for detail in DETAILS:
        mine = [row for row in rows if row["detail"] == detail]
        ratios = [row["step_ratio"] for row in mine]
        print(
            f"{detail:<8} a step {statistics.median(row['step_ms'] for row in mine):.2f} ms, over timing "
            f"{statistics.median(ratios):.4f} (min {min(ratios):.4f}, max {max(ratios):.4f}), "
            f"{statistics.median(row['extra_s'] for row in mine):.2f} s beside the measured sampling"
        )
    print(f"written to {args.results / name}")


if __name__ == "__main__":
    main()

"""Whether the details `kernels` and `trace` change what Profile Sampler times, and what they cost beside it.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/profiler_detail.py

Every round runs Profile Sampler with each detail on one model and seed, the first one changing from round to round so
that drift cancels. A step's time is sampling time over steps. A detail's ratio is its step time over that of `timing`
in the same round: it must be 1 within the noise that `timing` has from round to round. `extra_s` is the node's wall
time less its measured sampling.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from profiler_runs import AS_NODE, Rows, measured

DETAILS = ("timing", "kernels", "trace")


def measure(nodes: Any, settings: dict[str, Any], rounds: int) -> Rows:
    """Profile Sampler with each detail in turn."""
    import torch

    from speedlab.plans.in_turn import turned

    sampler = nodes["SpeedLabProfileSampler"]()

    def run(detail: str) -> dict[str, Any]:
        start = time.perf_counter()
        latent, record = sampler.sample(**settings, detail=detail, **AS_NODE)["result"][:2]
        wall = time.perf_counter() - start
        sampling = record.phases_ms["sample"] / 1000.0
        return {"detail": detail, "step_ms": record.summary["step_time_ms"], "sample_s": sampling,
                "extra_s": wall - sampling, "latent": latent["samples"]}  # fmt: skip

    reference = run("timing").pop("latent")
    rows = []
    for index in range(rounds):
        for detail in turned(DETAILS, index):
            row = run(detail)
            if not torch.equal(row.pop("latent"), reference):
                sys.exit(f"detail {detail} made another latent")
            rows.append({"round": index, **row})
        print(f"round {index + 1} of {rounds}")
    timing = {row["round"]: row["step_ms"] for row in rows if row["detail"] == "timing"}
    return [{**row, "step_ratio": row["step_ms"] / timing[row["round"]]} for row in rows]


def main() -> None:
    rows, path = measured(str(__doc__), ("rounds", 10), "profiler-detail", measure)
    for detail in DETAILS:
        mine = [row for row in rows if row["detail"] == detail]
        ratios = [row["step_ratio"] for row in mine]
        print(
            f"{detail:<8} a step {statistics.median(row['step_ms'] for row in mine):.2f} ms, over timing "
            f"{statistics.median(ratios):.4f} (min {min(ratios):.4f}, max {max(ratios):.4f}), "
            f"{statistics.median(row['extra_s'] for row in mine):.2f} s beside the measured sampling"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()

"""What Profile Sampler costs: KSampler and Profile Sampler in turn on one model and seed, as paired ratios.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/profiler_overhead.py

Each pair runs both nodes, in alternating order so that drift cancels. The ratio of a pair is the wall time of the
whole Profile Sampler node, its record on disk included, over KSampler's. Target: a median under 1.01. Beside it stands
how far the sum of the step times is from the sampler's wall time (target: within 2 %).
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from profiler_runs import AS_NODE, Rows, measured


def measure(nodes: Any, settings: dict[str, Any], pairs: int) -> Rows:
    """KSampler and Profile Sampler in turn."""
    from speedlab.plans.in_turn import turned

    stock, ours = importlib.import_module("nodes").KSampler(), nodes["SpeedLabProfileSampler"]()

    def run_stock() -> float:
        start = time.perf_counter()
        stock.sample(**settings)
        return time.perf_counter() - start

    def run_ours() -> tuple[float, float]:
        start = time.perf_counter()
        record = ours.sample(**settings, **AS_NODE)["result"][1]
        wall = time.perf_counter() - start
        steps = sum(s["cpu_ms"] if s["gpu_ms"] is None else s["gpu_ms"] for s in record.steps)
        return wall, steps / 1000.0

    run_stock(), run_ours()
    rows = []
    for pair in range(pairs):
        made: dict[Any, Any] = {run: run() for run in turned((run_stock, run_ours), pair)}
        plain, (profiled, steps) = made[run_stock], made[run_ours]
        rows.append({"pair": pair, "ksampler_s": plain, "profile_sampler_s": profiled, "steps_sum_s": steps,
                     "ratio": profiled / plain, "steps_over_wall": steps / profiled})  # fmt: skip
        print(f"pair {pair + 1:>2} of {pairs}: {plain:.3f} s, {profiled:.3f} s, ratio {profiled / plain:.4f}")
    return rows


def main() -> None:
    rows, path = measured(str(__doc__), ("pairs", 20), "profiler-overhead", measure)
    ratios = [row["ratio"] for row in rows]
    print(
        f"Profile Sampler over KSampler: median {statistics.median(ratios):.4f} of {len(rows)} pairs "
        f"(min {min(ratios):.4f}, max {max(ratios):.4f}); step sum over node wall "
        f"{statistics.median(row['steps_over_wall'] for row in rows):.4f}; written to {path}"
    )


if __name__ == "__main__":
    main()

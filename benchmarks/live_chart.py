"""What the live chart costs: Profile Sampler on a real server with a listening browser's socket and without, in turn.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/live_chart.py

Each pair runs the same graph and seed with the chart off and on, in alternating order so that drift cancels. The ratio
is that of the sampling times in the two records. Target: a median under 1.01.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent)]
COLUMNS = ["pair", "first", "off_ms", "on_ms", "ratio", "steps", "size", "device", "torch", "date"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=20)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = options.parse_args()
    from speedlab_tools.client.files import ServerOptions, demo_checkpoint, open_server

    checkpoint = demo_checkpoint("sd15")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        with open_server(ServerOptions(None, None, out), {"checkpoints": [checkpoint]}) as target:
            write(asyncio.run(measure(target.url, checkpoint.name, out, args)), args.results)


async def measure(url: str, checkpoint: str, out: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    from speedlab.measure.store import RunStore
    from speedlab_tools.bench.results import Outcome, fetch_records
    from speedlab_tools.bench.runner import parts_of
    from speedlab_tools.client.client import ComfyClient
    from speedlab_tools.scenarios.catalog import find
    from speedlab_tools.scenarios.overrides import Overrides, adapt

    scenario = find("txt2img-default")
    scenario = replace(scenario, settings=replace(scenario.settings, warmup=0))
    wanted = adapt(scenario, Overrides(width=args.size, height=args.size, steps=args.steps), checkpoint)
    ((_, graph),) = parts_of(wanted)
    store, rows = RunStore(out), []
    async with ComfyClient(url) as client:

        async def run(chart: bool) -> Any:
            body = {"client_id": client.client_id, "on": chart}
            async with client.session.post(f"{url}/speedlab/live", json=body) as answer:
                answer.raise_for_status()
            outcome = Outcome("live")
            await fetch_records(client, await client.run(graph), out, outcome)
            return store.read(outcome.records[-1].stem)

        for chart in (False, True):  # loads the model and warms up
            await run(chart)
        for pair in range(args.pairs):
            order = (False, True) if pair % 2 == 0 else (True, False)
            made = {chart: await run(chart) for chart in order}
            off, on = (float(made[chart].summary["run"]["median"]) for chart in (False, True))
            env = made[True].env
            rows.append({"pair": pair + 1, "first": "on" if order[0] else "off", "off_ms": f"{off:.3f}",
                         "on_ms": f"{on:.3f}", "ratio": f"{on / off:.5f}", "steps": args.steps, "size": args.size,
                         "device": env["device"], "torch": env["torch"],
                         "date": time.strftime("%Y-%m-%d")})  # fmt: skip
            print(f"pair {pair + 1}: {off:.1f} ms without, {on:.1f} ms with, {on / off:.4f}", flush=True)
    return rows


def write(rows: list[dict[str, Any]], results: Path) -> None:
    from speedlab.measure.environment import result_stem

    device, torch = rows[0]["device"], rows[0]["torch"]
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{result_stem(device, torch)}{rows[0]['date']}_live-chart.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    ratios = [float(row["ratio"]) for row in rows]
    middle = statistics.median(ratios)
    print(f"median {middle:.4f} (min {min(ratios):.4f}, max {max(ratios):.4f}) of {len(ratios)} pairs")
    print(path)


if __name__ == "__main__":
    main()

"""What a fleet gives and costs: prompts a minute with 1 and 2 workers, and the overhead a prompt, on a local cluster.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/fleet.py --cpu --threads 1

with ComfyUI's Python runs the same prompts on one server without Ray, then on fleets, and writes one CSV to --results.
Rates count what was made after every worker had made its first picture, which loads the models. The overhead is the
time from hand-out to kept result less what ComfyUI took: Ray's messages, fetching and writing the picture. Where
workers share a CPU, give each the same --threads in every variant, or the variants differ by more than the fleet.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from speedlab.plans.in_turn import turned  # noqa: E402
from speedlab_tools.bench.results import report_ids, shown_images  # noqa: E402
from speedlab_tools.client.client import ComfyClient  # noqa: E402
from speedlab_tools.client.files import demo_checkpoint, link_model  # noqa: E402
from speedlab_tools.fleet.tasks import prompt_work, read_prompts  # noqa: E402
from speedlab_tools.host import ComfyServer, from_environment, pack_root  # noqa: E402
from speedlab_tools.scenarios.catalog import find  # noqa: E402
from speedlab_tools.scenarios.overrides import Overrides, adapt  # noqa: E402

SCENARIO, SEED = "txt2img-default", 1
WORDS = ("lighthouse", "river", "cat", "mountain", "lamp", "forest", "bridge", "boat")
Result = dict[str, Any]


def main() -> None:
    args = arguments()
    comfyui = os.environ.get("COMFYUI_PATH")
    if comfyui is not None:
        os.environ.setdefault("SPEEDLAB_COMFYUI", comfyui)
        os.environ.setdefault("SPEEDLAB_PYTHON", sys.executable)
    checkpoint = Path(args.checkpoint) if args.checkpoint else demo_checkpoint("sd15")
    rows = []
    with tempfile.TemporaryDirectory(prefix="speedlab-bench-") as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(f"a {WORDS[n % len(WORDS)]}, number {n}" for n in range(args.prompts)))
        for turn in range(args.rounds):
            # No workers is one server without a fleet.
            for workers in turned([None, *args.workers], turn):
                if workers is None:
                    row = one_server(args, checkpoint, prompts, Path(folder) / f"server-{turn}")
                else:
                    row = one_fleet(args, checkpoint, prompts, Path(folder) / f"fleet-{turn}-{workers}", workers)
                rows.append({"round": turn, **row})
                print(text_of(rows[-1]), flush=True)
    print(f"written to {write(rows, args)}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoint", help="checkpoint file; a small demo without one")
    options.add_argument("--prompts", type=int, default=24, help="prompts of each variant")
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="sizes of the fleets")
    options.add_argument("--rounds", type=int, default=2, help="how often all variants run in turn")
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--threads", type=int, default=1, help="CPU threads of each worker and of the server")
    options.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return options.parse_args(argv)


def one_server(args: argparse.Namespace, checkpoint: Path, prompts: Path, base: Path) -> Result:
    """The prompts on one ComfyUI without Ray, one after another."""
    scenario = adapt(find(SCENARIO), Overrides(args.size, args.size, args.steps), checkpoint.name)
    work = prompt_work(scenario, read_prompts(prompts, seed=SEED, negative=None), models={})
    link_model(checkpoint, base / "models" / "checkpoints")
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    began = time.perf_counter()
    made: list[tuple[float, float]] = []

    async def run(url: str) -> None:
        async with ComfyClient(url) as client:
            for task in work.tasks:
                payload, start = work.build(task), time.perf_counter()
                result = await client.run(payload.graph, extra_data=payload.extra)
                seconds = time.perf_counter() - start
                for image in shown_images(result):
                    await client.view(image)
                assert report_ids(result)
                made.append((time.perf_counter(), seconds))

    cpu = True if args.cpu else None
    with ComfyServer(from_environment(), pack=pack_root(), base=base, cpu=cpu, env=environment) as server:
        asyncio.run(run(server.url))
    first = made[0][0]
    return {
        "variant": "one server", "workers": 1, "wall_s": time.perf_counter() - began,
        "prompts_per_min": 60.0 * (len(made) - 1) / (made[-1][0] - first),
        "comfyui_median_s": statistics.median(seconds for _, seconds in made[1:]),
        "overhead_median_ms": None, "overhead_max_ms": None,
    }  # fmt: skip


def one_fleet(args: argparse.Namespace, checkpoint: Path, prompts: Path, out: Path, workers: int) -> Result:
    """The prompts on a fleet, read from its manifest."""
    line = [
        sys.executable, "-m", "speedlab_tools", "fleet", SCENARIO, "--prompts", str(prompts), "--out", str(out),
        "--workers", str(workers), "--threads", str(args.threads), "--checkpoint", str(checkpoint),
        "--width", str(args.size), "--height", str(args.size), "--steps", str(args.steps),
        "--seed", str(SEED), "--negative", "",
        *(["--cpu"] if args.cpu else []),
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    wall_s = time.perf_counter() - began
    if done.returncode != 0:
        sys.exit(f"the fleet failed:\n{done.stdout}\n{done.stderr}")
    rows = [json.loads(row) for row in (out / "manifest.jsonl").read_text().splitlines()]
    ends = {row["index"]: datetime.fromisoformat(row["started"]).timestamp() + row["seconds"] for row in rows}
    firsts = {min((r for r in rows if r["worker"] == w), key=lambda r: ends[r["index"]])["index"]
              for w in {row["worker"] for row in rows}}  # fmt: skip
    warm = max(ends[index] for index in firsts)
    later = [row for row in rows if ends[row["index"]] > warm]
    overheads = [1000.0 * (row["seconds"] - row["comfyui_seconds"]) for row in rows if row["index"] not in firsts]
    return {
        "variant": "fleet", "workers": workers, "wall_s": wall_s,
        "prompts_per_min": 60.0 * len(later) / (max(ends.values()) - warm) if later else None,
        "comfyui_median_s": statistics.median(r["comfyui_seconds"] for r in rows if r["index"] not in firsts),
        "overhead_median_ms": statistics.median(overheads), "overhead_max_ms": max(overheads),
    }  # fmt: skip


def text_of(row: Result) -> str:
    """A result as a line."""
    overhead = row["overhead_median_ms"]
    rate = row["prompts_per_min"]
    speed = f"{rate:.1f} prompts a minute" if rate else "too few prompts"
    return (
        f"{row['variant']}, {row['workers']} workers: {speed}"
        + f", ComfyUI {row['comfyui_median_s']:.2f} s a prompt"
        + (f", overhead {overhead:.0f} ms a prompt" if overhead is not None else "")
        + f", {row['wall_s']:.0f} s in all"
    )  # fmt: skip


def write(rows: list[Result], args: argparse.Namespace) -> Path:
    """The CSV, named as the others are."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import inprocess

    from speedlab.measure.environment import device_name

    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    facts = {
        "prompts": args.prompts, "size": args.size, "steps": args.steps, "threads": args.threads,
        "cores": os.cpu_count(), "device": device_name(device), "torch": torch.__version__,
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    name = inprocess.result_name("fleet", device_name(device), torch.__version__, time.strftime("%Y-%m-%d"))
    path: Path = args.results / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(
            {**{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, **facts} for row in rows
        )
    return path


if __name__ == "__main__":
    main()

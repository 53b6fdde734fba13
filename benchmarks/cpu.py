"""What a CPU reaches: stock ComfyUI, this pack's plans and peers on the same weights, text to image, in one run.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/cpu.py --checkpoint sd15_fp32.safetensors

with ComfyUI's Python. Every plan runs through a real server, with stock beside it, by one Benchmark; so does core's
EasyCache. The diffusers peers have a process each: their UNet with the same weights, ComfyUI's text encoder and VAE,
and stock beside them. Each pair is a few rows of `..._cpu.csv`, written when it ends; a series that was cut off goes on
where it stopped. The CSV names the CPU. Random weights, as without --checkpoint, give real times and no picture.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import accelerate_jobs
import inprocess

from speedlab_tools.bench.models import ModelChoice, choose_models
from speedlab_tools.bench.results import Outcome, fetch_records
from speedlab_tools.bench.runner import parts_of
from speedlab_tools.client.client import ComfyClient
from speedlab_tools.client.errors import BenchError
from speedlab_tools.client.files import ServerOptions, Target, open_server, prepare_output
from speedlab_tools.scenarios.catalog import find
from speedlab_tools.scenarios.graphs import sweep
from speedlab_tools.scenarios.overrides import SIDE, STEPS, Overrides, adapt
from speedlab_tools.scenarios.scenario import Prompt, Scenario, Settings

STOCK = "stock"
_FAST = "deepcache(3)+dynamic_cfg(0.75)"
PLANS = {
    "exact": "attention(auto)+precision(linear=auto,memory=auto)",
    "openvino": "compile(openvino)",
    "onnxruntime": "compile(onnxruntime)",
    "openvino bf16": "weights(bf16)+compile(openvino)",
    "openvino int8": "compile(openvino,quantize=int8)",
    "openvino DeepCache 3": f"compile(openvino)+{_FAST}+tiny",
    "openvino int8 DeepCache 3": f"compile(openvino,quantize=int8)+{_FAST}+tiny",
    "openvino bf16 DeepCache 3": f"weights(bf16)+compile(openvino)+{_FAST}+tiny",
    "openvino bf16 DeepCache 5": "weights(bf16)+compile(openvino)+deepcache(5)+dynamic_cfg(0.75)+tiny",
    "openvino bf16 Forecast": "weights(bf16)+compile(openvino)+forecast+dynamic_cfg(0.75)+tiny",
}
EASY_CACHE = "ComfyUI EasyCache"
DIFFUSERS = {"diffusers": 1, "diffusers compiled": 1, "diffusers DeepCache 3": 3}
COLUMNS = ["pair", "job", "kind", "plan", "time_s", "over_stock", "first_s", "latent_error", "psnr", "ssim",
           "peak_rss_gb", "status", "width", "height", "steps", "cfg", "cpu", "threads", "torch", "date"]  # fmt: skip


def scenario(args: argparse.Namespace, values: str) -> Scenario:
    """A Benchmark over plans at the size asked for."""
    prompt = Prompt("cpu", accelerate_jobs.PROMPT, accelerate_jobs.SEED, accelerate_jobs.NEGATIVE)
    settings = Settings(
        prompts=(prompt,), width=args.size, height=args.size, steps=args.steps, cfg=accelerate_jobs.CFG,
        sampler=accelerate_jobs.SAMPLER, scheduler=accelerate_jobs.SCHEDULER, warmup=1, repeats=args.repeats,
    )  # fmt: skip
    return replace(find("xy-grid"), id="cpu", settings=settings, build=sweep("plan", values))


async def through_server(target: Target, name: str, choice: ModelChoice, args: argparse.Namespace) -> Outcome:
    """The rows of one server: stock and a plan in turn, or stock, and then stock behind core's EasyCache."""
    plans = f"*{STOCK}={STOCK}" if name == EASY_CACHE else f"*{STOCK}={STOCK}\n{name}={PLANS[name]}"
    wanted = adapt(scenario(args, plans), Overrides(), next(iter(choice.checkpoints.values())))
    ((_, graph),) = parts_of(wanted)
    graphs = [graph]
    if name == EASY_CACHE:
        graph = copy.deepcopy(graph)
        graphs.append(graph)
        bench = next(node["inputs"] for node in graph.values() if node["class_type"] == "SpeedLabBenchmark")
        graph["easy cache"] = {
            "class_type": "EasyCache",
            "inputs": {"model": bench["model"], "reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95,
                       "verbose": False},
        }  # fmt: skip
        bench["model"] = ["easy cache", 0]
    outcome = Outcome(name)
    async with ComfyClient(target.url) as client:
        try:
            for each in graphs:
                await fetch_records(client, await client.run(each), args.out, outcome)
        except BenchError as error:
            outcome.error = str(error)
    return outcome


def rows_of(pair: str, kind: str, outcome: Outcome) -> list[dict[str, Any]]:
    """What a server's rows say, in this table's words."""
    if outcome.error is not None:
        return [{"pair": pair, "job": pair, "kind": kind, "status": outcome.error}]
    stock = next((float(row["time_s"]) for row in outcome.rows if row["plan"] == STOCK and row["time_s"]), None)
    rows = []
    for place, (row, record) in enumerate(zip(outcome.rows, outcome.records, strict=True)):
        # With loading into memory and compiling: as long as a user waits for the first image.
        first = json.loads(record.read_text(encoding="utf-8"))["summary"].get("first_run_ms")
        seconds = float(row["time_s"]) if row["time_s"] else None
        job = STOCK if place == 0 else pair
        kept = {name: row[name] for name in ("psnr", "ssim", "peak_rss_gb", "status", "torch")}
        rows.append({
            **kept, "pair": pair, "job": job, "kind": STOCK if job == STOCK else kind, "plan": row["accelerators"],
            "time_s": seconds, "first_s": first and first / 1000.0, "cpu": row["device"],
            "over_stock": None if seconds is None or stock is None or job == STOCK else stock / seconds,
        })  # fmt: skip
    return rows


def peer(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A diffusers peer and stock in turn, in this process."""
    import torch

    if args.checkpoint:
        accelerate_jobs.CHECKPOINT = Path(args.checkpoint).name
    pack = inprocess.start(args.base)
    bench = accelerate_jobs.Bench(pack, args.base)
    unet = bench.diffusers_unet
    if name.endswith("compiled"):
        bench.__dict__["diffusers_unet"] = torch.compile(unet)
    jobs: dict[str, Callable[[], Any]] = {
        STOCK: lambda: bench.stock_picture(args.size, args.steps),
        name: lambda: bench.diffusers_picture(DIFFUSERS[name], args.size, args.steps),
    }
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    latents: dict[str, Any] = {}
    with torch.inference_mode():
        for _ in range(1 + args.repeats):
            for job, run in jobs.items():
                began = time.perf_counter()
                latents[job] = run()
                seconds[job].append(time.perf_counter() - began)
    error = float((latents[name] - latents[STOCK]).norm() / latents[STOCK].norm())
    medians = {job: statistics.median(times[1:]) for job, times in seconds.items()}
    return [
        {
            "pair": name, "job": job, "kind": STOCK if job == STOCK else "peer", "time_s": medians[job],
            "first_s": seconds[job][0], "over_stock": None if job == STOCK else medians[STOCK] / medians[job],
            "latent_error": None if job == STOCK else error, "status": "ok", "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        for job in jobs
    ]  # fmt: skip


def in_child(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A peer in a process of its own; one that fails is a row with the last line of what it said."""
    command = [sys.executable, __file__, "--peer", name, "--base", str(args.base), "--size", str(args.size),
               "--steps", str(args.steps), "--repeats", str(args.repeats)]  # fmt: skip
    command += ["--checkpoint", args.checkpoint] if args.checkpoint else []
    env = dict(os.environ) if args.threads is None else {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        return [{"pair": name, "job": name, "kind": "peer", "status": lines[-1] if lines else "no answer"}]
    rows: list[dict[str, Any]] = json.loads(lines[-1])
    return rows


class Table:
    """The CSV, which grows pair by pair."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def has(self, pair: str) -> bool:
        return any(row["pair"] == pair and row["status"] == "ok" for row in self.rows)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of one pair in the place of what stood there, written at once."""
        pair = rows[0]["pair"]
        self.rows = [row for row in self.rows if row["pair"] != pair]
        self.rows += [{**self.facts, **{k: v for k, v in row.items() if v is not None}} for row in rows]
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        for row in rows:
            print(f"{pair}: {row['job']} {row.get('time_s')} s, {row.get('over_stock')} times stock, {row['status']}")


def arguments() -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoint", help="SD 1.5 in fp32; a full-size one of random weights is made without")
    options.add_argument("--base", type=Path, default=Path("output/cpu"), help="folder for models and compiled code")
    options.add_argument("--out", type=Path, default=Path("output"), help="folder for the results")
    options.add_argument("--size", type=int, default=512)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--threads", type=int, help="for every process; else as `run.py serve` chooses")
    options.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these pairs alone")
    options.add_argument("--small", action="store_true", help="only try it out: a small model, size and few steps")
    options.add_argument("--peer", choices=list(DIFFUSERS), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.small:
        args.size, args.steps, args.repeats, args.base = SIDE, STEPS, 1, args.base / "small"
    args.base, args.server, args.port = args.base.absolute(), None, None
    return args


def main() -> int:
    """Run what the table lacks; 1 where something failed."""
    args = arguments()
    if args.peer:
        print(json.dumps(peer(args.peer, args)))
        return 0
    import torch

    from speedlab.measure.environment import cpu_name
    from speedlab_tools.host import threads

    if not args.checkpoint:
        accelerate_jobs.prepare(args.base, args.small)
        args.checkpoint = str(args.base / "models" / "checkpoints" / accelerate_jobs.CHECKPOINT)
    elif not (link := args.base / "models" / "checkpoints" / Path(args.checkpoint).name).exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(args.checkpoint).absolute())
    if args.threads is None:
        chosen = threads.choose(os.environ)
        args.threads = None if chosen is None else chosen.count
    else:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.out = prepare_output(args.out)
    date = datetime.date.today().isoformat()
    facts = {"width": args.size, "height": args.size, "steps": args.steps, "cfg": accelerate_jobs.CFG,
             "cpu": cpu_name(), "threads": args.threads or os.environ.get("OMP_NUM_THREADS"),
             "torch": torch.__version__, "date": date}  # fmt: skip
    table = Table(
        args.out / inprocess.result_name("cpu-small" if args.small else "cpu", cpu_name(), torch.__version__, date),
        facts,
    )
    wanted = [name for name in (*PLANS, EASY_CACHE, *DIFFUSERS) if not args.only or name in args.only]
    waiting = [name for name in wanted if not table.has(name)]
    served = [name for name in waiting if name not in DIFFUSERS]
    looked_at = [scenario(args, f"*{STOCK}={STOCK}"), replace(find("sdxl-tiny-vae"), family="sd15")]
    choice = choose_models(args, looked_at)
    for name in served:
        # A server for each: programs of several plans would not fit the memory together.
        with open_server(ServerOptions(None, None, args.out), choice.files) as target:
            outcome = asyncio.run(through_server(target, name, choice, args))
        table.add(rows_of(name, "peer" if name == EASY_CACHE else "ours", outcome))
    for name in waiting:
        if name in DIFFUSERS:
            table.add(in_child(name, args))
    return 0 if all(table.has(name) for name in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())

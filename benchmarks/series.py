"""The series that a CPU can run on a full-size SD 1.5, with its own spread and its own overhead, in one command.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/series.py --checkpoint sd15.safetensors --name amd-epyc

with ComfyUI's Python writes `<name>_series.csv`, `<name>_series.html` and `<name>_series.json` into --out: the rows,
the page, and how far two runs of the same cell are apart and what the harness adds to the work. `--small` tries it out.
An interrupted series goes on with the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from speedlab.measure.store import RunStore  # noqa: E402
from speedlab_tools.bench import command as cmd_bench  # noqa: E402
from speedlab_tools.bench.models import ModelChoice, choose_models  # noqa: E402
from speedlab_tools.bench.results import Outcome, fetch_records  # noqa: E402
from speedlab_tools.bench.runner import parts_of  # noqa: E402
from speedlab_tools.client.client import ComfyClient  # noqa: E402
from speedlab_tools.client.events import LOADERS, node_spans  # noqa: E402
from speedlab_tools.client.files import (  # noqa: E402
    ServerOptions,
    Target,
    open_server,
    prepare_output,
)
from speedlab_tools.scenarios.catalog import LIGHTHOUSE, find  # noqa: E402
from speedlab_tools.scenarios.graphs import sweep  # noqa: E402
from speedlab_tools.scenarios.overrides import Overrides, adapt  # noqa: E402
from speedlab_tools.scenarios.scenario import Scenario, Settings  # noqa: E402

SIDE, STEPS, PROMPTS = 256, 8, 5
FAST = "attention(sdpa)+deepcache(3)+dynamic_cfg(stop_at=0.5)+tiny"
PLANS = f"""*stock=stock
sdpa=attention(sdpa)
bf16=weights(bf16)+attention(sdpa)
deepcache=attention(sdpa)+deepcache(3)
half cfg=attention(sdpa)+dynamic_cfg(stop_at=0.5)
tiny vae=attention(sdpa)+tiny
all={FAST}
all in bf16=weights(bf16)+{FAST}"""
PHASES = ("text_encode", "to_device", "prepare", "sample", "decode", "save")


def series() -> list[Scenario]:
    """The scenarios of the table at sizes that a CPU manages; two of them are the same, for the spread."""
    base = Settings(prompts=(LIGHTHOUSE,), width=SIDE, height=SIDE, steps=STEPS, warmup=1, repeats=2)
    again = sweep("plan", f"*stock=attention(sdpa)\nall={FAST}")
    rerun = replace(base, steps=4, warmup=2, repeats=7)
    return [
        _like("sweep-batch", base=replace(base, steps=4), build=sweep("batch", "1, 2, 4", plan="attention(sdpa)")),
        _like(
            "sweep-resolution",
            base=replace(base, steps=4, warmup=0),
            build=sweep("resolution", "256, 384, 512", plan="attention(sdpa)"),
        ),
        _like(
            "sweep-steps",
            base=replace(base, warmup=0),
            build=sweep("steps", "1, 2, 4, 8, *16", plan="attention(sdpa)"),
        ),
        _like("sweep-cfg", base=replace(base, warmup=0), build=sweep("cfg", "7, *8, 11", plan="attention(sdpa)")),
        _like(
            "sweep-prompt-length",
            base=replace(base, steps=4, warmup=0),
            build=sweep("prompt_tokens", "8, 77, 154, 231", plan="attention(sdpa)"),
        ),
        _like("sd15-precision", base=base, build=sweep("precision", "*fp32, bf16", plan="attention(sdpa)")),
        _like(
            "sd15-precision-quality",
            base=replace(base, warmup=0, repeats=1),
            build=sweep("steps", "4, 8, 16", "precision", "*fp32, bf16", plan="attention(sdpa)"),
        ),
        _like("xy-grid", base=replace(base, warmup=0, repeats=1), build=sweep("steps", "4, *8", "cfg", "5, *8, 11")),
        _like("xy-grid", "techniques", base=base, build=sweep("plan", PLANS)),
        # One right after the other: minutes apart they would show how the machine's speed drifts.
        _like("xy-grid", "rerun-a", base=rerun, build=again),
        _like("xy-grid", "rerun-b", base=rerun, build=again),
    ]


def _like(name: str, new: str | None = None, *, base: Settings, build: object) -> Scenario:
    return replace(find(name), id=new or name, settings=base, build=build)  # type: ignore[arg-type]


def spread(first: Sequence[dict[str, str]], second: Sequence[dict[str, str]]) -> dict[str, dict[str, float]]:
    """By plan: both medians in seconds, and how far the later one is off, as a share."""
    later = {row["plan"]: float(row["time_s"]) for row in second if row["time_s"]}
    return {
        row["plan"]: {"a": (a := float(row["time_s"])), "b": later[row["plan"]], "off": later[row["plan"]] / a - 1.0}
        for row in first
        if row["time_s"] and row["plan"] in later
    }


async def overhead(target: Target, choice: ModelChoice, out: Path, small: bool) -> dict[str, Any]:
    """Wall time of a prompt without loading, against what its record names: the rest is the harness.

    Medians of some prompts after one that loads and warms up; another text each time, so that the encoding does not
    come out of the cache.
    """
    settings = Settings(prompts=(LIGHTHOUSE,), width=SIDE, height=SIDE, steps=STEPS)
    scenario = replace(find("txt2img-default"), settings=settings)
    scenario = adapt(scenario, Overrides(), next(iter(choice.checkpoints.values())))
    store = RunStore(out)
    runs: list[tuple[float, float]] = []
    async with ComfyClient(target.url) as client:
        (_, graph), *_ = parts_of(scenario, small)
        await client.run(graph)
        for _ in range(PROMPTS):
            for node in graph.values():
                if node["class_type"] == "SpeedLabTextEncode":
                    node["inputs"]["text"] += ", again"
            result = await client.run(graph)
            outcome = Outcome("overhead")
            await fetch_records(client, result, out, outcome)
            spans = node_spans(result.log.events)
            wall = sum(span.seconds for span in spans if graph[span.node]["class_type"] not in LOADERS)
            phases = store.read(outcome.records[-1].stem).phases_ms
            named = sum(float(ms) for name in PHASES if isinstance(ms := phases.get(name), (int, float))) / 1000.0
            runs.append((wall, named))
    shares = sorted((wall - named) / wall for wall, named in runs)
    return {
        "wall_s": statistics.median(wall for wall, _ in runs),
        "work_s": statistics.median(named for _, named in runs),
        "share": statistics.median(shares),
        "shares": shares,
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoint", help="SD 1.5 checkpoint; a small demo without one")
    options.add_argument("--name", default="series", help="begins the names of the files")
    options.add_argument("--out", type=Path, default=ROOT / "output", help="folder for the results")
    options.add_argument("--server", help="a running ComfyUI")
    options.add_argument("--only", nargs="+", default=[], metavar="ID", help="these scenarios of the series alone")
    options.add_argument("--small", action="store_true", help="only try it out")
    options.add_argument("--restart", action="store_true", help="begin anew")
    args = options.parse_args(argv)
    args.port = None
    args.out = prepare_output(args.out)
    args.csv, args.html = args.out / f"{args.name}_series.csv", args.out / f"{args.name}_series.html"
    return args


def main() -> int:
    """Run the series; 1 where a scenario failed."""
    args = arguments()
    started = time.monotonic()
    scenarios = [one for one in series() if not args.only or one.id in args.only]
    choice = choose_models(args, [*scenarios, replace(find("sdxl-tiny-vae"), family="sd15")])
    options = ServerOptions(args.server, args.port, args.out)
    todo = cmd_bench.Series(scenarios, choice, args, Overrides())
    cmd_bench.run_series(todo, lambda: open_server(options, choice.files))
    with open_server(options, choice.files) as target:
        harness = asyncio.run(overhead(target, choice, args.out, args.small))
    done = todo.outcomes
    reruns = spread(done["rerun-a"].rows, done["rerun-b"].rows) if {"rerun-a", "rerun-b"} <= done.keys() else {}
    facts = {"reruns": reruns, "overhead": harness, "minutes": (time.monotonic() - started) / 60.0}
    (args.out / f"{args.name}_series.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for outcome in done.values():
        for picture in outcome.images:
            shutil.copy2(picture, args.out / f"{args.name}_{picture.name}")
    print(json.dumps(facts, indent=1))
    failed = [outcome.name for outcome in done.values() if outcome.error]
    if not failed and not todo.waiting:
        todo.journal.close()
    return 1 if failed or todo.waiting else 0


if __name__ == "__main__":
    sys.exit(main())

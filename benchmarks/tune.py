"""Tune: how far its choice is from the true best, and what it finds on full-size SD 1.5.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/tune.py regret     every plan on a small model, then Tune in a tenth
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/tune.py full       through a server, at 256x256 and 512x512

with ComfyUI's Python. `regret` makes the image of every plan on every prompt of a tune (`..._tune-all.csv`, a row when
it is made), gives Tune a tenth of the seconds that this took, and then times its choice and the fastest plans that hold
the floor in turn. `full` lets Tune find a plan and keeps what it predicted and measured of each (`..._tune-plans.csv`);
then its choice, stock, `fast` and the best of `accelerate.py` run in turn on another seed. What both found is in
`..._tune.csv`. A series that was cut off goes on with the same command and its --date. Weights are random: times are
real, distances say nothing of how an image looks.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import importlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import accelerate_jobs
import inprocess

from speedlab.measure.environment import device_name
from speedlab.measure.store import RunStore
from speedlab.plans.in_turn import Series, own_failure, turned, turns
from speedlab.plans.plan_text import PRESETS
from speedlab.plans.tune_request import HELD_OUT
from speedlab_tools.client.client import ComfyClient
from speedlab_tools.client.events import ProgressLine
from speedlab_tools.client.files import ServerOptions, open_server
from speedlab_tools.client.graph import Graph

ALL = ["quality", "seed", "plan", "prompt", "seconds", "latent_error", "ssim", "psnr", "wall_s", "why"]
PLANS = ["size", "steps", "quality", "plan", "predicted_s", "from_parts_s", "measured_s", "off", "images",
         "latent_error", "ssim", "psnr", "recommended"]  # fmt: skip
FIGURES = ["part", "case", "figure", "value", "plan"]
FACTS = ["device", "torch", "date"]
CHANNELS, DETAIL = 64, 0.3  # of the small model
PROMPTS = 4  # of a tune of one prompt, the held-out ones included
# No more than this is given to Tune on a small model: it would compile too, which the table of all plans leaves out.
MOST_MINUTES = 9.9
FINALISTS = 5
HAND_MADE = {
    "interval 3": "attention(auto)+precision(memory=auto)+deepcache(3)+dynamic_cfg(0.75)+tiny",
    "interval 5, bf16": "weights(bf16)+attention(auto)+precision(memory=auto)+deepcache(5)+dynamic_cfg(0.75)+tiny",
}


class Rows:
    """A CSV that grows by a row at a time and knows what is in it."""

    def __init__(self, path: Path, columns: Sequence[str], facts: dict[str, str]) -> None:
        self.path, self.columns, self.facts = path, [*columns, *FACTS], facts
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, **wanted: object) -> list[dict[str, str]]:
        return [row for row in self.rows if all(row[name] == str(value) for name, value in wanted.items())]

    def add(self, **values: object) -> None:
        row = dict.fromkeys(self.columns, "") | {
            name: "" if value is None else _text(value) for name, value in {**values, **self.facts}.items()
        }
        self.rows.append(row)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# Regret on a small model


def regret(args: argparse.Namespace, rows: Rows, figures: Rows) -> None:
    """For each seed every plan, a tune in a tenth of that time, and the best of both in turn."""
    import torch

    pack = inprocess.start(args.base)
    accelerate_jobs.prepare_tiny(args.base)
    with torch.inference_mode():
        bench = small_model(pack, args)
        for seed in range(args.seeds):
            case = f"{args.quality}, seed {seed}"
            if not figures.of(part="regret", case=case, figure="regret"):
                one_seed(bench, args, seed, case, rows, figures)
    known = [float(row["value"]) for row in figures.of(part="regret", figure="regret")]
    print(f"\n{len(known)} tunes: at most 5 % slower than the true best in {sum(value <= 0.05 for value in known)}")


def small_model(pack: Any, args: argparse.Namespace) -> SimpleNamespace:
    """A model whose images take a fraction of a second: SD 1.5's with two levels and 64 channels, a text encoder of
    one layer, and a narrow decoder, which bf16 weights keep too."""
    import torch

    from speedlab_tools import synthetic
    from speedlab_tools.synthetic import checkpoint, files, unet

    def engine(name: str) -> Any:
        return importlib.import_module(f"{pack.__name__}.speedlab.{name}")

    name, spec = "speedlab_narrow.safetensors", synthetic.CheckpointSpec("sd15")
    narrow = replace(
        checkpoint.architecture(spec).unet, model_channels=CHANNELS, channel_mult=(1, 2), depth_in=(0, 1),
        depth_out=(1, 1, 0, 0),
    )  # fmt: skip
    layout = files.Layout()
    # Groups of so few channels cannot carry the noise: `_with_noise` does.
    with mock.patch.object(unet, "carry_noise"):
        layout.add(checkpoint.UNET_PREFIX, unet.unet_layout(narrow))
    for key, weight in checkpoint.checkpoint_layout(spec).items():
        if not key.startswith(checkpoint.UNET_PREFIX):
            layout[key] = weight
    about = files.describe("demo checkpoint", family="sd15", channels=CHANNELS)
    files.write_weights(args.base / "models" / "checkpoints" / name, layout, 0, torch.float16, about)
    network = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    network.forward = _with_noise(network.forward)
    # ComfyUI knows SD 1.x by this number.
    importlib.import_module("comfy.supported_models").SD15.unet_config["model_channels"] = CHANNELS
    synthetic.write_vae(args.base / "models" / "vae" / "speedlab_demo_vae.safetensors")
    model, clip = pack.NODE_CLASS_MAPPINGS["SpeedLabCheckpointLoader"]().load(name, "fp32", "contiguous")[:2]
    (vae,) = pack.NODE_CLASS_MAPPINGS["SpeedLabVAELoader"]().load("speedlab_demo_vae.safetensors", "fp32")[:1]
    vae.first_stage_model.decoder = narrow_decoder()
    encoder = clip.cond_stage_model.clip_l.transformer.text_model.encoder
    encoder.layers = encoder.layers[:1]
    nodes = {**importlib.import_module("nodes").NODE_CLASS_MAPPINGS, **pack.NODE_CLASS_MAPPINGS}
    parts = engine("plans.techniques").Parts(model, clip, vae)
    return SimpleNamespace(engine=engine, parts=parts, nodes=nodes, context=engine("measure.context").NodeContext())


def _with_noise(forward: Any) -> Any:
    """A network that predicts the noise and a small part of its own, as a trained one does."""
    return lambda self, x, *args, **kwargs: x + DETAIL * forward(self, x, *args, **kwargs)


def narrow_decoder() -> Any:
    """SD 1.x's decoder with a quarter of the channels and the fewest blocks, of random weights."""
    import torch

    torch.manual_seed(0)
    decoder = importlib.import_module("comfy.ldm.modules.diffusionmodules.model").Decoder(
        ch=32, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=256,
        z_channels=4,
    )  # fmt: skip
    for weight in decoder.parameters():
        fan_in = weight[0].numel() if weight.dim() > 1 else 1
        drawn = torch.randn_like(weight) / fan_in**0.5
        weight.data = drawn if weight.dim() > 1 else torch.ones_like(weight) * 0.1
    return decoder.eval()


def tune_of(bench: SimpleNamespace, args: argparse.Namespace, seed: int, minutes: float) -> Any:
    """A tune on the small model."""
    base = bench.engine("plans.axes").CellSettings(args.size, args.size, 1, args.steps, 7.0, "euler", "normal")
    module = bench.engine("plans.tune")
    prompt = bench.engine("plans.cell").Prompt("a lighthouse on a rocky coast", "", 1000 * seed + 7)
    lines = () if args.plans is None else tuple(some_plans(bench, base, args.plans))
    request = bench.engine("plans.tune_request").TuneRequest(base, (prompt,), args.quality, minutes, candidates=lines)
    return module.Tune(bench.parts, request, bench.nodes, bench.context)


def some_plans(bench: SimpleNamespace, base: Any, count: int) -> Iterable[str]:
    """So many plan lines of the space, evenly: for a trial."""
    found = [one.line for one in bench.engine("plans.tune_space").space([PRESETS["exact"]], base)]
    return list(dict.fromkeys(found))[:: max(len(found) // count, 1)]


def one_seed(bench: SimpleNamespace, args: argparse.Namespace, seed: int, case: str, rows: Rows, figures: Rows) -> None:
    """Every plan, the tune, and what its choice loses."""
    search = bench.engine("plans.tune_search")
    tune = tune_of(bench, args, seed, 1.0)
    by_name = {bench.engine("plans.tune").name_of(one): one for one in tune.candidates()}
    for prompt in range(PROMPTS):
        for name in turned(list(by_name), prompt * len(by_name) // PROMPTS):
            if not rows.of(quality=args.quality, seed=seed, plan=name, prompt=prompt):
                exhaustive_image(bench, tune.images, by_name[name], name, prompt, args, seed, rows)
    mine = rows.of(quality=args.quality, seed=seed)
    spent = sum(float(row["wall_s"]) for row in mine)
    budget = min(spent / 10.0, MOST_MINUTES * 60.0)
    shutil.rmtree(bench.engine("plans.tuned").folder_of(tune.store) / "unfinished", ignore_errors=True)
    began = time.monotonic()
    found = tune_of(bench, args, seed, budget / 60.0).run().found
    took = time.monotonic() - began
    passing = {}
    for name in by_name:
        looks = {int(row["prompt"]): _look(search, row) for row in mine if row["plan"] == name and not row["why"]}
        # As Tune has it: the images of the choice hold the floor, and those of the held-out seeds do.
        parts = (range(PROMPTS - HELD_OUT), range(PROMPTS - HELD_OUT, PROMPTS))
        means = [search.Tried(by_name[name], 0.0, {n: looks[n] for n in part}).mean for part in parts
                 if len(looks) == PROMPTS]  # fmt: skip
        if means and all(search.holds(mean, search.FLOORS[args.quality]) for mean in means):
            passing[name] = statistics.median(look.seconds for look in looks.values())
    chosen = None if found.best is None else bench.engine("plans.tune").name_of(found.best.candidate)
    fastest = sorted(passing, key=lambda name: passing[name])[:FINALISTS]
    times = in_turn(bench, tune.images, {name: by_name[name] for name in {*fastest, *filter(None, [chosen])}}, args)
    add = partial(figures.add, part="regret", case=case)
    add(figure="plans", value=len(by_name))
    add(figure="seconds of every plan", value=spent)
    add(figure="seconds of Tune", value=took)
    add(figure="choice holds the floor in all images", value=int(chosen in passing), plan=chosen)
    best = min(fastest, key=lambda name: times[name], default=None)
    if best is None or chosen is None:
        print(f"{case}: {'no plan holds the floor' if best is None else 'Tune had no time for a choice'}")
        add(figure="regret", value=0.0 if best == chosen else 1.0, plan=chosen)
        return
    loss = times[chosen] / min(times.values()) - 1.0
    add(figure="seconds of the true best", value=times[best], plan=best)
    add(figure="seconds of the choice", value=times[chosen], plan=chosen)
    add(figure="regret", value=loss, plan=chosen)
    print(f"{case}: {len(by_name)} plans in {spent:.0f} s, Tune in {took:.0f} s: {chosen}, {100 * loss:.1f} % slower")


def exhaustive_image(
    bench: SimpleNamespace, images: Any, one: Any, name: str, prompt: int, args: argparse.Namespace, seed: int,
    rows: Rows,
) -> None:  # fmt: skip
    """One image of one plan as a row; what cannot run is one too."""
    images.reference(prompt)
    began, values = time.monotonic(), {}
    try:
        look, _ = images.look(one, prompt)
        found = asdict(look)
        values = {"seconds": found["seconds"], "latent_error": found["latent"], "ssim": found["ssim"],
                  "psnr": found["psnr"]}  # fmt: skip
    except bench.engine("plans.tune_search").Refused as error:
        values = {"why": str(error)}
    rows.add(quality=args.quality, seed=seed, plan=name, prompt=prompt, wall_s=time.monotonic() - began, **values)


def _look(search: Any, row: dict[str, str]) -> Any:
    return search.Look(*(float(row[name]) for name in ("seconds", "latent_error", "ssim", "psnr")))


def in_turn(bench: SimpleNamespace, images: Any, plans: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """The median seconds of plans that run in turn."""

    class Timed(Series[float]):
        name = ""

    series = []
    for name in plans:
        one = Timed()
        one.name = name
        series.append(one)
    for turn in turns(series, args.rounds, 1):
        with own_failure(lambda error: "error"):
            run = images.once(plans[turn.series.name].over(images.base), 0)
            turn.keep(run.total_ms / 1000.0)
    return {one.name: statistics.median(one.repeats) for one in series if one.repeats}


# Full size, through a server


async def full(args: argparse.Namespace, rows: Rows, figures: Rows) -> None:
    """At each size a tune, then its choice beside stock, `fast` and what was made by hand."""
    if args.checkpoint is None:
        accelerate_jobs.prepare(args.base)
    models = args.base / "models"
    checkpoint = args.checkpoint or models / "checkpoints" / accelerate_jobs.CHECKPOINT
    accelerate_jobs.prepare_tiny(args.base)
    files = {"checkpoints": [checkpoint], "vae_approx": sorted((models / "vae_approx").glob("taesd_*"))}
    out = args.base / "tune"
    out.mkdir(parents=True, exist_ok=True)
    with open_server(ServerOptions(args.server, None, out), files) as target:
        async with ComfyClient(target.url) as client:
            for size in args.sizes:
                case = f"{size}x{size}"
                if not figures.of(part="full", case=case, figure="time to a recommendation"):
                    await tuned(client, checkpoint.name, size, case, args, rows, figures)
                if not figures.of(part="full", case=case, figure="seconds of stock"):
                    await beside(client, checkpoint.name, size, case, out, args, figures)


def _graph(node: str, checkpoint: str, inputs: dict[str, Any]) -> Graph:
    graph = Graph()
    loaded = graph.add("SpeedLabCheckpointLoader", group="Load", ckpt_name=checkpoint)
    graph.add(node, group="Measure", model=loaded["model"], clip=loaded["clip"], vae=loaded["vae"], **inputs)
    return graph


def _settings(size: int, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "positive": accelerate_jobs.PROMPT, "negative": accelerate_jobs.NEGATIVE, "width": size, "height": size,
        "batch": 1, "steps": args.steps, "cfg": accelerate_jobs.CFG, "sampler_name": accelerate_jobs.SAMPLER,
        "scheduler": accelerate_jobs.SCHEDULER,
    }  # fmt: skip


async def _run(client: ComfyClient, graph: Graph, title: str) -> dict[str, Any]:
    """What the measuring node shows."""
    api = graph.to_api()
    line = ProgressLine(title, api)
    try:
        result = await client.run(api, listener=line, timeout_s=24 * 3600.0)
    finally:
        line.done()
    return next(shown for shown in result.outputs.values() if "speedlab" in shown or "speedlab_tune" in shown)


async def tuned(
    client: ComfyClient, checkpoint: str, size: int, case: str, args: argparse.Namespace, rows: Rows, figures: Rows
) -> None:
    """One tune: its plans as rows, its time and its choice as figures."""
    minutes = args.minutes[min(args.sizes.index(size), len(args.minutes) - 1)]
    inputs = {**_settings(size, args), "seed": str(accelerate_jobs.SEED), "quality": args.quality,
              "budget_minutes": minutes, "candidates": "\n".join(args.candidates)}  # fmt: skip
    began = time.monotonic()
    shown = await _run(client, _graph("SpeedLabTune", checkpoint, inputs), f"tune {case}")
    took = time.monotonic() - began
    page, _plan = shown["speedlab_tune"]
    facts = json.loads(Path(page).with_suffix(".json").read_text(encoding="utf-8"))
    off = []
    for one in facts["plans"]:
        looks = list(one["looks"].values())
        if not looks:
            continue
        share = one["measured_s"] / one["predicted_s"] - 1.0
        off.append(abs(share))
        means = {name: statistics.fmean(look[name] for look in looks) for name in ("latent", "ssim", "psnr")}
        rows.add(
            size=size, steps=one["steps"], quality=args.quality, plan=one["plan"], predicted_s=one["predicted_s"],
            from_parts_s=one["from_parts_s"], measured_s=one["measured_s"], off=share, images=len(looks),
            latent_error=means["latent"], ssim=means["ssim"], psnr=means["psnr"], recommended=int(one["recommended"]),
        )  # fmt: skip
    add = partial(figures.add, part="full", case=case)
    best = next((one for one in facts["plans"] if one["recommended"]), None)
    if best is not None:
        line = best["plan"]
        if best["steps"] != args.steps:
            line = f"{'' if line == 'stock' else line + '+'}settings(steps={best['steps']})"
        add(figure="stock / tuned", value=facts["stock_s"] / best["measured_s"], plan=line)
    if off:
        add(figure="plans run", value=len(off))
        add(figure="plans predicted within 10 %", value=sum(share <= 0.1 for share in off) / len(off))
        add(figure="prediction off, median", value=statistics.median(off))
        add(figure="prediction off, at most", value=max(off))
    add(figure="time to a recommendation", value=took)
    print("\n".join(shown["text"]))


async def beside(
    client: ComfyClient, checkpoint: str, size: int, case: str, out: Path, args: argparse.Namespace, figures: Rows
) -> None:
    """Stock, the tuned plan, `fast` and those made by hand, in turn, on a seed that Tune has not seen."""
    found = figures.of(part="full", case=case, figure="stock / tuned")
    plans = {"stock": "stock", "fast": PRESETS["fast"], **HAND_MADE}
    if found:
        plans["tuned"] = found[-1]["plan"]
    names = {name: f"plan_{number}" for number, name in enumerate(plans)}
    values = "\n".join(f"{'*' if name == 'stock' else ''}{names[name]}={line}" for name, line in plans.items())
    inputs = {**_settings(size, args), "seed": str(accelerate_jobs.SEED + 1), "axis_x": "plan", "values_x": values,
              "axis_y": "none", "values_y": "", "warmup": 1, "repeats": args.rounds, "plan": ""}  # fmt: skip
    shown = await _run(client, _graph("SpeedLabBenchmark", checkpoint, inputs), f"in turn {case}")
    with RunStore(out).csv_path.open(newline="") as file:
        kept = {row["run_id"]: row for row in csv.DictReader(file)}
    cells = [kept[run["run_id"]] for run in shown["speedlab"]]
    for (name, line), row in zip(plans.items(), cells, strict=True):
        for column, what in (("time_s", "seconds"), ("psnr", "PSNR"), ("ssim", "SSIM")):
            if row[column]:
                figures.add(part="full", case=case, figure=f"{what} of {name}", value=float(row[column]), plan=line)
        print(
            f"{case} {name}: {row['time_s'] or row['status']} s, PSNR {row['psnr'] or '-'}, SSIM {row['ssim'] or '-'}"
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=("regret", "full"))
    options.add_argument("--seeds", type=int, default=10, help="regret: how many tunes")
    options.add_argument("--plans", type=int, help="regret: only so many plans of the space, for a trial")
    options.add_argument("--size", type=int, default=64, help="regret: width and height of the small model's images")
    options.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="full: widths and heights")
    options.add_argument("--steps", type=int, help="sampling steps; 12 for regret, 20 for full")
    options.add_argument("--minutes", type=float, nargs="+", default=[20.0, 60.0], help="full: Tune's at each size")
    options.add_argument("--quality", help="the floor; similar for regret, close for full")
    options.add_argument("--rounds", type=int, default=5, help="repeats of what runs in turn at the end")
    options.add_argument("--candidates", nargs="*", default=[], help="full: plan lines in place of the whole space")
    options.add_argument("--checkpoint", type=Path, help="full: another checkpoint, for a trial")
    options.add_argument("--server", help="full: address of a server that has the checkpoint and writes to the base")
    options.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    options.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="of the series to go on with")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    args = options.parse_args()
    is_full = args.part == "full"
    args.steps = args.steps or (20 if is_full else 12)
    args.quality = args.quality or ("close" if is_full else "similar")
    args.base = args.base.resolve()
    import torch

    device = device_name(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    facts = {"device": device, "torch": torch.__version__, "date": args.date}
    args.results.mkdir(parents=True, exist_ok=True)

    def rows(what: str, columns: Sequence[str]) -> Rows:
        return Rows(args.results / inprocess.result_name(what, device, torch.__version__, args.date), columns, facts)

    figures = rows("tune", FIGURES)
    if is_full:
        asyncio.run(full(args, rows("tune-plans", PLANS), figures))
    else:
        regret(args, rows("tune-all", ALL), figures)
    print(f"written to {figures.path}")


if __name__ == "__main__":
    main()

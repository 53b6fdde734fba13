"""`demo`: ComfyUI's own nodes and Accelerate's presets in turn, same sampler, prompt and seed, timed from outside.

Profile Sampler stands in KSampler's place on both sides: it calls KSampler's own function and tells its step times,
which cannot be seen from outside, where messages arrive in bursts.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedlab.common.tables import format_table
from speedlab.measure.record import RunRecord, csv_row
from speedlab.measure.store import RunStore
from speedlab.plans.in_turn import Series, turns
from speedlab.plans.plan_text import PRESETS

from .bench.models import ModelChoice, choose_models, server_checkpoint
from .bench.outside import outside_record, sampled, server_env, watch
from .bench.results import fetch_images
from .client.client import ComfyClient, RunResult
from .client.errors import BenchError, ServerGone
from .client.events import ProgressLine
from .client.files import ServerOptions, Target, open_server, prepare_output
from .client.graph import ApiGraph, Graph
from .scenarios import drawn
from .scenarios.catalog import LIGHTHOUSE, find
from .scenarios.graphs import PREFIX, Loaded, empty_latent, encode, sample
from .scenarios.overrides import overrides_of
from .scenarios.scenario import STOCK, TINY_VAE, Plan, Prompt, Scenario, Settings

BASE = "txt2img-default"
PLANS = tuple(Plan(name) for name in PRESETS)
WARM_UP_STEPS = 2
WARM_UP_SIDE = 256  # on a CPU nothing is tuned for a shape, so a small image warms up as well
CPU_SIDE = 384  # all rounds together stay under three minutes on two cores
MOST_ROUNDS = 3
ROUNDS_SECONDS = 140.0  # room for three on two cores


@dataclass(frozen=True)
class DemoRun:
    """One of them: its plan, record and image."""

    plan: Plan
    record: RunRecord
    images: tuple[Path, ...]

    @property
    def total_s(self) -> float:
        """Seconds from text to saved image."""
        return float(self.record.phases_ms["total"] or 0.0) / 1000.0


@dataclass
class PlanRuns(Series[DemoRun]):
    """One of the plans with its run of each round."""

    plan: Plan


@dataclass(frozen=True)
class Result:
    """The runs of one round, stock first, and how many rounds there were."""

    runs: tuple[DemoRun, ...]
    rounds: int

    @property
    def stock(self) -> DemoRun:
        """ComfyUI's own nodes."""
        return self.runs[0]

    def ratio(self, run: DemoRun) -> float:
        """How many times as fast as stock a run is: what both rows of the table say too."""
        return self.stock.total_s / run.total_s

    @property
    def of_rounds(self) -> str:
        """What the ratios are of."""
        if self.rounds == 1:
            return "one round, which shows no spread"
        return f"{'median' if self.rounds % 2 else 'lower median'} of {self.rounds} rounds"


def result_of(*plans: Sequence[DemoRun]) -> Result:
    """The round with the median ratio of the last plan, with the images of the first one; of an even number the lower
    of both."""
    rounds = sorted(
        (Result(runs, len(plans[0])) for runs in zip(*plans, strict=True)), key=lambda r: r.ratio(r.runs[-1])
    )
    middle = rounds[(len(rounds) - 1) // 2]
    chosen = (_with_images(run, own[0]) for run, own in zip(middle.runs, plans, strict=True))
    return replace(middle, runs=tuple(chosen))


def _with_images(chosen: DemoRun, first: DemoRun) -> DemoRun:
    artifacts = {"images": [path.name for path in first.images]}
    return DemoRun(chosen.plan, chosen.record.changed(artifacts=artifacts), first.images)


def demo_scenario() -> Scenario:
    """What the demo needs, as a scenario: the plain image, with a Tiny VAE."""
    return replace(find(BASE), plan=TINY_VAE)


def settings_of(args: argparse.Namespace, on_cpu: bool, family: str | None) -> Settings:
    """The demo's settings with the command line laid over them; a CPU gets a smaller image, and a model that draws, of
    `family`, a caption and a size that it knows."""
    scenario = find(BASE)
    plain = drawn.on_drawn(scenario, family).settings if family else replace(scenario.settings, prompts=(LIGHTHOUSE,))
    seed = plain.prompts[0].seed if args.seed is None else args.seed
    return replace(
        plain,
        prompts=(replace(plain.prompts[0], seed=seed),),
        width=args.width or (min(CPU_SIDE, plain.width) if on_cpu else plain.width),
        height=args.height or (min(CPU_SIDE, plain.height) if on_cpu else plain.height),
        steps=args.steps or plain.steps,
        batch=args.batch or plain.batch,
    )


def warm_up_settings(settings: Settings, on_cpu: bool) -> Settings:
    """Another text and seed, so that no node of the timed run comes from the server's cache; few steps."""
    other = Prompt("warm up", "warm up", (settings.prompts[0].seed + 1) % 2**32, "cold")
    warm_up = replace(settings, prompts=(other,), steps=min(WARM_UP_STEPS, settings.steps))
    if not on_cpu:
        return warm_up
    return replace(warm_up, width=min(WARM_UP_SIDE, settings.width), height=min(WARM_UP_SIDE, settings.height))


async def _queue(client: ComfyClient, graph: ApiGraph, title: str) -> RunResult:
    line = ProgressLine(title, graph)
    try:
        return await client.run(graph, listener=line)
    finally:
        line.done()


def _request(settings: Settings, plan: Plan, checkpoint: str) -> dict[str, Any]:
    """What was asked, as the record's `request`."""
    same = ("steps", "cfg", "width", "height", "batch", "sampler", "scheduler")
    return {
        "scenario": "demo",
        "plan": plan.name,
        "checkpoint": {"name": checkpoint},
        "precision": None,
        "accelerators": plan.accelerators(),
        "seed": settings.prompts[0].seed,
        "prompt": settings.prompts[0].text,
        **{name: getattr(settings, name) for name in same},
    }


@dataclass(frozen=True)
class Demo:
    """A server with what both runs share."""

    client: ComfyClient
    pid: int | None
    env: dict[str, Any]
    settings: Settings
    checkpoint: str
    out: Path

    async def measure(self, plan: Plan, with_images: bool) -> DemoRun:
        """Warm up, run once, fetch the image: it is the same in every round."""
        on_cpu = self.env["device_type"] == "cpu"
        warm_up = graph_of(warm_up_settings(self.settings, on_cpu), self.checkpoint, plan).to_api()
        graph = graph_of(self.settings, self.checkpoint, plan).to_api()
        async with watch(self.client, self.pid, with_vram=not on_cpu) as tuning:
            warmed = await _queue(self.client, warm_up, f"{plan.name}: warm-up")
        async with watch(self.client, self.pid, with_vram=False) as seen:
            result = await _queue(self.client, graph, plan.name)
        seen.vram = tuning.vram
        name = f"demo_{plan.name}"
        images = await fetch_images(self.client, result, self.out, name) if with_images else []
        record = outside_record(
            result, request=_request(self.settings, plan, self.checkpoint), env=self.env, memory=seen
        )
        # What was timed here takes the sampler's figures over; its own records would stand in the library beside it.
        try:
            await self.client.delete_runs([str(sampled(each)["run_id"]) for each in (warmed, result)])
        except BenchError as error:
            print(f"The sampler's own records stay: {error}", flush=True)
        return DemoRun(plan, record, tuple(images))

    async def in_turn(self) -> Result:
        """Measure stock and the presets in turn, as many rounds as there is time for."""
        started = time.monotonic()
        all_runs = [PlanRuns(plan) for plan in (STOCK, *PLANS)]
        for turn in turns(
            all_runs, MOST_ROUNDS,
            goes_on=lambda done: (time.monotonic() - started) * (done + 1) / done < ROUNDS_SECONDS,
        ):  # fmt: skip
            turn.keep(await self.measure(turn.series.plan, with_images=turn.number == 0))
            # The next one must not be measured beside this one's models.
            await self.client.free()
        return result_of(*(runs.repeats for runs in all_runs))

    async def with_distances(self, found: Result) -> Result:
        """The result with how far each preset's image is from stock's."""
        reference = await self.client.upload(found.stock.images[0])
        runs = [found.stock]
        for run in found.runs[1:]:
            image = await self.client.upload(run.images[0])
            result = await self.client.run(compare_graph(image, reference).to_api())
            text = " ".join(text for shown in result.outputs.values() for text in shown.get("text", []))
            distances = re.search(r"PSNR (\S+) dB, SSIM (\S+),", text)
            if distances is None:
                raise BenchError(f"Compare Images does not tell a distance: {text}")
            psnr, ssim = float(distances[1]), float(distances[2])
            # JSON has no infinity: equal images are marked by `identical`.
            quality = {"psnr": psnr, "ssim": ssim, "identical": psnr == float("inf"), "baseline": STOCK.name}
            runs.append(replace(run, record=run.record.changed(quality=quality)))
        return replace(found, runs=tuple(runs))


async def _all(target: Target, args: argparse.Namespace, choice: ModelChoice, out: Path) -> Result:
    async with ComfyClient(target.url) as client:
        env = server_env(await client.system_stats())
        checkpoint = choice.checkpoints.get(BASE) or await server_checkpoint(client, demo_scenario())
        family = drawn.family_of(checkpoint)
        settings = settings_of(args, env["device_type"] == "cpu", family)
        print(
            f"Sampling {settings.width}x{settings.height}, {settings.steps} steps, {1 + len(PLANS)} ways in turn, "
            f"on {env['device']}.",
            flush=True,
        )
        demo = Demo(client, target.pid, env, settings, checkpoint, out)
        found = await demo.in_turn()
        # Images of noise have nothing to compare.
        return await demo.with_distances(found) if family or args.checkpoint is not None else found


def _row(run: DemoRun) -> dict[str, str]:
    """The row of a run; of a preset that ran as something else, with what it was asked for as."""
    row = csv_row(run.record)
    return row if run.record.request.get("asked") is None else {**row, "asked": run.plan.name}


def report(found: Result, out: Path) -> None:
    """Write the records, print their rows, the ratios and every file."""
    store = RunStore(out)
    records = [store.json_path(store.keep(run.record).run_id) for run in found.runs]
    print("\n" + format_table([_row(run) for run in found.runs]))
    for warning in dict.fromkeys(text for run in found.runs for text in run.record.warnings):
        print(f"note: {warning}")
    print()
    for run in found.runs[1:]:
        name, ratio = run.plan.name, found.ratio(run)
        print(f"{name}: {ratio:.2f} times as fast as stock ({found.of_rounds}): {PRESETS[name]}")
    print("Times are from text to saved image, model loading apart.")
    for text in attributes_of(found):
        print(text)
    for run, record in zip(found.runs, records, strict=True):
        for image in run.images:
            print(f"image ({run.plan.name}): {image}")
        print(f"record ({run.plan.name}): {record}")
    print(f"table: {store.csv_path}")


def attributes_of(found: Result) -> list[str]:
    """What of its caption each image of the model that draws shows; nothing for another model."""
    request = found.stock.record.request
    if drawn.family_of((request.get("checkpoint") or {}).get("name")) is None:
        return []
    import numpy as np
    from PIL import Image

    from speedlab.measure.drawn import examiner, world

    scene = world.scene_of(request["prompt"])
    if scene is None:
        return []
    lines = [f"Asked for: {request['prompt']}. Attributes that are right in the image:"]
    for run in found.runs:
        with Image.open(run.images[0]) as image:
            score = examiner.examine(np.asarray(image.convert("RGB")), scene)
        wrong = f" ({'; '.join(score.wrong)})" if score.wrong else ""
        lines.append(f"  {run.plan.name}: {score.right} of {score.asked}{wrong}")
    return lines


def run(args: argparse.Namespace) -> int:
    """The command. Raises BenchError where anything fails."""
    overrides_of(args)
    out = prepare_output(args.out)
    RunStore(out).check_writable()
    choice = choose_models(args, [demo_scenario()])
    for note in choice.notes:
        print(note)
    with open_server(ServerOptions(args.server, args.port, out), choice.files) as target:
        try:
            found = asyncio.run(_all(target, args, choice, out))
        except ServerGone as error:
            raise BenchError("\n".join(filter(None, (str(error), target.tail())))) from error
    report(found, out)
    return 0


def graph_of(settings: Settings, checkpoint: str, plan: Plan) -> Graph:
    """ComfyUI's own nodes for stock, else those of this pack around Accelerate; both sampled and decoded alike."""
    graph, prompt = Graph(), settings.prompts[0]
    if plan is STOCK:
        loader = graph.add("CheckpointLoaderSimple", group="Load", ckpt_name=checkpoint)
        loaded = Loaded(loader["MODEL"], loader["CLIP"], loader["VAE"])
        texts = (prompt.text, prompt.negative or "")
        positive, negative = (graph.add("CLIPTextEncode", group="Prompt", clip=loaded.clip, text=t)[0] for t in texts)
    else:
        loader = graph.add("SpeedLabCheckpointLoader", group="Load", ckpt_name=checkpoint)
        stack = graph.add(
            "SpeedLabAccelerate", group="Load", preset=plan.name, model=loader["model"], clip=loader["clip"],
            vae=loader["vae"],
        )  # fmt: skip
        loaded = Loaded(stack["model"], stack["clip"], stack["vae"])
        positive, negative = encode(graph, loaded.clip, prompt, 0, "")
    latent = empty_latent(graph, settings)
    samples = sample(graph, settings, prompt, loaded.model, (positive, negative), latent, 0, "")[0]
    images = graph.add("VAEDecode", group="Decode", samples=samples, vae=loaded.vae)
    graph.add("SaveImage", group="Measure", images=images[0], filename_prefix=f"{PREFIX}/demo_{plan.name}")
    return graph


def compare_graph(image: str, reference: str) -> Graph:
    """How far one uploaded image is from another, in words."""
    graph = Graph()
    images = [graph.add("LoadImage", group="Load", image=name)["IMAGE"] for name in (image, reference)]
    graph.add("SpeedLabCompareImages", group="Measure", image_a=images[0], image_b=images[1])
    return graph

"""`tune`: the node Tune on one checkpoint, from a shell; the page and the workflow lie in the output folder."""

from __future__ import annotations

import argparse
import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bench.models import choose_models, server_checkpoint
from .cli.arguments import UsageError
from .client.client import ComfyClient
from .client.errors import BenchError, ServerGone
from .client.events import ProgressLine
from .client.files import ServerOptions, Target, open_server, prepare_output, users_path
from .client.graph import Graph
from .demo import BASE, demo_scenario
from .scenarios import drawn
from .scenarios.catalog import LIGHTHOUSE

SIDE, CFG = 512, 8.0
# What a cancelled tune gets to keep its best so far, with a page.
_ENDS_S = 60.0


def run(args: argparse.Namespace) -> int:
    """The command. Raises BenchError where anything fails, UsageError for options that make no sense."""
    given = prompts_of(args)
    first, axis = steps_of(args.steps)
    if args.html is not None and args.html.is_dir():
        raise UsageError(f"--html: {args.html} is a folder: name a file.")
    out = prepare_output(args.out)
    choice = choose_models(args, [demo_scenario()])
    for note in choice.notes:
        print(note)

    def inputs(checkpoint: str) -> dict[str, Any]:
        family = drawn.family_of(checkpoint)
        texts = given or ([*drawn.CAPTIONS[:4]] if family else [LIGHTHOUSE.text])
        side, cfg = (drawn.side(family), drawn.CFG) if family else (SIDE, CFG)
        return {
            "positive": "\n".join(texts), "negative": args.negative, "width": args.width or side,
            "height": args.height or side, "batch": args.batch, "steps": first,
            "cfg": cfg if args.cfg is None else args.cfg, "sampler_name": args.sampler,
            "scheduler": args.scheduler, "seed": str(args.seed), "quality": args.quality,
            "budget_minutes": args.minutes, "budget_gb": args.budget_gb, "candidates": "", "steps_axis": axis,
            "samplers_axis": args.samplers,
        }  # fmt: skip

    with open_server(ServerOptions(args.server, args.port, out), choice.files) as target:
        try:
            table, page, plan = asyncio.run(_tune(target, choice.checkpoints.get(BASE), inputs))
        except ServerGone as error:
            raise BenchError("\n".join(filter(None, (str(error), target.tail())))) from error
    print(f"\n{table}\n\nplan: {plan or 'none'}\npage: {page}")
    if args.html is not None:
        _copy(Path(page), args.html)
    return 0 if plan else 1


def prompts_of(args: argparse.Namespace) -> list[str]:
    """One prompt a line of the file; none without a file. Raises UsageError for a file without any."""
    if args.prompts is None:
        return []
    path = users_path(args.prompts, "--prompts")
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not texts:
        raise UsageError(f"--prompts: {path} has no prompt: write one a line.")
    return texts


def steps_of(text: str) -> tuple[int, str]:
    """The user's own steps and the axis: `20:30` is 20, with more up to 30 to choose from. Raises UsageError."""
    ranges = [[bound.strip() for bound in part.split(":")] for part in text.split(",")]
    for bounds in ranges:
        counts = [int(bound) for bound in bounds if bound.isdecimal()]
        if len(bounds) > 2 or len(counts) < len(bounds) or not 1 <= counts[0] <= counts[-1]:
            raise UsageError(f"--steps {text}: write a number, or a range such as 20:30.")
    return int(ranges[0][0]), text if ranges[0] != [text.strip()] else ""


async def _tune(
    target: Target, checkpoint: str | None, inputs: Callable[[str], dict[str, Any]]
) -> tuple[str, str, str]:
    async with ComfyClient(target.url) as client:
        name = checkpoint or await server_checkpoint(client, demo_scenario())
        graph = Graph()
        loaded = graph.add("SpeedLabCheckpointLoader", group="Load", ckpt_name=name)
        graph.add(
            "SpeedLabTune", group="Measure", model=loaded["model"], clip=loaded["clip"], vae=loaded["vae"],
            **inputs(name),
        )  # fmt: skip
        api = graph.to_api()
        line = ProgressLine("tune", api)
        try:
            result = await client.run(api, listener=line, ends_s=_ENDS_S)
        finally:
            line.done()
    shown = next(entry for entry in result.outputs.values() if "speedlab_tune" in entry)
    return shown["text"][0], *shown["speedlab_tune"]


def _copy(page: Path, to: Path) -> None:
    if not page.is_file():
        raise BenchError(f"--html: the page lies on the server's machine, as {page}.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, to)
    except OSError as error:
        raise BenchError(f"--html: cannot write {to}: {error.strerror or error}") from error

"""The options of `run.py fleet`."""

from __future__ import annotations

import argparse
from pathlib import Path

TASK_S, START_S, ATTEMPTS = 3600.0, 300.0, 3

_EPILOG = """\
A prompts file has one prompt a line; a .jsonl file has {"prompt": ..., "negative": ..., "seed": ...} on each line, the
last two as you like. A prompt without a seed gets --seed (the scenario's where it is not given) plus its place from 0.

Below --out: pictures/00001.png ... in the order of the prompts, manifest.jsonl in the same order (prompt, seed, file,
sha256, worker, times, attempts), records and results.csv as `bench` writes them. The same command goes on where an
earlier one ended, with everything that has no picture yet. Pictures are those of one machine bit for bit, on the same
kind of device (on a processor: with as many threads).

Times of workers that share a machine are not to be compared with anything: they wait for each other. Cells of a
benchmark (--cells) are measured one by one and on different workers, so quality against a baseline is left out, and
their times compare where the machines are the same and each has one worker.

Without --address a cluster of its own is started on this machine's loopback address and ended with the call. With it,
every machine needs Ray and Python in the same versions, a ComfyUI (the same path, COMFYUI_PATH, or `python run.py
setup`) and the model files (the same path, or in its ComfyUI's models); this pack travels by itself. docs/fleet.md says
more.
"""


def parser() -> argparse.ArgumentParser:
    """What `run.py fleet` takes."""
    result = argparse.ArgumentParser(
        prog="run.py fleet",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Spread prompts, or the cells of a benchmark, over many ComfyUI workers on a Ray cluster.",
        epilog=_EPILOG,
    )
    result.add_argument("scenario", metavar="SCENARIO", help="an id, as `run.py scenarios` lists them")
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, metavar="FILE", help="a picture for each of its prompts")
    what.add_argument("--cells", action="store_true", help="the scenario's own prompts, graphs and cells")
    result.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for the results")
    result.add_argument("--restart", action="store_true", help="begin anew in that folder: its pictures are deleted")
    result.add_argument(
        "--accept-changes", action="store_true",
        help="go on although prompts or settings have changed: results that are still asked for stay",
    )  # fmt: skip
    _add_cluster(result.add_argument_group("workers"))
    _add_sampling(result)
    return result


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--address", metavar="RAY", help="a running cluster: HOST:PORT, ray://HOST:PORT, or auto")
    group.add_argument("--workers", type=_count, metavar="N", help="how many (one a GPU; without a GPU one a machine)")
    group.add_argument("--cpu", action="store_true", help="run on processors, also where there are GPUs")
    group.add_argument(
        "--threads", type=_count, metavar="N",
        help="processor threads of each worker (on this machine without a GPU: its cores shared evenly)",
    )  # fmt: skip
    group.add_argument(
        "--attempts", type=_count, default=ATTEMPTS, metavar="N",
        help="workers that may be lost on one prompt before its row says so (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=_seconds, default=TASK_S, metavar="SECONDS",
        help="a prompt that takes longer counts as a lost worker (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--start-timeout", type=_seconds, default=START_S, metavar="SECONDS",
        help="so long may a worker take to start (default: %(default)g)",
    )  # fmt: skip


def _add_sampling(result: argparse.ArgumentParser) -> None:
    models = result.add_argument_group("model")
    for name, what in (
        ("checkpoint", "checkpoint file (without it a demo with random weights)"),
        ("vae", "VAE file in place of the checkpoint's"), ("controlnet", "ControlNet file"),
        ("refiner", "refiner checkpoint"), ("lora", "LoRA file"), ("lora-2", "second LoRA file"),
    ):  # fmt: skip
        models.add_argument(f"--{name}", metavar="FILE", help=what)
    sampling = result.add_argument_group("sampling")
    for name, what in (
        ("width", "pixels"), ("height", "pixels"), ("steps", "sampling steps"), ("batch", "pictures of one prompt"),
        ("seed", "seed of the first prompt"), ("repeats", "measured runs"), ("warmup", "runs before those"),
    ):  # fmt: skip
        sampling.add_argument(f"--{name}", type=int, metavar="N", help=what)
    sampling.add_argument("--negative", metavar="TEXT", help="negative prompt ('' for none) where the file has none")
    sampling.add_argument("--small", action="store_true", help="cut sizes and steps to try it out; records say so")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a whole number of 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError("seconds above 0")
    return value

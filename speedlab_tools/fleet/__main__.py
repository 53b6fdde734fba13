"""Command line: `python run.py fleet`. Reads the options, starts the workers, says what became of the tasks."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from speedlab.common.errors import ResultsError, SpeedLabError

from ..client.files import is_file, users_path
from ..host import from_environment
from ..host.base import CALLED_FROM
from ..host.child import INTERRUPTED
from ..host.progress import Reporter
from ..scenarios.catalog import UnknownScenarioError
from . import FleetError
from .cluster import Cluster, open_cluster
from .pool import Limits, Pool
from .tasks import Order, order_of
from .worker import WorkerSpec
from .writer import OK, Writer

_EVERY_S = 30.0
_EPILOG = """\
A prompts file has one prompt a line; a .jsonl file has {"prompt": ..., "negative": ..., "seed": ...} on each line, the
last two as you like. A prompt without a seed gets --seed (the scenario's where it is not given) plus its place from 0.

Below --out: pictures/00001.png ... in the order of the prompts, manifest.jsonl in the same order, records and
results.csv as `bench` writes them. The same command goes on where an earlier one ended. Images are those of one machine
bit for bit, on the same kind of device (on a CPU: with as many threads).

Times of workers that share a machine are not to be compared with anything: they wait for each other. Cells (--cells)
run on different workers, so quality against a baseline is left out.

Without --address a cluster of its own is started on this machine's loopback address and ended with the call.
With --address every machine needs Ray and Python in the same versions, a ComfyUI (the same path, COMFYUI_PATH, or
`python run.py setup`) and the model files; this pack travels by itself. docs/fleet.md says more.
"""
_MODELS = {
    "checkpoint": "checkpoint file (without it a demo with random weights)",
    "vae": "VAE file in place of the checkpoint's", "controlnet": "ControlNet file",
    "refiner": "refiner checkpoint", "lora": "LoRA file", "lora-2": "second LoRA file",
}  # fmt: skip
_SAMPLING = {
    "width": "pixels", "height": "pixels", "steps": "sampling steps", "batch": "images of one prompt",
    "seed": "seed of the first prompt", "repeats": "measured runs", "warmup": "runs before those",
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """What `run.py fleet` takes."""
    result = argparse.ArgumentParser(
        prog="run.py fleet",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Spread prompts, or the cells of a benchmark, over many ComfyUI workers on a Ray cluster.",
        epilog=_EPILOG,
    )
    add = result.add_argument
    add("scenario", metavar="SCENARIO", help="an id, as `run.py scenarios` lists them")
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, metavar="FILE", help="an image for each of its prompts")
    what.add_argument("--cells", action="store_true", help="the scenario's own prompts, graphs and cells")
    add("--out", type=Path, metavar="DIR", required=True, help="folder for the results")
    add("--restart", action="store_true", help="begin anew in that folder: its images are deleted")
    add("--accept-changes", action="store_true",
        help="go on although prompts or settings have changed: results that are still asked for stay")  # fmt: skip
    add = result.add_argument_group("workers").add_argument
    add("--address", metavar="RAY", help="a running cluster: HOST:PORT, ray://HOST:PORT, or auto")
    add("--workers", type=_count, metavar="N", help="how many (one a GPU; without a GPU one a machine)")
    add("--cpu", action="store_true", help="run on CPUs, also where there are GPUs")
    add("--threads", type=_count, metavar="N",
        help="CPU threads of each worker (on this machine without a GPU: its cores shared evenly)")  # fmt: skip
    add("--attempts", type=_count, default=3, metavar="N",
        help="workers that may be lost on one prompt before its row says so (default: %(default)s)")  # fmt: skip
    add("--timeout", type=_seconds, default=3600.0, metavar="SECONDS",
        help="a prompt that takes longer counts as a lost worker (default: %(default)g)")  # fmt: skip
    add("--start-timeout", type=_seconds, default=300.0, metavar="SECONDS",
        help="so long may a worker take to start (default: %(default)g)")  # fmt: skip
    models = result.add_argument_group("model")
    for name, text in _MODELS.items():
        models.add_argument(f"--{name}", metavar="FILE", help=text)
    add = result.add_argument_group("sampling").add_argument
    for name, text in _SAMPLING.items():
        add(f"--{name}", type=int, metavar="N", help=text)
    add("--negative", metavar="TEXT", help="negative prompt ('' for none) where the file has none")
    add("--small", action="store_true", help="cut sizes and steps to try it out; records say so")
    return result


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one call; returns the exit code (1: something failed, 2: wrong arguments, 130: interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(arguments)
    try:
        _make_absolute(args)
        return run(args, Reporter(interval_s=_EVERY_S))
    except UnknownScenarioError as error:
        sys.stderr.write(f"run.py fleet: {error}\n")
        return 2
    except (SpeedLabError, OSError) as error:
        sys.stderr.write(f"run.py fleet: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("run.py fleet: interrupted; all workers have ended. The same command goes on.\n")
        return INTERRUPTED


def run(args: argparse.Namespace, reporter: Reporter) -> int:
    """The command: 0 where every task has a result. Raises SpeedLabError, OSError."""
    order = order_of(args)
    for note in order.notes:
        reporter.line(note)
    tasks = order.work.tasks
    with Writer(args.out) as writer:
        todo = writer.open(order.asked, tasks, restart=args.restart, accept=args.accept_changes)
        if len(todo) < len(tasks):
            reporter.line(f"{len(tasks) - len(todo)} of {len(tasks)} results are there already.")
        try:
            if todo:
                _run_pool(args, order, todo, writer, reporter)
        except BaseException:
            with contextlib.suppress(ResultsError):  # what ended the run says more
                writer.write_manifest()
            raise
        reporter.line(f"manifest: {writer.write_manifest()}")
        failed = sum(row.status != OK for row in writer.rows.values())
        reporter.line(f"{len(tasks) - failed} of {len(tasks)} done" + (f", {failed} failed" if failed else ""))
        return 1 if failed else 0


def _run_pool(args: argparse.Namespace, order: Order, todo: Sequence[int], writer: Writer, reporter: Reporter) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="speedlab-fleet-", ignore_cleanup_errors=True) as base,
        open_cluster(args.address, args.workers) as cluster,
    ):
        on_gpus = bool(cluster.gpus) and not args.cpu
        count = min(worker_count(args.workers, cluster, on_gpus), len(todo))
        threads = _threads(args.threads, cluster, on_gpus, count)
        where = "on GPUs" if on_gpus else f"without a GPU, {threads or 'all'} threads each"
        reporter.line(f"Starting {count} workers ({where}) for {len(todo)} tasks ...")
        fleet, host = secrets.token_hex(4), from_environment()
        folder, logs = (base, str(args.out / "logs")) if cluster.embedded else (None, None)
        specs = {
            name: WorkerSpec(name, fleet, host, order.files, True if args.cpu else None, threads, args.start_timeout,
                             folder, logs)
            for name in (f"w{number}" for number in range(1, count + 1))
        }  # fmt: skip
        limits = Limits(args.timeout, args.start_timeout, args.attempts)
        pool = Pool(cluster.ray, specs, on_gpus, order.work, todo, writer, limits, reporter)
        with contextlib.closing(pool):
            pool.run()


def worker_count(wanted: int | None, cluster: Cluster, on_gpus: bool) -> int:
    """How many workers to start. Raises FleetError for more than the cluster can place."""
    most, what = (cluster.gpus, "GPUs, and each worker has one") if on_gpus else (cluster.cpus, "CPUs")
    if wanted is None:
        return most if on_gpus else max(cluster.nodes, 1)
    if wanted > most:
        raise FleetError(f"--workers {wanted}: the cluster has {most} {what}.")
    return wanted


def _threads(wanted: int | None, cluster: Cluster, on_gpus: bool, workers: int) -> str | None:
    """OMP_NUM_THREADS for the workers: as asked, as it is set here, or the cores of this machine shared evenly."""
    if wanted is not None:
        return str(wanted)
    set_here = os.environ.get("OMP_NUM_THREADS")
    if set_here or on_gpus or not cluster.embedded or workers == 1:
        return set_here or None
    return str(max((os.cpu_count() or 1) // workers, 1))


def _make_absolute(args: argparse.Namespace) -> None:
    """Paths as seen from where the user stands. The working directory stays: Ray would put the user's on every worker's
    module path.
    """
    here = Path(os.environ.get(CALLED_FROM) or Path.cwd())
    for name in ("prompts", "out"):
        if getattr(args, name) is not None:
            setattr(args, name, (here / users_path(getattr(args, name), f"--{name}")).absolute())
    for option in _MODELS:
        value = getattr(args, name := option.replace("-", "_"))
        if value is not None and is_file(path := here / users_path(value, f"--{option}")):
            setattr(args, name, str(path.absolute()))


if __name__ == "__main__":
    sys.exit(main())

"""The options of `run.py fleet`.

Command line: `python run.py fleet`. Starts the workers, runs the tasks, prints what became of them.
"""

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

from ..cli.commands import INTERRUPTED
from ..client.files import is_file, users_path
from ..host import from_environment
from ..host.base import CALLED_FROM
from ..scenarios.catalog import UnknownScenarioError
from .cluster import Cluster, RayCrew, open_cluster
from .driver import Fleet, FleetProgress, Limits
from .folder import FleetFolder, Keeper
from .messages import FleetError, WorkerSpec
from .order import Order, order_of
from .tasks import OK

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


_PATHS = ("prompts", "out")
_MODELS = ("checkpoint", "vae", "controlnet", "refiner", "lora", "lora_2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one call; returns the exit code (1: something failed, 2: wrong arguments, 130: interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(arguments)
    try:
        _from_where_the_user_stands(args)
        return run(args)
    except UnknownScenarioError as error:
        sys.stderr.write(f"run.py fleet: {error}\n")
        return 2
    except (SpeedLabError, OSError) as error:
        sys.stderr.write(f"run.py fleet: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("run.py fleet: interrupted; all workers have ended. The same command goes on.\n")
        return INTERRUPTED


def run(args: argparse.Namespace) -> int:
    """The command: 0 where every task has a result. Raises SpeedLabError, OSError."""
    order = order_of(args)
    for note in order.notes:
        _say(note)
    tasks = order.work.tasks
    with FleetFolder(args.out) as folder:
        todo = folder.open(order.asked, tasks, restart=args.restart, accept=args.accept_changes)
        keeper = Keeper(folder)
        keeper.mend()
        if len(todo) < len(tasks):
            _say(f"{len(tasks) - len(todo)} of {len(tasks)} results are there already.")
        try:
            if todo:
                _run_fleet(args, order, todo, keeper)
        except BaseException:
            with contextlib.suppress(ResultsError):  # what ended the run says more
                folder.write_manifest()
            raise
        _say(f"manifest: {folder.write_manifest()}")
        failed = [row for row in folder.rows.values() if row.status != OK]
        _say(f"{len(tasks) - len(failed)} of {len(tasks)} done" + (f", {len(failed)} failed" if failed else ""))
        return 1 if failed else 0


def _run_fleet(args: argparse.Namespace, order: Order, todo: Sequence[int], keeper: Keeper) -> None:
    progress = FleetProgress(len(order.work.tasks), len(order.work.tasks) - len(todo))
    with (
        tempfile.TemporaryDirectory(prefix="speedlab-fleet-", ignore_cleanup_errors=True) as base,
        open_cluster(args.address, args.workers) as cluster,
    ):
        on_gpus = bool(cluster.gpus) and not args.cpu
        count = _worker_count(args.workers, cluster, on_gpus)
        names = [f"w{number}" for number in range(1, min(count, len(todo)) + 1)]
        threads = _threads(args.threads, cluster, on_gpus, len(names))
        where = "on GPUs" if on_gpus else f"without a GPU, {threads or 'all'} threads each"
        _say(f"Starting {len(names)} workers ({where}) for {len(todo)} tasks ...")
        fleet = secrets.token_hex(4)
        specs = {name: _spec(name, fleet, args, order, cluster, threads, Path(base)) for name in names}
        limits = Limits(args.timeout, args.start_timeout, args.attempts)
        try:
            with RayCrew(cluster, specs, on_gpus) as crew:
                Fleet(order.work, todo, crew, names, keeper, limits, progress).run()
        finally:
            progress.end()


def _spec(
    name: str, fleet: str, args: argparse.Namespace, order: Order, cluster: Cluster, threads: str | None, base: Path
) -> WorkerSpec:
    host = from_environment()
    return WorkerSpec(
        name=name, fleet=fleet, comfyui=str(host.comfyui), python=str(host.python), managed=host.managed,
        files=order.files, cpu=True if args.cpu else None, threads=threads, start_timeout_s=args.start_timeout,
        folder=str(base) if cluster.embedded else None, logs=str(args.out / "logs") if cluster.embedded else None,
    )  # fmt: skip


def _worker_count(wanted: int | None, cluster: Cluster, on_gpus: bool) -> int:
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


def _from_where_the_user_stands(args: argparse.Namespace) -> None:
    """Make paths absolute. The working directory stays: Ray would put the user's on every worker's module path."""
    here = Path(os.environ.get(CALLED_FROM) or Path.cwd())
    for name in _PATHS:
        if getattr(args, name) is not None:
            setattr(args, name, (here / users_path(getattr(args, name), f"--{name}")).absolute())
    for name in _MODELS:
        value = getattr(args, name)
        if value is not None and is_file(path := here / users_path(value, f"--{name.replace('_', '-')}")):
            setattr(args, name, str(path.absolute()))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Command line: `python run.py fleet`. Starts the workers, runs the tasks, prints what became of them."""

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
from .cluster import Cluster, open_cluster
from .driver import Fleet, Limits
from .errors import FleetError
from .folder import FleetFolder
from .messages import WorkerSpec
from .options import parser
from .order import Order, order_of
from .progress import FleetProgress
from .start import RayCrew
from .tasks import OK
from .writer import Keeper

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

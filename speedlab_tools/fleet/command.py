"""`run.py fleet`: starts the workers, says what became of the tasks."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import tempfile
from collections.abc import Sequence

from speedlab.common.errors import ResultsError

from ..cli.arguments import MODELS
from ..client.files import is_file, users_path
from ..host import from_environment
from ..host.base import as_called
from ..host.progress import Reporter
from . import FleetError
from .cluster import Cluster, open_cluster
from .pool import Limits, Pool
from .tasks import Order, order_of
from .worker import WorkerSpec
from .writer import OK, Writer

_EVERY_S = 30.0


def run(args: argparse.Namespace) -> int:
    """The command: 0 where every task has a result. Raises SpeedLabError, OSError, UnknownScenarioError."""
    _make_absolute(args)
    reporter = Reporter(interval_s=_EVERY_S)
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
    """Paths as seen from where the user stands."""
    for name in ("prompts", "out"):
        if getattr(args, name) is not None:
            setattr(args, name, as_called(users_path(getattr(args, name), f"--{name}")))
    for option in MODELS:
        value = getattr(args, name := option.replace("-", "_"))
        if value is not None and is_file(path := as_called(users_path(value, f"--{option}"))):
            setattr(args, name, str(path))

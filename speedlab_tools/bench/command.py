"""`bench`: run scenarios on a real ComfyUI, print their rows, and write them as a table and a page."""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speedlab.common.errors import first_line
from speedlab.common.tables import format_table
from speedlab.measure.record import CSV_COLUMNS
from speedlab.measure.store import RunStore, write_atomically

from ..client.client import ComfyClient
from ..client.errors import BenchError, ServerGone
from ..client.files import ServerOptions, Target, open_server, prepare_output
from ..scenarios.catalog import ALL, SCENARIOS, find
from ..scenarios.overrides import Overrides, adapt, overrides_of
from ..scenarios.scenario import Scenario
from .html import html_page, write_html
from .models import ModelChoice, choose_models, server_checkpoint, server_refiner
from .results import Journal, Outcome, series_key
from .runner import run_scenario

MOST_RESTARTS = 3
BACK_WITHIN_S = 120.0  # how long a server that was not started here may take to come back
_ASKED_EVERY_S = 1.0


class Series:
    """The scenarios of one call. What a died server leaves undone is run on the next one."""

    def __init__(
        self, scenarios: Sequence[Scenario], choice: ModelChoice, args: argparse.Namespace, overrides: Overrides
    ) -> None:
        self.scenarios, self.choice, self.args, self.overrides = scenarios, choice, args, overrides
        self.outcomes: dict[str, Outcome] = {}
        self.restarts, self.reached = 0, False
        self.journal = Journal(args.out, self._key())
        if args.restart:
            self.journal.close()
            self.journal.done = {}

    def _key(self) -> str:
        args, choice = self.args, self.choice
        models = {"checkpoints": choice.checkpoints, "others": choice.others, "loras": choice.demo_loras,
                  "server": args.server}  # fmt: skip
        files = [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns) for some in choice.files.values() for path in some
        ]
        return series_key({"files": files, "ids": [s.id for s in self.scenarios], "settings": vars(self.overrides),
                           "models": models, "small": args.small})  # fmt: skip

    @property
    def waiting(self) -> list[Scenario]:
        """What has no outcome yet."""
        return [scenario for scenario in self.scenarios if scenario.id not in self.outcomes]

    async def run_on(self, target: Target) -> None:
        """Run what waits. Raises ServerGone with that scenario's outcome noted, so that the rest can go on."""
        async with ComfyClient(target.url) as client:
            self.reached = self.reached or await is_back(client, within_s=0.0)
            for scenario in self.waiting:
                try:
                    outcome = await self._run_through_restarts(client, scenario, target)
                except ServerGone as error:
                    tail = target.tail()
                    outcome = Outcome(scenario.id, error=f"{error}\n{tail}" if tail else str(error))
                    self._keep(outcome, scenario)
                    raise
                except BenchError as error:
                    outcome = Outcome(scenario.id, error=str(error))
                except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
                    nonsense = f"the server's answer makes no sense: {type(error).__name__}: {first_line(error)}"
                    outcome = Outcome(scenario.id, error=nonsense)
                self._keep(outcome, scenario)

    async def _run_through_restarts(self, client: ComfyClient, scenario: Scenario, target: Target) -> Outcome:
        """Run a scenario; where a server that was not started here restarts, go on with what it left undone.

        A server that was started here has most likely died of the scenario, which is not run on the next one.
        """
        while True:
            try:
                return await self._run(client, scenario)
            except ServerGone as error:
                if target.process is not None or not self.reached or self.restarts >= MOST_RESTARTS:
                    raise
                self.restarts += 1
                print(f"\n{error}. Waiting up to {BACK_WITHIN_S:.0f} s for it.", flush=True)
                if not await is_back(client, BACK_WITHIN_S):
                    raise
                print(f"ComfyUI at {client.url} answers again: going on with {scenario.id}.", flush=True)

    async def _run(self, client: ComfyClient, scenario: Scenario) -> Outcome:
        checkpoint = self.choice.checkpoints.get(scenario.id) or await server_checkpoint(client, scenario)
        others = self.choice.others_of(scenario)
        if "refiner" not in others and scenario.file("refiner") is not None:
            others["refiner"] = await server_refiner(client, scenario)
        wanted = adapt(scenario, self.overrides, checkpoint, others)
        return await run_scenario(client, wanted, self.args.out, small=self.args.small, journal=self.journal)

    def _keep(self, outcome: Outcome, scenario: Scenario) -> None:
        self.outcomes[scenario.id] = outcome
        report(outcome, scenario)
        self.write()

    def write(self) -> None:
        """Write table and page of what there is: after each scenario, so that an interrupt loses nothing."""
        outcomes = list(self.outcomes.values())
        if self.args.csv is not None:
            write_rows(self.args.csv, [row for outcome in outcomes for row in outcome.rows])
        if self.args.html is not None:
            write_html(self.args.html, html_page(self.scenarios, outcomes, self.choice.notes))


async def is_back(client: ComfyClient, within_s: float) -> bool:
    """Whether the server answers, or does so again within that time."""
    end = time.monotonic() + within_s
    while True:
        try:
            await client.system_stats()
            return True
        except BenchError:
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_ASKED_EVERY_S)


def report(outcome: Outcome, scenario: Scenario) -> None:
    """Print a scenario's rows, its files and its error."""
    print(f"\n{scenario.id}: {scenario.title}")
    if outcome.recalled:
        print(f"{outcome.recalled} of its parts were done by an earlier call (--restart runs them again)")
    if outcome.rows:
        print(format_table(outcome.rows))
    for row in outcome.rows:
        if row.get("status") not in ("", "ok", None):
            print(f"{row['plan']}: {row['status']}: {row['error']}")
    for entry in scenario.published:
        print(f"published ({entry.device}): {entry.figure}")
    for label, paths in (("image", outcome.images), ("record", outcome.records)):
        for path in paths:
            print(f"{label}: {path}")
    if outcome.table is not None:
        print(f"table: {outcome.table}")
    if outcome.error is not None:
        print(f"FAILED: {outcome.error}", flush=True)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as a table with the columns of results.csv. Raises BenchError naming the path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.getvalue().encode())
    except OSError as error:
        raise BenchError(f"--csv: cannot write {path}: {error.strerror or error}") from error


def chosen(names: Sequence[str]) -> list[Scenario]:
    """The scenarios named, each once; `all` is every one. Raises UnknownScenarioError."""
    wanted = [name for given in names for name in (SCENARIOS if given == ALL else (given,))]
    return [find(name) for name in dict.fromkeys(wanted)]


def run(args: argparse.Namespace) -> int:
    """The command: 0 where every scenario ended well, 1 otherwise. Raises BenchError before anything ran."""
    scenarios = chosen(args.scenarios)
    overrides = overrides_of(args)
    args.out = prepare_output(args.out)
    RunStore(args.out).check_writable()
    for path in (args.csv, args.html):
        if path is not None and path.is_dir():
            raise BenchError(f"{path} is a folder; name a file")
    choice = choose_models(args, scenarios)
    for note in choice.notes:
        print(note)
    series = Series(scenarios, choice, args, overrides)
    if series.journal.done:
        print(f"Going on with an interrupted series: {len(series.journal.done)} parts are done. --restart starts over.")
    gone = run_series(series, lambda: open_server(ServerOptions(args.server, args.port, args.out), choice.files))
    outcomes = series.outcomes
    failed = [scenario.id for scenario in scenarios if scenario.id not in outcomes or outcomes[scenario.id].error]
    if failed:
        print(f"\n{len(failed)} of {len(scenarios)} scenarios failed: {', '.join(failed)}")
    else:
        series.journal.close()
    if gone is not None:
        raise gone
    return 1 if failed else 0


def run_series(series: Series, connect: Callable[[], Any]) -> ServerGone | None:
    """Run everything; a server started here that dies is started again for the rest. What ended it early, or None."""
    for attempt in range(MOST_RESTARTS + 1):
        with connect() as target:
            try:
                asyncio.run(series.run_on(target))
                return None
            except ServerGone as error:
                gone, again = error, target.process is not None and attempt < MOST_RESTARTS
        if not series.waiting:
            return gone
        if not again:
            break
        print("Starting ComfyUI again for the scenarios that are left.", flush=True)
    left = ", ".join(scenario.id for scenario in series.waiting)
    print(f"Not run, since the server is gone: {left}. The same command goes on with them.")
    return gone

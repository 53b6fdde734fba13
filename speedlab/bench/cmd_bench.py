"""`bench`: run scenarios on a real ComfyUI and print the table row of each."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from ..profiling.store import RunStore
from .client import ComfyClient
from .errors import BenchError, ServerGone
from .files import prepare_output
from .models import ModelChoice, choose_models, server_checkpoint, server_refiner
from .overrides import Overrides, adapt, overrides_of
from .results import Outcome
from .runner import run_scenario
from .scenario import Scenario
from .scenarios import find
from .session import ServerOptions, Target, open_server
from .tables import format_table


async def _run_all(
    target: Target, scenarios: Sequence[Scenario], choice: ModelChoice, args: argparse.Namespace, overrides: Overrides
) -> list[Outcome]:
    outcomes = []
    async with ComfyClient(target.url) as client:
        for scenario in scenarios:
            checkpoint = choice.checkpoints.get(scenario.id) or await server_checkpoint(client, scenario)
            others = dict(choice.others)
            if "refiner" not in others and scenario.file("refiner") is not None:
                others["refiner"] = await server_refiner(client, scenario)
            wanted = adapt(scenario, overrides, checkpoint, others)
            outcome = await run_scenario(client, wanted, args.out)
            report(outcome, scenario)
            outcomes.append(outcome)
    return outcomes


def report(outcome: Outcome, scenario: Scenario) -> None:
    """Print a scenario's rows, its files and its error."""
    print(f"\n{scenario.id}: {scenario.title}")
    if outcome.rows:
        print(format_table(outcome.rows))
    for entry in scenario.published:
        print(f"published ({entry.device}): {entry.figure}")
    for label, paths in (("picture", outcome.pictures), ("record", outcome.records)):
        for path in paths:
            print(f"{label}: {path}")
    if outcome.table is not None:
        print(f"table: {outcome.table}")
    if outcome.error is not None:
        print(f"FAILED: {outcome.error}")


def run(args: argparse.Namespace) -> int:
    """The command: 0 where every scenario ended well, 1 otherwise. Raises BenchError before anything ran."""
    scenarios = [find(name) for name in dict.fromkeys(args.scenarios)]
    overrides = overrides_of(args)
    args.out = prepare_output(args.out)
    RunStore(args.out).check_writable()
    choice = choose_models(args, scenarios)
    for note in choice.notes:
        print(note)
    with open_server(ServerOptions(args.server, args.port, args.out), choice.files) as target:
        try:
            outcomes = asyncio.run(_run_all(target, scenarios, choice, args, overrides))
        except ServerGone as error:
            tail = target.tail()
            raise BenchError(f"{error}\n{tail}" if tail else str(error)) from error
    failed = [outcome.name for outcome in outcomes if outcome.error is not None]
    if failed:
        print(f"\n{len(failed)} of {len(outcomes)} scenarios failed: {', '.join(failed)}")
    return 1 if failed else 0

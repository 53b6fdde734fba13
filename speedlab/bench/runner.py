"""Runs one scenario on a server and keeps what it left."""

from __future__ import annotations

from pathlib import Path

from .client import ComfyClient
from .errors import BenchError, ServerGone
from .graph import split_lanes
from .progress import ProgressLine
from .results import Outcome, fetch_pictures, fetch_records
from .scenario import Scenario
from .workflows import ui_graph


async def run_scenario(client: ComfyClient, scenario: Scenario, out: Path) -> Outcome:
    """Queue a scenario picture by picture; its outcome holds what was reached before an error."""
    outcome = Outcome(scenario.id)
    extra = {"extra_pnginfo": {"workflow": ui_graph(scenario)}}
    lanes = split_lanes(scenario.graph())
    several, prompts = len(lanes) > 1, scenario.settings.prompts
    # One lane a prompt where their numbers agree; any other graph has lanes of its own meaning.
    names = (
        [prompt.name for prompt in prompts] if len(prompts) == len(lanes) else [str(n + 1) for n in range(len(lanes))]
    )
    for number, (graph, lane_name) in enumerate(zip(lanes, names, strict=True), start=1):
        line = ProgressLine(f"{scenario.id}{f' {number}/{len(lanes)}' if several else ''}", graph)
        try:
            result = await client.run(graph, extra_data=extra, listener=line)
        except ServerGone:
            raise
        except BenchError as error:
            outcome.error = str(error)
            return outcome
        finally:
            line.done()
        name = f"{scenario.id}_{lane_name}" if several else scenario.id
        outcome.pictures += await fetch_pictures(client, result, out, name)
        await fetch_records(client, result, out, outcome)
    return outcome

"""Runs one scenario on a server and keeps what it left."""

from __future__ import annotations

from pathlib import Path

from ..errors import first_line
from .client import ComfyClient
from .errors import BenchError, ServerGone
from .graph import ApiGraph, split_lanes
from .journal import Journal
from .progress import ProgressLine
from .results import Outcome, fetch_pictures, fetch_records
from .scenario import Scenario
from .small import MARK, PROMPTS, shrink
from .warm_up import shape_of, warm_up, warm_up_graph, with_new_texts
from .workflows import ui_graph


def parts_of(scenario: Scenario, small: bool = False) -> list[tuple[str, ApiGraph]]:
    """The graphs that are queued one by one, each with the name of what it makes."""
    lanes = split_lanes(scenario.graph())
    prompts = scenario.settings.prompts
    # One lane a prompt where their numbers agree; any other graph has lanes of its own meaning.
    named = [f"{scenario.id}_{prompt.name}" for prompt in prompts] if len(prompts) == len(lanes) > 1 else []
    names = named or [f"{scenario.id}_{n}" if len(lanes) > 1 else scenario.id for n in range(1, len(lanes) + 1)]
    parts = list(zip(names, lanes, strict=True))
    if not small:
        return parts
    # Of the same thing with other prompts two are enough; lanes that differ are what the scenario is about.
    alike = len(prompts) == len(lanes) and not scenario.graph().plans
    return [(name, shrink(lane)) for name, lane in (parts[:PROMPTS] if alike else parts)]


async def run_scenario(
    client: ComfyClient, scenario: Scenario, out: Path, *, small: bool = False, journal: Journal | None = None
) -> Outcome:
    """Queue a scenario image by image, warmed up; its outcome holds what was reached before an error.

    Parts that `journal` holds are not run again. Raises ServerGone where the server died.
    """
    outcome = Outcome(scenario.id)
    parts = parts_of(scenario, small)
    warm = ""
    for number, (name, graph) in enumerate(parts, start=1):
        if journal is not None and journal.recall(name, out, outcome):
            outcome.recalled += 1
            continue
        line = ProgressLine(f"{scenario.id}{f' {number}/{len(parts)}' if len(parts) > 1 else ''}", graph)
        before = len(outcome.records), len(outcome.pictures)
        try:
            # Times of a small run say nothing, so nothing is done for them.
            if not small and shape_of(graph) != warm:
                before_it = warm_up_graph(graph)
                if before_it is not None:
                    await warm_up(client, before_it)
                warm = shape_of(graph)
            asked = graph if small else with_new_texts(graph)
            result = await client.run(asked, extra_data=extra_data(scenario, small), listener=line)
            outcome.pictures += await fetch_pictures(client, result, out, name)
            await fetch_records(client, result, out, outcome)
        except ServerGone:
            raise
        except BenchError as error:
            outcome.error = str(error)
            return outcome
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            outcome.error = f"the server's answer makes no sense: {type(error).__name__}: {first_line(error)}"
            return outcome
        finally:
            line.done()
        if journal is not None and outcome.error is None:
            runs = [path.stem for path in outcome.records[before[0] :]]
            journal.finished(name, runs, outcome.pictures[before[1] :])
    return outcome


def extra_data(scenario: Scenario, small: bool) -> dict[str, object]:
    """What a prompt carries beside its graph: the workflow, and the scenario's name for the record."""
    workflow = ui_graph(scenario)
    named = {**workflow["extra"]["speedlab"], "scenario": scenario.id + (MARK if small else "")}
    return {"extra_pnginfo": {"workflow": workflow, "speedlab": named}}

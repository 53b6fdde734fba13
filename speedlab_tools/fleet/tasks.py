"""What a fleet has to do: one task a prompt, or one a cell of a benchmark. Pure; graphs are built when needed.

One line of the manifest: what became of one task.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from speedlab.plans.axes import NO_AXIS, parse_axis, written_values
from speedlab.plans.plan_text import BASELINE_MARK

from ..bench.results import SWEEP
from ..bench.runner import extra_data, parts_of
from ..client.graph import ApiGraph
from ..scenarios.scenario import Prompt, Scenario
from .messages import FleetError

_PROBE = Prompt("probe", "speedlab fleet: the place of the prompt", 1297036692682702851)


@dataclass(frozen=True)
class Task:
    """One task. `index` is its place in the manifest; `key` is equal where the same picture is asked for."""

    index: int
    name: str
    prompt: str
    negative: str | None
    seed: int | None
    key: str


@dataclass(frozen=True)
class Payload:
    """A task's graph, and what travels beside it."""

    graph: ApiGraph
    extra: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The tasks in order, and how to build what one of them queues."""

    tasks: tuple[Task, ...]
    build: Callable[[Task], Payload]


def prompt_work(scenario: Scenario, prompts: Sequence[Prompt], *, models: object, small: bool = False) -> Work:
    """One task a prompt: the scenario's graph with that prompt alone. Raises FleetError where it takes no prompt.

    `models` identifies the model files, so that results of other ones are never taken for these.
    """
    _require_one_picture(scenario)
    template = _the_graph(_with_prompt(scenario, _PROBE), small)
    _require_prompt(scenario, template)
    common = _digest(template, models, small)
    tasks = tuple(
        Task(index, prompt.name, prompt.text, prompt.negative, prompt.seed,
             _digest(common, prompt.text, prompt.negative, prompt.seed))
        for index, prompt in enumerate(prompts)
    )  # fmt: skip

    def build(task: Task) -> Payload:
        wanted = _with_prompt(scenario, prompts[task.index])
        return Payload(_the_graph(wanted, small), extra_data(wanted, small))

    return Work(tasks, build)


def cell_work(scenario: Scenario, *, models: object, small: bool = False) -> Work:
    """One task a cell of the scenario's axes, and one a graph where it has none: what `bench` runs in turn."""
    graphs = [cell for name, graph in parts_of(scenario, small) for cell in _cells(name, graph)]
    first = scenario.settings.prompts[0]
    tasks = tuple(
        Task(index, name, *_prompt_of(graph, first), _digest(graph, models))
        for index, (name, graph) in enumerate(graphs)
    )
    extra = extra_data(scenario, small)
    return Work(tasks, lambda task: Payload(graphs[task.index][1], extra))


def _with_prompt(scenario: Scenario, prompt: Prompt) -> Scenario:
    return scenario.with_settings(replace(scenario.settings, prompts=(prompt,)))


def _require_one_picture(scenario: Scenario) -> None:
    """Refuse a scenario that has a prompt several times: each time it is made in another way, to be compared."""
    texts = [prompt.text for prompt in scenario.settings.prompts]
    if len(set(texts)) < len(texts):
        raise _several(scenario, len(texts) // len(set(texts)))


def _the_graph(scenario: Scenario, small: bool) -> ApiGraph:
    parts = parts_of(scenario, small)
    if len(parts) != 1:
        raise _several(scenario, len(parts))
    return parts[0][1]


def _several(scenario: Scenario, pictures: int) -> FleetError:
    return FleetError(
        f"{scenario.id} makes {pictures} pictures of one prompt, to compare them. --cells spreads them; --prompts "
        "takes a scenario that makes one, such as txt2img-default."
    )


def _require_prompt(scenario: Scenario, graph: ApiGraph) -> None:
    if any(node["class_type"] == SWEEP for node in graph.values()):
        raise FleetError(
            f"{scenario.id} is a benchmark over axes. --cells spreads its cells; --prompts takes a scenario that "
            "makes pictures, such as txt2img-default."
        )
    values = [value for node in graph.values() for value in node["inputs"].values()]
    for wanted, what in ((_PROBE.text, "prompt"), (_PROBE.seed, "seed")):
        if not any(value == wanted or (isinstance(value, str) and str(wanted) in value) for value in values):
            raise FleetError(
                f"{scenario.id} takes no {what}, so --prompts cannot be spread over it; --cells runs it as it is."
            )


def _cells(name: str, graph: ApiGraph) -> list[tuple[str, ApiGraph]]:
    """The graph once for every pair of its axes' values; as it is where it has no axes."""
    benches = [node_id for node_id, node in graph.items() if node["class_type"] == SWEEP]
    if len(benches) != 1:
        return [(name, graph)]
    (bench,) = benches
    inputs = graph[bench]["inputs"]
    made = []
    for y in _groups(inputs["axis_y"], inputs["values_y"]):
        for x in _groups(inputs["axis_x"], inputs["values_x"]):
            node = {**graph[bench], "inputs": {**inputs, "values_x": x, "values_y": y}}
            told = [f"{inputs[f'axis_{side}']} {value}" for side, value in (("x", x), ("y", y)) if value]
            made.append((", ".join([name, *told]), {**graph, bench: node}))
    return made


def _groups(axis: str, values: str) -> list[str]:
    """An axis' values one by one, without the mark of a baseline, which would lie on another worker.

    An open end stays with its values: the search for the largest batch begins where they end.
    """
    if axis == NO_AXIS:
        return [""]
    if parse_axis(axis, values).open_end:
        return [values]
    return [value.removeprefix(BASELINE_MARK).strip() for value in written_values(axis, values)]


def _prompt_of(graph: ApiGraph, first: Prompt) -> tuple[str, str | None, int | None]:
    """Prompt, negative and seed of a part, as far as it has one of each."""
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == SWEEP:
            seed = str(inputs["seed"]).strip()
            return str(inputs["positive"]), str(inputs["negative"]) or None, int(seed) if seed.isdigit() else None
    texts = [node["inputs"]["text"] for node in graph.values() if isinstance(node["inputs"].get("text"), str)]
    seeds = [node["inputs"]["seed"] for node in graph.values() if type(node["inputs"].get("seed")) is int]
    return (texts or [first.text])[0], texts[1] if len(texts) > 1 else None, seeds[0] if seeds else None


def _digest(*what: object) -> str:
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


OK, ERROR, LOST = "ok", "error", "lost"
# A name that the fleet gives: nothing else in a manifest is ever opened or deleted.
PICTURE = re.compile(r"pictures/[0-9]{5,7}(-[0-9]{1,4})?\.png")


@dataclass(frozen=True)
class PictureFile:
    """A picture: its path below the output folder, sha256 and size in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Row:
    """What became of a task. `status` is ok, error (ComfyUI's own), or lost (every worker that had it was lost).

    `seconds` go from hand-out to answer, `comfyui_seconds` are what ComfyUI took of them; `started` is local time.
    """

    index: int
    name: str
    prompt: str
    negative: str | None
    seed: int | None
    status: str
    pictures: tuple[PictureFile, ...]
    run_ids: tuple[str, ...]
    worker: str | None
    machine: str | None
    device: str | None
    attempts: int
    started: str | None
    seconds: float | None
    comfyui_seconds: float | None
    error: str | None
    key: str

    def line(self) -> str:
        """The row as one line of JSON, ASCII, so that no letter of a prompt can break a line."""
        return json.dumps(asdict(self)) + "\n"


def row_of(line: str) -> Row | None:
    """Read a line back; None for what is no row. Anybody may have changed the file."""
    try:
        data = json.loads(line)
        pictures = tuple(PictureFile(**picture) for picture in data.pop("pictures"))
        row = Row(**{**data, "pictures": pictures, "run_ids": tuple(data.pop("run_ids"))})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return row if _sound(row) else None


def _sound(row: Row) -> bool:
    texts: tuple[Any, ...] = (row.name, row.prompt, row.status, row.key, *row.run_ids)
    maybe: tuple[Any, ...] = (row.negative, row.worker, row.machine, row.device, row.started, row.error)
    return (
        type(row.index) is int
        and row.index >= 0
        and type(row.attempts) is int
        and all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in maybe)
        and all(number is None or isinstance(number, (int, float)) for number in (row.seconds, row.comfyui_seconds))
        and all(
            isinstance(picture.file, str) and PICTURE.fullmatch(picture.file) and type(picture.bytes) is int
            and isinstance(picture.sha256, str) for picture in row.pictures
        )
    )  # fmt: skip

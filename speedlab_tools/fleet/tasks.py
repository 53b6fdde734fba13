"""What one call asks for: its prompts or cells as tasks, the graph of each, the model files and the settings."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedlab.plans.axes import NO_AXIS, parse_axis, written_values
from speedlab.plans.plan_text import BASELINE_MARK

from ..bench.models import choose_models
from ..bench.results import SWEEP
from ..bench.runner import extra_data, parts_of
from ..client.graph import ApiGraph
from ..scenarios.catalog import find
from ..scenarios.overrides import MARK, MAX_SEED, adapt, overrides_of
from ..scenarios.scenario import Prompt, Scenario
from . import FleetError
from .worker import ModelFile

_SETTINGS = ("width", "height", "steps", "batch", "cfg", "sampler", "scheduler", "warmup", "repeats")
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_FIELDS = ("prompt", "negative", "seed")
_MOST_PROMPTS = 1_000_000
_PROBE = Prompt("probe", "speedlab fleet: the place of the prompt", 1297036692682702851)


@dataclass(frozen=True)
class Task:
    """One task. `index` is its place in the manifest; `key` is equal where the same image is asked for."""

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


@dataclass(frozen=True)
class Order:
    """`asked` names, for a reader, all that the results depend on."""

    work: Work
    files: tuple[ModelFile, ...]
    asked: dict[str, Any]
    notes: tuple[str, ...]


def order_of(args: argparse.Namespace) -> Order:
    """Read and check everything that needs no cluster. Raises FleetError, BenchError, UnknownScenarioError."""
    scenario, overrides = find(args.scenario), overrides_of(args)
    prompts_seed = overrides.seed if args.prompts is not None else None
    if prompts_seed is not None:
        overrides = replace(overrides, seed=None)
    args.server = None
    choice = choose_models(args, [scenario])
    wanted = adapt(scenario, overrides, choice.checkpoints.get(scenario.id), choice.others_of(scenario))
    paths = [(folder, path) for folder, some in choice.files.items() for path in some]
    files = tuple(ModelFile(folder, str(path), path.stat().st_size) for folder, path in paths)
    # Size and time of change: a file that was written again is another one.
    models = {f"{folder}/{path.name}": [path.stat().st_size, path.stat().st_mtime_ns] for folder, path in paths}
    asked = {
        "scenario": scenario.id + (MARK if args.small else ""),
        **{name: getattr(wanted.settings, name) for name in _SETTINGS},
        **({} if overrides.seed is None else {"seed": overrides.seed}),
        "models": models, "prompts": None, "quality": args.quality or None,
    }  # fmt: skip
    if args.quality and not args.cells:
        raise FleetError("--quality goes with --cells: images of --prompts have nothing to be compared with.")
    if args.cells:
        if args.negative is not None:
            raise FleetError("--negative goes with --prompts; --cells runs the scenario's own prompts.")
        return Order(
            cell_work(wanted, models=models, small=args.small, quality=args.quality), files, asked, choice.notes
        )
    first = wanted.settings.prompts[0]
    seed = first.seed if prompts_seed is None else prompts_seed
    negative = first.negative if args.negative is None else args.negative.strip() or None
    prompts = read_prompts(args.prompts, seed=seed, negative=negative)
    work = prompt_work(wanted, prompts, models=models, small=args.small)
    digest = hashlib.sha256(_read(args.prompts)).hexdigest()
    asked |= {"seed": seed, "negative": negative, "prompts": args.prompts.name, "prompts_sha256": digest}
    return Order(work, files, asked, choice.notes)


def read_prompts(path: Path, *, seed: int, negative: str | None) -> tuple[Prompt, ...]:
    """The prompts of a file in order. Blank lines do not count. Raises FleetError that names the line.

    A prompt without a seed of its own gets `seed` plus its place (from 0), one without a negative prompt `negative`.
    A blank negative prompt is none, zeroed conditioning; where the scenario's own `negative` is blank, that is encoded.
    """
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FleetError(f"--prompts: {path} is no UTF-8 text. Save it as UTF-8.") from error
    # Not splitlines(): that would also split at separators which may stand inside a prompt.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise FleetError(f"--prompts: {path} holds no prompt. Write one on each line.")
    if len(lines) > _MOST_PROMPTS:
        raise FleetError(f"--prompts: {path} holds {len(lines)} prompts; a fleet takes up to {_MOST_PROMPTS}.")
    blank = "" if negative == "" else None
    as_json = path.suffix.lower() in _JSON_SUFFIXES
    prompts = []
    for place, (number, line) in enumerate(lines):
        given: dict[str, Any] = _fields(line, f"{path}, line {number}") if as_json else {"prompt": line}
        own = given.get("negative", negative)
        own_seed = given.get("seed", (seed + place) % (MAX_SEED + 1))
        prompts.append(Prompt(f"{place + 1:05d}", given["prompt"], own_seed, own if own and own.strip() else blank))
    return tuple(prompts)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FleetError(f"--prompts: cannot read {path}: {error.strerror or error}") from error


def _fields(line: str, where: str) -> dict[str, Any]:
    """One JSON line, checked."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FleetError(f'{where}: this is no JSON object: write {{"prompt": "a lighthouse", "seed": 1}}.') from error
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str) or not given["prompt"].strip():
        raise FleetError(f'{where}: "prompt" is missing or no text.')
    if not isinstance(given.get("negative"), (str, type(None))):
        raise FleetError(f'{where}: "negative" is a text, or null for none.')
    try:
        f"{given['prompt']}{given.get('negative')}".encode()
    except UnicodeEncodeError as error:
        raise FleetError(f"{where}: half a character (a lone surrogate) is no text.") from error
    unknown = sorted(set(given) - set(_FIELDS))
    if unknown:
        raise FleetError(f"{where}: there is no field {unknown[0]!r}; a line has {', '.join(_FIELDS)}.")
    seed = given.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise FleetError(f'{where}: "seed" is a whole number from 0 to {MAX_SEED}.')
    return given


def prompt_work(scenario: Scenario, prompts: Sequence[Prompt], *, models: object, small: bool = False) -> Work:
    """One task a prompt: the scenario's graph with that prompt alone. Raises FleetError where it takes no prompt.

    `models` identifies the model files, so that results of other ones are never taken for these.
    """
    texts = [prompt.text for prompt in scenario.settings.prompts]
    if len(set(texts)) < len(texts):
        raise _several(scenario, len(texts) // len(set(texts)))
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


def cell_work(scenario: Scenario, *, models: object, small: bool = False, quality: bool = False) -> Work:
    """One task a cell of the scenario's axes, and one a graph where it has none: what `bench` runs in turn.

    With `quality` each cell runs beside its baseline, once, so that its image is compared.
    """
    graphs = [cell for name, graph in parts_of(scenario, small) for cell in _cells(name, graph, quality)]
    first = scenario.settings.prompts[0]
    tasks = tuple(
        Task(index, name, *_prompt_of(graph, first), _digest(graph, models))
        for index, (name, graph) in enumerate(graphs)
    )
    extra = extra_data(scenario, small)
    return Work(tasks, lambda task: Payload(graphs[task.index][1], extra))


def _with_prompt(scenario: Scenario, prompt: Prompt) -> Scenario:
    return scenario.with_settings(replace(scenario.settings, prompts=(prompt,)))


def _the_graph(scenario: Scenario, small: bool) -> ApiGraph:
    parts = parts_of(scenario, small)
    if len(parts) != 1:
        raise _several(scenario, len(parts))
    return parts[0][1]


def _several(scenario: Scenario, images: int) -> FleetError:
    return FleetError(
        f"{scenario.id} makes {images} images of one prompt, to compare them. --cells spreads them; --prompts takes a "
        "scenario that makes one, such as txt2img-default."
    )


def _require_prompt(scenario: Scenario, graph: ApiGraph) -> None:
    if any(node["class_type"] == SWEEP for node in graph.values()):
        raise FleetError(
            f"{scenario.id} is a benchmark over axes. --cells spreads its cells; --prompts takes a scenario that makes "
            "images, such as txt2img-default."
        )
    values = [value for node in graph.values() for value in node["inputs"].values()]
    for wanted, what in ((_PROBE.text, "prompt"), (_PROBE.seed, "seed")):
        if not any(value == wanted or (isinstance(value, str) and str(wanted) in value) for value in values):
            raise FleetError(
                f"{scenario.id} takes no {what}, so --prompts cannot be spread over it; --cells runs it as it is."
            )


def _cells(name: str, graph: ApiGraph, quality: bool) -> list[tuple[str, ApiGraph]]:
    """The graph once for every pair of its axes' values; as it is where it has no axes."""
    sweeps = [node_id for node_id, node in graph.items() if node["class_type"] == SWEEP]
    if len(sweeps) != 1:
        return [(name, graph)]
    (sweep,) = sweeps
    inputs = graph[sweep]["inputs"]
    made = []
    for side in ("x", "y") if quality else ():
        axis, text = inputs[f"axis_{side}"], inputs[f"values_{side}"]
        if axis != NO_AXIS and parse_axis(axis, text).open_end:
            raise FleetError(f"--quality compares images, and {name} searches for the most that fits: leave it out.")
    base_x, base_y = _baselines(inputs) if quality else (None, None)
    once = {"warmup": 0, "repeats": 1} if quality else {}
    for y in _groups(inputs["axis_y"], inputs["values_y"]):
        for x in _groups(inputs["axis_x"], inputs["values_x"]):
            values = {"values_x": _beside(base_x, x), "values_y": _beside(base_y, y)}
            node = {**graph[sweep], "inputs": {**inputs, **values, **once}}
            words = [f"{inputs[f'axis_{side}']} {value}" for side, value in (("x", x), ("y", y)) if value]
            made.append((", ".join([name, *words]), {**graph, sweep: node}))
    return made


def _baselines(inputs: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The values that cells are compared with, as Benchmark has it: along the axis with a mark, else one cell's."""
    found: list[str | None] = []
    marked = []
    for side in ("x", "y"):
        axis, text = inputs[f"axis_{side}"], inputs[f"values_{side}"]
        values = [] if axis == NO_AXIS or parse_axis(axis, text).open_end else written_values(axis, text)
        own = [value for value in values if value.startswith(BASELINE_MARK)]
        marked.append(bool(own))
        found.append(next((value.removeprefix(BASELINE_MARK).strip() for value in (*own, *values)), None))
    if marked[0] != marked[1]:
        found[marked.index(False)] = None
    return found[0], found[1]


def _beside(baseline: str | None, value: str) -> str:
    return value if baseline in (None, value) else f"{BASELINE_MARK}{baseline}\n{value}"


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

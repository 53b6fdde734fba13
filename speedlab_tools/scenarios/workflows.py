"""Writes every scenario's two files, or says which committed ones differ from what the table makes.

`scenarios` and `workflows`: what the table holds, and the files made from it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedlab.measure.plan_names import made_of

from ..client.errors import BenchError
from ..client.events import SAMPLERS
from ..client.files import ROOT, model_folders
from ..client.graph import SNAPSHOT, ApiGraph, is_link, signature_from_info, snapshot, snapshot_text
from .blueprints import BLUEPRINTS, blueprint_ui
from .canvas import UiGraph, to_ui
from .catalog import SCENARIOS, TEMPLATES
from .scenario import SOURCES, NeededFile, Scenario, models_of

# Samplers that write the name of their plan into a record; a name stands there with what it was given for.
_NAMED = frozenset({"SpeedLabProfileSampler", "SpeedLabEnsembleSampler"})
# What a frontend with an app mode makes one screen of: widgets to set by class and name, of which the sampler's chart
# is one, and the nodes whose images it shows. Other frontends keep it and do nothing with it.
_APPS: Mapping[str, tuple[tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    "txt2img-default": (
        (
            ("SpeedLabCheckpointLoader", "ckpt_name"),
            ("SpeedLabAccelerate", "preset"),
            ("SpeedLabTextEncode", "text"),
            ("SpeedLabProfileSampler", "steps"),
            ("SpeedLabProfileSampler", "seed"),
            ("SpeedLabProfileSampler", "speedlab_profile"),
        ),
        ("SpeedLabProfileReport",),
    )
}


def note_text(scenario: Scenario) -> str:
    """The note of a drag-in workflow, in Markdown: what it shows, needed files, settings, published figures."""
    settings = scenario.settings
    lines = [f"# {scenario.title}", "", scenario.shows, "", "## Files it needs"]
    lines += [f"- `{entry.default}` in `ComfyUI/{entry.folder}`: {entry.where}" for entry in scenario.files]
    lines += ["", "Pick your own file in the loader where its name differs.", "", "## Settings"]
    lines += [
        f"{settings.width}x{settings.height}, batch {settings.batch}, {settings.steps} steps, CFG {settings.cfg:g}, "
        f"{settings.sampler}, {settings.scheduler}; plan: {scenario.plan.name}"
    ]
    lines += _variant_lines(scenario)
    lines += ["", f"## Published by {SOURCES[scenario.source]}"]
    lines += [f"- {entry.figure} ({entry.device})" for entry in scenario.published]
    lines += [
        "",
        "A published figure is there to compare with; the report holds only what your machine measured.",
        "",
        f"Headless: `python run.py bench {scenario.id}`",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """The one setting in which a variant differs: `value` of the input `name` on the nodes called `titles`."""

    titles: tuple[str, ...]
    name: str
    value: Any


def difference(variant: Scenario) -> Difference:
    """What has to be set in the shared workflow for a variant; BenchError where more than one setting differs."""
    base = api_graph(SCENARIOS[variant.variant_of])
    found = [
        (node["_meta"]["title"], name, value)
        for (node_id, node), before in zip(api_graph(variant).items(), base.values(), strict=True)
        for name, value in node["inputs"].items()
        if (node["class_type"], value) != (before["class_type"], before["inputs"].get(name))
    ]
    values = {(name, value) for _, name, value in found if not is_link(value)}
    if len(values) != 1 or any(is_link(value) for _, _, value in found):
        raise BenchError(f"{variant.id} differs from {variant.variant_of} by {len(found)} settings; one is the most")
    ((name, value),) = values
    return Difference(tuple(dict.fromkeys(title for title, _, _ in found)), name, value)


def variants(scenario: Scenario) -> list[Scenario]:
    """The scenarios that share the workflow file of this one."""
    return [other for other in SCENARIOS.values() if other.variant_of == scenario.id]


def _variant_lines(scenario: Scenario) -> list[str]:
    lines = []
    for variant in variants(scenario):
        change = difference(variant)
        figures = "; ".join(f"{entry.figure} ({entry.device})" for entry in variant.published)
        lines.append(
            f"- **{variant.title}**: set `{change.name}` of {', '.join(change.titles)} to `{change.value}`. Published: "
            f"{figures}. Headless: `python run.py bench {variant.id}`"
        )
    return ["", "## Variants of this workflow", *lines] if lines else []


def ui_graph(scenario: Scenario) -> UiGraph:
    """The drag-in workflow. Its `extra.speedlab` names scenario and plan, and what nodes the name is of."""
    graph = scenario.graph()
    named: dict[str, object] = {"scenario": scenario.id, "plan": scenario.plan.name}
    if graph.plans:
        named["plans"] = {str(node): plan for node, plan in graph.plans.items()}
    api = graph.to_api()
    stands_for = {node: made_of(api, node) for node, entry in api.items() if entry["class_type"] in _NAMED}
    if stands_for:
        named["made_of"] = stands_for
    extra: dict[str, object] = {"speedlab": named}
    if scenario.id in _APPS:
        extra["linearData"] = _app(api, *_APPS[scenario.id])
    note = note_text(scenario)
    ui = to_ui(
        graph, name=scenario.id, note=note, note_title=scenario.title, extra=extra, models=models_of(scenario.files)
    )
    if scenario.id in _APPS:
        _tell_texts_apart(ui)
    return ui


def _tell_texts_apart(ui: UiGraph) -> None:
    """Give each text the name of its node: an app shows the names of widgets alone."""
    for node in ui["nodes"]:
        for slot in node["inputs"]:
            if node["type"] == "SpeedLabTextEncode" and "widget" in slot:
                slot["label"] = node["title"]


def _app(api: ApiGraph, widgets: Sequence[tuple[str, str]], shown: Sequence[str]) -> dict[str, object]:
    """The screen of an app as the frontend keeps it in `extra.linearData`."""
    of_class: dict[str, list[int]] = {}
    for node_id, node in api.items():
        of_class.setdefault(node["class_type"], []).append(int(node_id))
    return {
        "inputs": [[node, widget] for name, widget in widgets for node in of_class[name]],
        "outputs": [node for name in shown for node in of_class[name]],
    }


def api_graph(scenario: Scenario) -> ApiGraph:
    """The same graph for `/prompt`. The samplers' `_meta` names scenario and plan: a bare prompt has no workflow."""
    graph = scenario.graph()
    api = graph.to_api()
    for node_id, node in api.items():
        if node["class_type"] in SAMPLERS:
            plan = graph.plans.get(int(node_id), scenario.plan.name)
            named = {"scenario": scenario.id, "plan": plan}
            if node["class_type"] in _NAMED:
                named["made_of"] = made_of(api, node_id)
            node["_meta"]["speedlab"] = named
    return api


def _text(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def files_of(scenario: Scenario) -> dict[str, str]:
    """The files of a scenario, relative path -> text: for `/prompt`, and to drag in unless it is a variant."""
    files = {f"workflows/api/{scenario.id}.json": _text(api_graph(scenario))}
    if not scenario.variant_of:
        files[ui_path(scenario.id)] = _text(ui_graph(scenario))
    return files


def ui_path(scenario_id: str) -> str:
    """The drag-in workflow of a scenario, or the one that it is a variant of."""
    shared = SCENARIOS[scenario_id].variant_of or scenario_id
    return f"workflows/{TEMPLATES[shared]}.json" if shared in TEMPLATES else f"workflows/scenarios/{shared}.json"


def all_files() -> dict[str, str]:
    """Every file that the tables make: path below the root -> text."""
    files = {path: text for scenario in SCENARIOS.values() for path, text in files_of(scenario).items()}
    return {**files, **{f"subgraphs/{entry.name}.json": _text(blueprint_ui(entry)) for entry in BLUEPRINTS}}


def differences(root: Path = ROOT) -> list[str]:
    """One line for each file below `root` that is missing, out of date, or no longer in the tables."""
    wanted = all_files()
    found = {
        path.relative_to(root).as_posix()
        for pattern in ("workflows/*.json", "workflows/scenarios/*.json", "workflows/api/*.json", "subgraphs/*.json")
        for path in root.glob(pattern)
    }
    lines = [f"{name}: nothing makes it" for name in sorted(found - wanted.keys())]
    for name, text in sorted(wanted.items()):
        if name not in found:
            lines.append(f"{name}: missing")
        elif (root / name).read_text(encoding="utf-8") != text:
            lines.append(f"{name}: out of date")
    return lines


def write(root: Path = ROOT) -> list[Path]:
    """Write every file below `root`; returns their paths."""
    paths = []
    for name, text in all_files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def located(entry: NeededFile, folders: Sequence[Path]) -> Path | None:
    """The needed file in one of the models folders, or None."""
    kind = entry.folder.removeprefix("models/")
    return next((path for folder in folders if (path := folder / kind / entry.default).is_file()), None)


def missing(scenario: Scenario, folders: Sequence[Path]) -> list[str]:
    """What this machine lacks for a scenario: files and Python packages. Empty where it is ready."""
    files = [f"{e.folder}/{e.default}" for e in scenario.files if not e.optional and located(e, folders) is None]
    return files + [f"package {name}" for name in scenario.packages if not _has_package(name)]


def _has_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def describe(scenario: Scenario, folders: Sequence[Path]) -> str:
    """A scenario in a few lines: id, title, status, and what it needs."""
    lacking = missing(scenario, folders)
    status = f"missing: {', '.join(lacking)}" if lacking else "ready"
    lines = [f"{scenario.id}  ({scenario.source})  {scenario.title}", f"    {status}"]
    lines.append(f"    {ui_path(scenario.id)}")
    if scenario.variant_of:
        change = difference(scenario)
        lines[-1] += f" with {change.name} = {change.value}"
    for entry in scenario.files:
        found = "there" if located(entry, folders) else "not there"
        lines.append(f"    {entry.folder}/{entry.default}: {found}")
    lines += [f"    package {name}: {'there' if _has_package(name) else 'not there'}" for name in scenario.packages]
    return "\n".join(lines)


def run_scenarios(args: argparse.Namespace) -> int:
    """Print every scenario."""
    folders = model_folders()
    for scenario in SCENARIOS.values():
        print(describe(scenario, folders))
    ready = sum(1 for scenario in SCENARIOS.values() if not missing(scenario, folders))
    print(f"\n{len(SCENARIOS)} scenarios, {ready} ready with their own files")
    print("models folders: " + (", ".join(str(folder) for folder in folders) or "none known"))
    print("A checkpoint that is not there is replaced by a demo with random weights; --checkpoint FILE names your own.")
    return 0


def run_workflows(args: argparse.Namespace) -> int:
    """Write the workflow files, or with --check say which differ (exit code 1)."""
    if args.signatures is not None:
        _renew_signatures(args.signatures)
    if args.check:
        lines = differences()
        for line in lines:
            print(line)
        if lines:
            print("Run 'python -m speedlab_tools workflows' and commit what it writes.")
        return 1 if lines else 0
    for path in write():
        print(path)
    return 0


def _renew_signatures(url: str) -> None:
    """Take the signatures of the snapshot's nodes, and of every node of this pack, from a live server."""
    from ..client.client import ComfyClient  # needs a package that `scenarios` does without

    async def fetch() -> dict[str, dict]:
        async with ComfyClient(url) as client:
            return await client.object_info()

    info = asyncio.run(fetch())
    ids = set(snapshot()) | {node_id for node_id in info if node_id.startswith("SpeedLab")}
    missing = sorted(ids - info.keys())
    if missing:
        raise BenchError(f"the server at {url} lacks {', '.join(missing)}")
    text = snapshot_text(signature_from_info(node_id, info[node_id]) for node_id in ids)
    SNAPSHOT.write_text(text, encoding="utf-8", newline="\n")
    snapshot.cache_clear()
    print(SNAPSHOT)

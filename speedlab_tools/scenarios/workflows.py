"""Writes every scenario's two files, or says which committed ones differ from what the table makes.

`scenarios` and `workflows`: what the table holds, and the files made from it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from speedlab.measure.plan_names import made_of

from ..client.errors import BenchError
from ..client.events import SAMPLERS
from ..client.files import ROOT, model_folders
from ..client.graph import SNAPSHOT, ApiGraph, signature_from_info, snapshot, snapshot_text
from .canvas import UiGraph, to_ui
from .catalog import SCENARIOS, TEMPLATES
from .scenario import SOURCES, NeededFile, Scenario

FOLDER = ROOT / "workflows"
# Samplers that write the name of their plan into a record; a name stands there with what it was given for.
_NAMED = frozenset({"SpeedLabProfileSampler", "SpeedLabEnsembleSampler"})


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
    lines += ["", f"## Published by {SOURCES[scenario.source]}"]
    lines += [f"- {entry.figure} ({entry.device})" for entry in scenario.published]
    lines += [
        "",
        "A published figure is there to compare with; the report holds only what your machine measured.",
        "",
        f"Headless: `python run.py bench {scenario.id}`",
    ]
    return "\n".join(lines)


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
    extra = {"speedlab": named}
    return to_ui(graph, name=scenario.id, note=note_text(scenario), note_title=scenario.title, extra=extra)


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
    """Both files of a scenario: relative path -> text."""
    return {
        f"api/{scenario.id}.json": _text(api_graph(scenario)),
        ui_path(scenario.id): _text(ui_graph(scenario)),
    }


def ui_path(scenario_id: str) -> str:
    """Where the drag-in workflow of a scenario is, below `workflows/`."""
    return f"{scenario_id}.json" if scenario_id in TEMPLATES else f"scenarios/{scenario_id}.json"


def all_files(scenarios: Iterable[Scenario] = SCENARIOS.values()) -> dict[str, str]:
    """Every file that the table makes: path relative to `workflows/` -> text."""
    return {path: text for scenario in scenarios for path, text in files_of(scenario).items()}


def differences(folder: Path = FOLDER) -> list[str]:
    """One line for each file in `folder` that is missing, out of date, or no longer in the table."""
    wanted = all_files()
    found = {
        path.relative_to(folder).as_posix()
        for pattern in ("*.json", "scenarios/*.json", "api/*.json")
        for path in folder.glob(pattern)
    }
    lines = [f"{name}: no scenario makes it" for name in sorted(found - wanted.keys())]
    for name, text in sorted(wanted.items()):
        if name not in found:
            lines.append(f"{name}: missing")
        elif (folder / name).read_text(encoding="utf-8") != text:
            lines.append(f"{name}: out of date")
    return lines


def write(folder: Path = FOLDER) -> list[Path]:
    """Write every file into `folder`; returns their paths."""
    for name in ("api", "scenarios"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in all_files().items():
        path = folder / name
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
            print(f"workflows/{line}")
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

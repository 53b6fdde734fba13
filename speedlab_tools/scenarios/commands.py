"""`scenarios` and `workflows`: what the table holds, and the files made from it."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..client.client import ComfyClient
from ..client.errors import BenchError
from ..client.graph import SNAPSHOT, signature_from_info, snapshot, snapshot_text
from ..client.session import model_folders
from . import workflows
from .catalog import SCENARIOS
from .scenario import NeededFile, Scenario


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
        lines = workflows.differences()
        for line in lines:
            print(f"workflows/{line}")
        if lines:
            print("Run 'python -m speedlab_tools workflows' and commit what it writes.")
        return 1 if lines else 0
    for path in workflows.write():
        print(path)
    return 0


def _renew_signatures(url: str) -> None:
    """Take the signatures of the snapshot's nodes, and of every node of this pack, from a live server."""

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

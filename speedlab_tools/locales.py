"""The English texts of all nodes as ComfyUI's frontend reads them, written from the node classes.

`python -m speedlab_tools locales` writes `locales/en/nodeDefs.json`; other languages are translated from it by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .host.base import from_environment, pack_root
from .host.inprocess import start

ENGLISH = pack_root() / "locales" / "en" / "nodeDefs.json"
# The widget that ComfyUI's frontend puts behind a seed; it is translated like an input of the node.
_SEED_CONTROL = "control_after_generate"


def run(_options: argparse.Namespace) -> int:
    """Write the file anew, with the nodes in a ComfyUI in this process."""
    with tempfile.TemporaryDirectory() as base:
        pack = start(from_environment().comfyui, Path(base))
        text = file_text(english(pack.NODE_CLASS_MAPPINGS, pack.NODE_DISPLAY_NAME_MAPPINGS))
    changed = ENGLISH.read_text(encoding="utf-8") != text
    ENGLISH.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{ENGLISH}: {'written' if changed else 'as it was'}\n")
    return 0


def file_text(texts: Mapping[str, Any]) -> str:
    """The file: nodes that it has stay where they are, as in the other languages; new ones come last."""
    known = json.loads(ENGLISH.read_text(encoding="utf-8"))
    ordered = {node_id: texts[node_id] for node_id in (*known, *texts) if node_id in texts}
    return json.dumps(ordered, ensure_ascii=False, indent=2) + "\n"


def english(classes: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Name, description, inputs and outputs of every node."""
    return {
        node_id: {
            "display_name": names[node_id],
            "description": cls.DESCRIPTION,
            "inputs": _inputs(cls),
            "outputs": {
                str(slot): {"name": name, "tooltip": tooltip}
                for slot, (name, tooltip) in enumerate(zip(cls.RETURN_NAMES, cls.OUTPUT_TOOLTIPS, strict=True))
            },
        }
        for node_id, cls in classes.items()
    }


def _inputs(cls: Any) -> dict[str, dict[str, str]]:
    types = cls.INPUT_TYPES()
    entries: dict[str, dict[str, str]] = {}
    for name, spec in {**types.get("required", {}), **types.get("optional", {})}.items():
        entries[name] = {"name": name, "tooltip": spec[1]["tooltip"]}
        if spec[1].get(_SEED_CONTROL):
            entries[_SEED_CONTROL] = {"name": "control after generate"}
    return entries

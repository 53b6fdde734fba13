"""What the executing prompt tells about a node: which nodes feed it, which scenario it belongs to.

The prompt is plain JSON from the user, so everything here is optional and nothing in it is trusted to have a type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .plan_names import still_made_of
from .timeline import PhaseEntry

_PHASE_NODES = {
    "load": ("SpeedLabCheckpointLoader", "SpeedLabVAELoader", "SpeedLabLoraStack"),
    "text_encode": ("SpeedLabTextEncode", "SpeedLabPromptQueue"),
    "decode": ("SpeedLabVAEDecode", "SpeedLabTinyVAEDecode"),
}
_CORE_PHASE_NODES = {"text_encode": ("CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner")}
_MAX_NAME = 120


@dataclass(frozen=True)
class NodeContext:
    """The graph around a node: hidden inputs PROMPT, EXTRA_PNGINFO and UNIQUE_ID as ComfyUI hands them over."""

    prompt: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    node_id: str | None = None

    @staticmethod
    def of(prompt: Any, extra_pnginfo: Any, unique_id: Any) -> NodeContext:
        """Build a context from hidden inputs, any of which may be missing."""
        return NodeContext(
            prompt if isinstance(prompt, Mapping) else {},
            extra_pnginfo if isinstance(extra_pnginfo, Mapping) else {},
            None if unique_id is None else str(unique_id),
        )

    def ancestors(self) -> frozenset[str]:
        """Ids of all nodes that feed this one, itself included."""
        found: set[str] = set()
        waiting = [self.node_id] if self.node_id is not None else []
        while waiting:
            current = waiting.pop()
            if current in found:
                continue
            found.add(current)
            waiting += _links(self.prompt.get(current))
        return frozenset(found)

    def is_output_used(self, index: int) -> bool:
        """Whether a node of the prompt takes output `index` of this one; True where the prompt is not known."""
        if self.node_id not in self.prompt:
            return True
        inputs = (_path(node, "inputs") for node in self.prompt.values())
        links = (value for taken in inputs if isinstance(taken, Mapping) for value in taken.values())
        return any(
            isinstance(link, (list, tuple)) and len(link) == 2 and str(link[0]) == self.node_id and link[1] == index
            for link in links
        )

    def scenario(self) -> dict[str, str]:
        """`scenario` and `plan` that a workflow or a client named, as short texts."""
        named = {"plan": plan[:_MAX_NAME]} if (plan := self._given_plan()[0]) else {}
        for place in self._places():
            value = _path(place, "scenario")
            if isinstance(value, str) and value and "scenario" not in named:
                named["scenario"] = value[:_MAX_NAME]
        return named

    def is_plan_as_named(self) -> bool:
        """Whether the graph still is what its plan was named for; False where nothing tells."""
        told = self._given_plan()[1]
        return told is not None and still_made_of(self.prompt, self.node_id or "", told)

    def _places(self) -> list[Any]:
        """Where a name may stand: from a client, in a workflow, and at the node itself."""
        return [
            self.extra.get("speedlab"),
            _path(self.extra.get("workflow"), "extra", "speedlab"),
            _path(self.prompt.get(self.node_id or ""), "_meta", "speedlab"),
        ]

    def _given_plan(self) -> tuple[str | None, str | None]:
        """The name of the plan, and what it was given for as `made_of` wrote it."""
        node_id, places = self.node_id or "", self._places()
        # A workflow of several plans names each by its sampler.
        for keys in (("plans", node_id), ("plan",)):
            for place in places:
                plan = _path(place, *keys)
                if isinstance(plan, str) and plan:
                    told = _path(place, "made_of")
                    told = told.get(node_id) if isinstance(told, Mapping) else told
                    return plan, told if isinstance(told, str) else None
        return None, None

    def workflow_id(self) -> str | None:
        """The id of the canvas's workflow; None for a prompt that came without one."""
        value = _path(self.extra.get("workflow"), "id")
        return value[:_MAX_NAME] if isinstance(value, str) else None

    def checkpoint_name(self) -> str | None:
        """The file that a core loader among the ancestors names."""
        for node_id in sorted(self.ancestors()):
            inputs = _path(self.prompt.get(node_id), "inputs")
            for key in ("ckpt_name", "unet_name"):
                if isinstance(inputs, Mapping) and isinstance(inputs.get(key), str):
                    return str(inputs[key])
        return None

    def phase_ms(self, phase: str, entries: Iterable[PhaseEntry], list_index: int | None = None) -> float | str | None:
        """Milliseconds that this pack's nodes upstream spent in a phase, for item `list_index` of a list.

        `cached` where such a node is upstream but was not executed for this prompt (for text encoding: one of them,
        since the time of the others is no whole one), None where there is none, or where a core node did part of it.
        """
        upstream = self.ancestors()
        by_node = {node_id: str(_path(self.prompt.get(node_id), "class_type")) for node_id in upstream}
        classes = set(by_node.values())
        if classes & set(_CORE_PHASE_NODES.get(phase, ())):
            return None
        mine = [e for e in entries if e.phase == phase and self._concerns(e, upstream)]
        own = _PHASE_NODES.get(phase, ())
        if phase == "text_encode" and {n for n, kind in by_node.items() if kind in own} - {e.node_id for e in mine}:
            return "cached"
        if mine:
            return round(sum(e.ms for e in _of_item(mine, list_index)), 3)
        return "cached" if classes & set(own) else None

    def concerning(self, entries: Iterable[PhaseEntry]) -> list[PhaseEntry]:
        """The entries of nodes upstream."""
        upstream = self.ancestors()
        return [e for e in entries if self._concerns(e, upstream)]

    def _concerns(self, entry: PhaseEntry, upstream: frozenset[str]) -> bool:
        # A node made by another node while the prompt runs is not in the prompt; its time still belongs to it.
        return entry.node_id in upstream or entry.node_id not in self.prompt


def _of_item(entries: Sequence[PhaseEntry], list_index: int | None) -> list[PhaseEntry]:
    """Of each node's entries the one for this item of a list; ComfyUI repeats the last one of a shorter list."""
    by_node: dict[str | None, list[PhaseEntry]] = {}
    for entry in entries:
        by_node.setdefault(entry.node_id, []).append(entry)
    if list_index is None:
        return list(entries)
    return [items[min(list_index, len(items) - 1)] for items in by_node.values()]


def _links(node: Any) -> Sequence[str]:
    inputs = _path(node, "inputs")
    values = inputs.values() if isinstance(inputs, Mapping) else ()
    return [str(v[0]) for v in values if isinstance(v, (list, tuple)) and len(v) == 2 and isinstance(v[0], (str, int))]


def _path(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value

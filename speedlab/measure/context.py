"""What the executing prompt tells about a node: which nodes feed it, which scenario it belongs to.

The prompt is plain JSON from the user, so everything here is optional and nothing in it is trusted to have a type.

What the nodes of a graph do, as seen from the types of their inputs and outputs as ComfyUI's table of nodes has them.

Names of nodes are without end, types are few: what takes a model and gives latents or images has sampled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .plan_names import still_made_of
from .timeline import PhaseEntry

_PHASE_NODES = {
    "load": ("SpeedLabCheckpointLoader", "SpeedLabVAELoader", "SpeedLabLoraStack"),
    "text_encode": ("SpeedLabTextEncode", "SpeedLabPromptQueue"),
    "free": ("SpeedLabFreeMemory",),
    "decode": ("SpeedLabVAEDecode", "SpeedLabTinyVAEDecode"),
}
_MAX_NAME = 120


@dataclass(frozen=True)
class NodeContext:
    """The graph around a node: hidden inputs PROMPT, EXTRA_PNGINFO, UNIQUE_ID and DYNPROMPT as ComfyUI hands them over.

    `graph` is the prompt with the nodes that others made while it runs (loops, node expansion), and `makers` tells by
    whom; where ComfyUI does not hand that over, `graph` is the prompt as it was queued.
    """

    prompt: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    node_id: str | None = None
    graph: Mapping[str, Any] = field(default_factory=dict)
    makers: Mapping[str, str] | None = None

    @staticmethod
    def of(prompt: Any, extra_pnginfo: Any, unique_id: Any, dynprompt: Any = None) -> NodeContext:
        """Build a context from hidden inputs, any of which may be missing."""
        queued = prompt if isinstance(prompt, Mapping) else {}
        graph, makers = _expanded(dynprompt)
        return NodeContext(
            queued,
            extra_pnginfo if isinstance(extra_pnginfo, Mapping) else {},
            None if unique_id is None else str(unique_id),
            queued if makers is None else graph,
            makers,
        )

    def ancestors(self) -> frozenset[str]:
        """Ids of all nodes that feed this one, itself included."""
        return self.upstream(self.node_id)

    def upstream(
        self, start: str | None, inputs: Collection[str] | None = None, stop: Collection[str] = ()
    ) -> frozenset[str]:
        """Ids of all nodes that feed `start` (by these of its inputs), itself included; not beyond those in `stop`.

        A node that another one made gets values from outside by its maker's inputs. A link to a node that made others
        leads to all of them, since the prompt does not keep which of them gave its results.
        """
        found: set[str] = set()
        waiting = [start] if start is not None else []
        while waiting:
            current = waiting.pop()
            if current in found:
                continue
            found.add(current)
            if current in stop and current != start:
                continue
            for name, value in inputs_of(self.graph.get(current)).items():
                if inputs is None or current != start or name in inputs:
                    waiting += self._sources(current, value)
        return frozenset(found)

    def samplers(self, among: Iterable[str]) -> list[str]:
        """Those of these nodes that sample, without this one."""
        return self._doing(samples, among)

    def working(self, among: Iterable[str]) -> list[str]:
        """Those of these nodes that run a network on latents or images, and are not measured by this pack."""
        return self._doing(works, among)

    def decoding(self, among: Iterable[str]) -> list[str]:
        """Those of these nodes that are decoders of others than this pack."""
        return self._doing(decodes, among)

    def encoding(self, among: Iterable[str]) -> list[str]:
        """Those of these nodes that encode text and are not this pack's."""
        return self._doing(encodes_text, among)

    def text_encoders(self) -> list[str]:
        """Nodes that are not this pack's and encode text for this sampler; upstream of another one they are its."""
        upstream = self.ancestors()
        return self.encoding(self.upstream(self.node_id, stop=self.samplers(upstream)))

    def names(self, node_ids: Iterable[str]) -> str:
        """Nodes as a user finds them: class and id."""
        return ", ".join(f"{class_of(self.graph.get(node_id)) or 'node'} ({node_id})" for node_id in sorted(node_ids))

    def _doing(self, what: Callable[[Mapping[str, Any], str], bool], among: Iterable[str]) -> list[str]:
        # What made other nodes did its work through them.
        made_others = set((self.makers or {}).values())
        return [n for n in sorted(among) if n != self.node_id and n not in made_others and what(self.graph, n)]

    def _sources(self, node_id: str, value: Any) -> list[str]:
        makers = self.makers or {}
        link = link_of(value)
        if link is not None:
            return [link[0], *(made for made in makers if link[0] in self._makers_of(made))]
        came_from_outside = node_id in makers and not isinstance(value, (str, int, float, bool, type(None)))
        return [makers[node_id]] if came_from_outside else []

    def _makers_of(self, node_id: str) -> list[str]:
        """The node that made this one, the one that made that, and so on."""
        found: list[str] = []
        current = (self.makers or {}).get(node_id)
        while current is not None and current not in found:
            found.append(current)
            current = (self.makers or {}).get(current)
        return found

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
        made_of = self._given_plan()[1]
        return made_of is not None and still_made_of(self.prompt, self.node_id or "", made_of)

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
                    given = _path(place, "made_of")
                    given = given.get(node_id) if isinstance(given, Mapping) else given
                    return plan, given if isinstance(given, str) else None
        return None, None

    def workflow_id(self) -> str | None:
        """The id of the canvas's workflow; None for a prompt that came without one."""
        value = _path(self.extra.get("workflow"), "id")
        return value[:_MAX_NAME] if isinstance(value, str) else None

    def checkpoint_name(self) -> str | None:
        """The file that a core loader among the ancestors names."""
        for node_id in sorted(self.ancestors()):
            inputs = inputs_of(self.graph.get(node_id))
            for key in ("ckpt_name", "unet_name"):
                if isinstance(inputs.get(key), str):
                    return str(inputs[key])
        return None

    def phase_ms(
        self, phase: str, entries: Iterable[PhaseEntry], list_index: int | None = None, beside_others: bool = False
    ) -> float | str | None:
        """Milliseconds that this pack's nodes upstream spent in a phase, for item `list_index` of a list.

        `cached` where such a node is upstream but was not executed for this prompt (for text encoding: one of them,
        since the time of the others is no whole one), None where there is none, or where another's node did part of
        it, unless `beside_others` asks for this pack's part. Text and freed memory that are upstream of another
        sampler are that sampler's.
        """
        upstream = self.ancestors()
        if phase in ("text_encode", "free"):
            upstream = self.upstream(self.node_id, stop=self.samplers(upstream))
        if phase == "text_encode" and not beside_others and self.encoding(upstream):
            return None
        mine = [e for e in entries if e.phase == phase and self._concerns(e, upstream)]
        own = {n for n in upstream if class_of(self.graph.get(n)) in _PHASE_NODES.get(phase, ())}
        if phase == "text_encode" and own - {e.node_id for e in mine}:
            return "cached"
        if mine:
            return round(sum(e.ms for e in of_item(mine, list_index)), 3)
        return "cached" if own else None

    def concerning(self, entries: Iterable[PhaseEntry], upstream: frozenset[str] | None = None) -> list[PhaseEntry]:
        """The entries of nodes upstream."""
        upstream = self.ancestors() if upstream is None else upstream
        return [e for e in entries if self._concerns(e, upstream)]

    def _concerns(self, entry: PhaseEntry, upstream: frozenset[str]) -> bool:
        # Where nothing tells which nodes made others, those that are not in the prompt may belong to any node.
        return entry.node_id in upstream or (self.makers is None and entry.node_id not in self.prompt)


def of_item(entries: Sequence[PhaseEntry], list_index: int | None) -> list[PhaseEntry]:
    """Of each node's entries the one for this item of a list; ComfyUI repeats the last one of a shorter list."""
    by_node: dict[str | None, list[PhaseEntry]] = {}
    for entry in entries:
        by_node.setdefault(entry.node_id, []).append(entry)
    if list_index is None:
        return list(entries)
    return [items[min(list_index, len(items) - 1)] for items in by_node.values()]


def _expanded(dynprompt: Any) -> tuple[dict[str, Any], dict[str, str] | None]:
    """All nodes of the executing prompt, and for each that another one made the id of that one.

    The second is None where there is no such prompt: in a ComfyUI that does not hand it over, or outside of one.
    """
    with suppress(AttributeError, KeyError, TypeError):
        ids = list(dynprompt.all_node_ids())
        makers = {str(node_id): dynprompt.get_parent_node_id(node_id) for node_id in ids}
        graph = {str(node_id): dynprompt.get_node(node_id) for node_id in ids}
        return graph, {made: str(maker) for made, maker in makers.items() if maker is not None}
    return {}, None


def _path(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


_PACK = "SpeedLab"
_OWN_SAMPLERS = frozenset({"SpeedLabProfileSampler", "SpeedLabEnsembleSampler", "SpeedLabTune", "SpeedLabBenchmark"})
_CORE_SAMPLERS = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"})
_CORE_TEXT = frozenset({"CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner"})
_CORE_DECODERS = frozenset({"VAEDecode", "VAEDecodeTiled"})
_OF_IMAGES = frozenset({"LATENT", "IMAGE"})
_SAMPLING = frozenset({"MODEL", "GUIDER", "SAMPLER"})
# Types that no network comes in by: a node that takes nothing else resizes, cuts or mixes, in next to no time.
_PLAIN = frozenset({
    "LATENT", "IMAGE", "MASK", "CONDITIONING", "NOISE", "SIGMAS", "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "*",
    "SPEEDLAB_PROFILE",
})  # fmt: skip

Graph = Mapping[str, Any]


def samples(graph: Graph, node_id: str) -> bool:
    """Whether a node denoises."""
    name = class_of(graph.get(node_id))
    if name.startswith(_PACK):
        return name in _OWN_SAMPLERS
    if name in _CORE_SAMPLERS:
        return True
    taken = _taken(graph, node_id)
    return bool(_given(name) & _OF_IMAGES) and (bool(taken & _SAMPLING) or any("PIPE" in kind for kind in taken))


def encodes_text(graph: Graph, node_id: str) -> bool:
    """Whether a node that is not this pack's encodes text."""
    name = class_of(graph.get(node_id))
    if name.startswith(_PACK):
        return False
    return name in _CORE_TEXT or ("CONDITIONING" in _given(name) and "CLIP" in _taken(graph, node_id))


def decodes(graph: Graph, node_id: str) -> bool:
    """Whether a node that is not this pack's turns latents into images, and does nothing else."""
    name = class_of(graph.get(node_id))
    if name.startswith(_PACK):
        return False
    taken = _taken(graph, node_id)
    return name in _CORE_DECODERS or (
        "IMAGE" in _given(name) and {"VAE", "LATENT"} <= taken and taken - _PLAIN == {"VAE"}
    )


def works(graph: Graph, node_id: str) -> bool:
    """Whether a node runs a network on latents or images without this pack measuring it."""
    name = class_of(graph.get(node_id))
    if name.startswith(_PACK):
        return name in _OWN_SAMPLERS
    if samples(graph, node_id) or decodes(graph, node_id):
        return True
    return bool(_given(name) & _OF_IMAGES) and bool(_taken(graph, node_id) - _PLAIN)


def class_of(node: Any) -> str:
    """A node's class as the prompt names it; "" where it names none."""
    name = node.get("class_type") if isinstance(node, Mapping) else None
    return name if isinstance(name, str) else ""


def inputs_of(node: Any) -> Mapping[str, Any]:
    """A node's inputs as the prompt has them: values, and links to other nodes."""
    inputs = node.get("inputs") if isinstance(node, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def link_of(value: Any) -> tuple[str, int] | None:
    """The node and the output that an input is linked to; None where it is a value."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not isinstance(value[0], str):
        return None
    return value[0], value[1] if isinstance(value[1], int) else -1


def _class(name: str) -> Any | None:
    """The node's class in ComfyUI's table, which outside of ComfyUI does not exist."""
    table = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", None)
    return table.get(name) if isinstance(table, Mapping) else None


def _outputs(name: str) -> Sequence[str]:
    given = getattr(_class(name), "RETURN_TYPES", None)
    return [_type(kind) for kind in given] if isinstance(given, Iterable) else []


def _given(name: str) -> frozenset[str]:
    return frozenset(_outputs(name))


def _taken(graph: Graph, node_id: str) -> frozenset[str]:
    """The types of what comes into a node: as it declares them, and for open inputs as the linked output does.

    What is typed in on a node counts for none: a network comes by a link, or as an object from the node's maker.
    """
    node = graph.get(node_id)
    declared = _declared(_class(class_of(node)))
    types: set[str] = set()
    for name, value in inputs_of(node).items():
        if isinstance(value, (str, int, float, bool, type(None))):
            continue
        kind, link = declared.get(name, "*"), link_of(value)
        # Types such as COMFY_MATCHTYPE_V3 and COMFY_AUTOGROW_V3 are open too.
        if link is not None and (kind == "*" or "," in kind or kind.startswith("COMFY_")):
            outputs = _outputs(class_of(graph.get(link[0])))
            known = outputs[link[1]] if 0 <= link[1] < len(outputs) else "*"
            kind = "*" if known.startswith("COMFY_") else known
        types.update(part.strip() for part in kind.split(","))
    return frozenset(types)


def _declared(node_class: Any | None) -> dict[str, str]:
    try:
        groups = node_class.INPUT_TYPES() if node_class is not None else {}
        named = [item for group in ("required", "optional") for item in dict(groups.get(group) or {}).items()]
        return {str(name): _type(spec[0] if isinstance(spec, (list, tuple)) and spec else spec) for name, spec in named}
    except Exception:  # the code of any other pack runs here, and what it raises is no business of a measurement
        return {}


def _type(kind: Any) -> str:
    return kind if isinstance(kind, str) else "COMBO"

"""What the nodes of a graph do, told by the types of their inputs and outputs as ComfyUI's table of nodes has them.

Names of nodes are without end, types are few: what takes a model and gives latents or pictures has sampled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PACK = "SpeedLab"
_OWN_SAMPLERS = frozenset({"SpeedLabProfileSampler", "SpeedLabEnsembleSampler", "SpeedLabTune", "SpeedLabBenchmark"})
_CORE_SAMPLERS = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"})
_CORE_TEXT = frozenset({"CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner"})
_CORE_DECODERS = frozenset({"VAEDecode", "VAEDecodeTiled"})
_PICTURES = frozenset({"LATENT", "IMAGE"})
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
    return bool(_given(name) & _PICTURES) and (bool(taken & _SAMPLING) or any("PIPE" in kind for kind in taken))


def encodes_text(graph: Graph, node_id: str) -> bool:
    """Whether a node that is not this pack's encodes text."""
    name = class_of(graph.get(node_id))
    if name.startswith(_PACK):
        return False
    return name in _CORE_TEXT or ("CONDITIONING" in _given(name) and "CLIP" in _taken(graph, node_id))


def decodes(graph: Graph, node_id: str) -> bool:
    """Whether a node that is not this pack's turns latents into pictures, and does nothing else."""
    name = class_of(graph.get(node_id))
    if name.startswith(_PACK):
        return False
    taken = _taken(graph, node_id)
    return name in _CORE_DECODERS or (
        "IMAGE" in _given(name) and {"VAE", "LATENT"} <= taken and taken - _PLAIN == {"VAE"}
    )


def works(graph: Graph, node_id: str) -> bool:
    """Whether a node runs a network on latents or pictures without this pack measuring it."""
    name = class_of(graph.get(node_id))
    if name.startswith(_PACK):
        return name in _OWN_SAMPLERS
    if samples(graph, node_id) or decodes(graph, node_id):
        return True
    return bool(_given(name) & _PICTURES) and bool(_taken(graph, node_id) - _PLAIN)


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

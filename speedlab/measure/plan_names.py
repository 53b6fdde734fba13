"""Whether the name that a workflow gives a plan still is true: the graph may have been changed since it was named.

A workflow of this pack says beside each name which nodes it stands for, with their settings: those that the model
passes on its way to the sampler, those that free memory before it, and those that the latent passes until it is
decoded. Files, sizes, prompts and seeds are no part of a plan, nor are the settings of samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

_LONGEST = 10_000
# Parts of the names of inputs that lead on: to the sampler, to what stands behind it, and from it by its latent.
_TO_SAMPLER, _TO_NEXT, _LATENTS = ("model", "value"), ("model", "vae", "value"), ("latent", "samples", "value")
_NOT_OF_A_PLAN = frozenset({"width", "height", "batch", "batch_size", "steps", "seed"})


def made_of(prompt: Mapping[str, Any], node_id: str) -> str:
    """The nodes of a sampler's plan in one line, `class(option=value,...)+...`, from the sampler on towards the loader,
    then what frees memory before it, then all that stands behind it.
    """
    nodes = ((name, ",".join(f"{k}={v}" for k, v in options.items())) for name, options in _nodes_of(prompt, node_id))
    return "+".join(f"{name}({options})" for name, options in nodes)


def plan_of(techniques: Sequence[str]) -> str:
    """The name of a plan that was given none."""
    return "+".join(techniques) or "stock"


def still_made_of(prompt: Mapping[str, Any], node_id: str, text: str) -> bool:
    """Whether the graph holds what `made_of` said when it was named. An input that a node has gained since is no
    difference: it has the value that changes nothing.
    """
    if len(text) > _LONGEST:
        return False
    now, then = list(_nodes_of(prompt, node_id)), [_parsed(part) for part in text.split("+") if part]
    return [name for name, _ in now] == [name for name, _ in then] and all(
        options.items() <= present.items() for (_, present), (_, options) in zip(now, then, strict=True)
    )


def _parsed(part: str) -> tuple[str, dict[str, str]]:
    name, _, rest = part.partition("(")
    pairs = (option.partition("=") for option in rest.removesuffix(")").split(",") if option)
    return name, {key: value for key, _, value in pairs}


def _nodes_of(prompt: Mapping[str, Any], node_id: str) -> Iterator[tuple[str, dict[str, str]]]:
    seen = {node_id}

    def entries(node_ids: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
        for current in node_ids:
            if current not in seen:
                seen.add(current)
                yield _class_of(prompt.get(current)), _options_of(prompt.get(current))

    yield from entries(_walk([node_id], lambda current: _sources(prompt.get(current), _TO_SAMPLER)))
    before = _walk([node_id], lambda current: _sources(prompt.get(current)))
    yield from entries(node for node in before if "FreeMemory" in _class_of(prompt.get(node)))
    yield from entries(_walk(_behind(prompt, node_id), lambda current: _sources(prompt.get(current), _TO_NEXT)))


def _behind(prompt: Mapping[str, Any], node_id: str) -> list[str]:
    """The nodes that the sampler's latent passes on its way to decoders, and these; what leads to none is no part."""
    takers: dict[str, list[str]] = {}
    for known, node in prompt.items():
        for source in _sources(node, _LATENTS):
            takers.setdefault(source, []).append(known)
    # The order of a prompt is the client's.
    by_class = {source: sorted(nodes, key=lambda n: (_class_of(prompt[n]), n)) for source, nodes in takers.items()}
    reached = _walk([node_id], lambda current: by_class.get(current, ()))
    ends = [node for node in reached if "VAEDecode" in _class_of(prompt.get(node))]
    leading = set(_walk(ends, lambda current: _sources(prompt.get(current), _LATENTS)))
    return [node for node in reached[1:] if node in leading]


def _walk(starts: Iterable[str], following: Callable[[str], Iterable[str]]) -> list[str]:
    """These nodes and all that follows them, the nearest first."""
    found = list(starts)
    known = set(found)
    for current in found:
        for node in following(current):
            if node not in known:
                known.add(node)
                found.append(node)
    return found


def _sources(node: Any, kinds: tuple[str, ...] = ("",)) -> list[str]:
    """What feeds a node by the inputs that have one of these in their names; by all inputs without."""
    return [source for name, source in sorted(_named_links(node)) if any(kind in name for kind in kinds)]


def _named_links(node: Any) -> list[tuple[str, str]]:
    found = ((name, value) for name, value in _inputs(node).items() if isinstance(value, (list, tuple)))
    return [(str(name), str(value[0])) for name, value in found if len(value) == 2]


def _options_of(node: Any) -> dict[str, str]:
    if any(name in _inputs(node) for name in ("denoise", "sampler_name")):
        return {}  # a sampler
    named = ((str(name), value) for name, value in sorted(_inputs(node).items(), key=lambda item: str(item[0])))
    return {quote(name, errors="replace"): _plain(value) for name, value in named if _is_option(name, value)}


def _is_option(name: str, value: Any) -> bool:
    is_file = name.endswith("_name") or name.startswith("lora_")
    return isinstance(value, (str, int, float)) and not is_file and name not in _NOT_OF_A_PLAN


def _plain(value: str | int | float) -> str:
    """The same for 1 and 1.0, which a browser does not tell apart, and without the marks of the line."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return quote(str(value)[:200], safe="", errors="replace")


def _inputs(node: Any) -> Mapping[Any, Any]:
    inputs = node.get("inputs") if isinstance(node, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def _class_of(node: Any) -> str:
    return quote(str(node.get("class_type")), errors="replace") if isinstance(node, Mapping) else ""

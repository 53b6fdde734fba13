"""Random prompts over all nodes of this pack: which nodes, their settings, sizes, samplers, LoRAs, batches.

A prompt follows from the seed and its number alone, so that each can be made again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from ..client.graph import ApiGraph
from .soak_builder import GraphBuilder, Kit
from .soak_graph import SoakGraph
from .soak_values import widget_values

# Prompts in a row that share a checkpoint and its precision: loading one anew takes longer than all that follows.
BLOCK = 20
# What picks by measuring may pick another way in another process, and inductor makes other code for sizes seen before.
_MEASURED = {
    ("SpeedLabAttention", "backend", "auto"),
    ("SpeedLabPrecision", "linear", "auto"),
    ("SpeedLabCompileModel", "backend", "inductor"),
}


@dataclass(frozen=True)
class SoakPrompt:
    """A prompt. `repeatable`: every choice in it is fixed, so that it gives the same bits in any process."""

    number: int
    graph: ApiGraph
    repeatable: bool

    @property
    def classes(self) -> set[str]:
        """The node classes in it."""
        return {str(node["class_type"]) for node in self.graph.values()}

    @property
    def loads(self) -> tuple[Any, ...]:
        """What it loads: prompts that agree follow each other without loading anew."""
        return tuple(
            sorted(str(n["inputs"]) for n in self.graph.values() if n["class_type"] == "SpeedLabCheckpointLoader")
        )


class SoakPrompts:
    """The prompts of a seed, for a server that describes its nodes as `info` (`/object_info`)."""

    def __init__(self, info: Mapping[str, Any], kit: Kit, seed: int) -> None:
        self.info, self.kit, self.seed = info, kit, seed

    def prompt(self, number: int) -> SoakPrompt:
        """Prompt `number`, from 0 on."""
        block = Random(f"{self.seed}/block/{number // BLOCK}")
        sdxl = bool(self.kit.sdxl) and block.random() < 0.1
        loader = widget_values(self.info["SpeedLabCheckpointLoader"], block)
        loader["ckpt_name"] = self.kit.sdxl if sdxl else self.kit.sd15
        graph = SoakGraph(self.info, self.kit, Random(f"{self.seed}/{number}"), loader)
        graph.build(number)
        measured = any(
            (node["class_type"], name, value) in _MEASURED
            for node in graph.nodes.values()
            for name, value in node["inputs"].items()
            if isinstance(value, str)
        )
        return SoakPrompt(number, graph.nodes, not measured)

    def first(self) -> list[ApiGraph]:
        """Prompts with what loads a library or fills a cache once, to be run before anything is counted."""
        return [
            self._plain(partial(GraphBuilder.build_first, backend=backend, measured=number == 0))
            for number, backend in enumerate(self.kit.backends)
        ]

    def stock_twin(self, prompt: SoakPrompt) -> ApiGraph | None:
        """Core's sampler with the settings of a prompt's first one, on the plain model; None where it has none."""
        for node in prompt.graph.values():
            if node["class_type"] in ("SpeedLabProfileSampler", "KSampler"):
                kept = ("steps", "cfg", "sampler_name", "scheduler", "denoise")
                settings = {name: node["inputs"][name] for name in kept}
                return self._plain(partial(GraphBuilder.build_stock, settings=settings))
        return None

    def _plain(self, build: Callable[[GraphBuilder], None]) -> ApiGraph:
        loader = {"ckpt_name": self.kit.sd15, "precision": "auto", "memory_format": "contiguous"}
        graph = GraphBuilder(self.info, self.kit, Random(self.seed), loader)
        build(graph)
        return graph.nodes


def without_a_place(info: Mapping[str, Any], prompts: Iterable[SoakPrompt]) -> set[str]:
    """The nodes of this pack that none of `prompts` has."""
    ours = {name for name in info if name.startswith("SpeedLab") and not name.startswith("SpeedLabStress")}
    return ours - {name for prompt in prompts for name in prompt.classes}

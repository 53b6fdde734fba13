"""Plans: named stacks of techniques that a text-to-image graph can carry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .graph import Graph, Link


@dataclass(frozen=True)
class Technique:
    """A node between loader and sampler that takes a MODEL and gives one back."""

    name: str
    node_id: str
    options: dict[str, Any] = field(default_factory=dict)

    def words(self) -> str:
        """Name and options as they stand in a result's `accelerators` column."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class Plan:
    """Techniques on the model, in order, and the decoder: `full` or `tiny`."""

    name: str
    techniques: tuple[Technique, ...] = ()
    decoder: str = "full"

    def accelerators(self) -> tuple[str, ...]:
        """Every technique with its options, as results name them."""
        tiny = ("tiny_vae",) if self.decoder == "tiny" else ()
        return tuple(technique.words() for technique in self.techniques) + tiny

    def apply(self, graph: Graph, model: Link, lane: int = 0) -> Link:
        """Add the techniques behind `model`; returns the MODEL that the sampler takes."""
        for technique in self.techniques:
            node = graph.add(
                technique.node_id, group="Load", lane=lane, title=technique.name, model=model, **technique.options
            )
            model = node[0]
        return model


STOCK = Plan("stock")
TINY_VAE = Plan("Tiny VAE", decoder="tiny")

# In the order in which they stand between loader and sampler.
BEST_TECHNIQUES = (
    Technique("Attention", "SpeedLabAttention", {"backend": "sdpa"}),
    Technique("Precision", "SpeedLabPrecision", {"linear": "auto"}),
    Technique("DeepCache", "SpeedLabDeepCache", {"cache_interval": 3}),
    Technique("Dynamic CFG", "SpeedLabDynamicCFG", {"stop_at": 0.75}),
)


def best_plan(available_nodes: Collection[str]) -> Plan:
    """The fastest plan that the nodes of a server allow: `available_nodes` are the keys of its `/object_info`."""
    techniques = tuple(technique for technique in BEST_TECHNIQUES if technique.node_id in available_nodes)
    decoder = "tiny" if "SpeedLabTinyVAEDecode" in available_nodes else "full"
    names = [technique.name for technique in techniques] + (["Tiny VAE"] if decoder == "tiny" else [])
    return Plan(" + ".join(names) or "stock", techniques, decoder)

"""Graphs of the compile scenarios: one picture under several plans, a lane each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..client.graph import Graph, Link
from .graphs import Loaded, decode, empty_latent, encode, measure, sample
from .scenario import Plan, Scenario, Technique


@dataclass(frozen=True)
class Rung:
    """One lane: what the checkpoint is loaded as, and the techniques on the model."""

    label: str
    load: dict[str, Any] = field(default_factory=dict)
    techniques: tuple[Technique, ...] = ()


def side_by_side(rungs: tuple[Rung, ...]) -> Callable[[Scenario], Graph]:
    """The scenario's first prompt once for each rung; lanes that load alike share a loader and its text encoding."""

    def build(scenario: Scenario) -> Graph:
        graph = Graph()
        checkpoint, prompt = scenario.file("checkpoint"), scenario.settings.prompts[0]
        if checkpoint is None:
            raise ValueError(f"scenario '{scenario.id}' names no checkpoint")
        latent = empty_latent(graph, scenario.settings)
        shared: dict[tuple[tuple[str, Any], ...], tuple[Loaded, tuple[Link, Link]]] = {}
        for lane, rung in enumerate(rungs):
            key = tuple(sorted(rung.load.items()))
            if key not in shared:
                loader = graph.add(
                    "SpeedLabCheckpointLoader", group="Load", lane=lane, title=f"Load Checkpoint: {rung.label}",
                    ckpt_name=checkpoint.default, **rung.load,
                )  # fmt: skip
                loaded = Loaded(loader["model"], loader["clip"], loader["vae"])
                shared[key] = loaded, encode(graph, loaded.clip, prompt, lane, f": {rung.label}")
            loaded, conds = shared[key]
            model = Plan(rung.label, rung.techniques).apply(graph, loaded.model, lane)
            _finish(graph, scenario, Loaded(model, loaded.clip, loaded.vae), conds, latent, lane, rung.label)
        return graph

    return build


def switched_loras(strengths: tuple[tuple[float, float], ...], compile_model: Technique) -> Callable[[Scenario], Graph]:
    """Two LoRAs on one compiled model, a lane for each pair of strengths; 0 leaves a LoRA out."""

    def build(scenario: Scenario) -> Graph:
        graph = Graph()
        checkpoint, first, second = (scenario.file(kind) for kind in ("checkpoint", "lora", "lora_2"))
        if checkpoint is None or first is None or second is None:
            raise ValueError(f"scenario '{scenario.id}' names no checkpoint or no LoRAs")
        prompt = scenario.settings.prompts[0]
        loader = graph.add(
            "SpeedLabCheckpointLoader", group="Load", title="Load Checkpoint", ckpt_name=checkpoint.default
        )
        latent = empty_latent(graph, scenario.settings)
        for lane, (strength_1, strength_2) in enumerate(strengths):
            label = f"{strength_1:g} and {strength_2:g}"
            stack = graph.add(
                "SpeedLabLoraStack", group="Load", lane=lane, title=f"LoRAs at {label}",
                model=loader["model"], clip=loader["clip"], lora_1=first.default, lora_2=second.default,
                strength_1=strength_1, strength_2=strength_2,
            )  # fmt: skip
            model = Plan(label, (compile_model,)).apply(graph, stack["model"], lane)
            loaded = Loaded(model, stack["clip"], loader["vae"])
            conds = encode(graph, loaded.clip, prompt, lane, f": {label}")
            _finish(graph, scenario, loaded, conds, latent, lane, label)
        return graph

    return build


def _finish(
    graph: Graph, scenario: Scenario, loaded: Loaded, conds: tuple[Link, Link], latent: Link, lane: int, label: str
) -> None:
    prompt, settings = scenario.settings.prompts[0], scenario.settings
    sampler = sample(graph, settings, prompt, loaded.model, conds, latent, lane, f": {label}")
    graph.plans[sampler.id] = label
    picture = decode(graph, scenario.plan, sampler["latent"], loaded, lane, f": {label}")
    measure(graph, scenario, sampler["profile"], picture[0], lane, f": {label}")

"""Graphs with a Memory Plan, and with base and refiner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..client.graph import Graph, Link
from .graphs import Loaded, decode, empty_latent, encode, measure, sample
from .scenario import Prompt, Scenario, Settings

Build = Callable[[Scenario], Graph]


@dataclass(frozen=True)
class PlanOptions:
    """What the Memory Plan node is set to."""

    offload: str = "auto"
    budget_gb: float = 0.0


def load(graph: Graph, scenario: Scenario, kind: str, row: int = 0, title: str = "Load Checkpoint") -> Loaded:
    """A checkpoint loader for the needed file of that kind, without the scenario's techniques."""
    needed = scenario.file(kind)
    if needed is None:
        raise ValueError(f"scenario '{scenario.id}' names no {kind}")
    node = graph.add("SpeedLabCheckpointLoader", group="Load", row=row, title=title, ckpt_name=needed.default)
    vae = node["vae"]
    other = scenario.file("vae") if kind == "checkpoint" else None
    if other is not None:
        vae = graph.add("SpeedLabVAELoader", group="Load", title="Load VAE", vae_name=other.default)["vae"]
    return Loaded(node["model"], node["clip"], vae)


def planned(graph: Graph, scenario: Scenario, options: PlanOptions, latent: Link) -> Loaded:
    """The checkpoint behind a Memory Plan, and the scenario's techniques behind that. A Tiny VAE needs no plan."""
    loaded = load(graph, scenario, "checkpoint")
    with_vae: dict[str, Any] = {} if scenario.plan.decoder == "tiny" else {"vae": loaded.vae}
    node = graph.add(
        "SpeedLabMemoryPlan", group="Load", title="Memory Plan", model=loaded.model, offload=options.offload,
        budget_gb=options.budget_gb, clip=loaded.clip, latent=latent, **with_vae,
    )  # fmt: skip
    return Loaded(scenario.plan.apply(graph, node["model"]), node["clip"], node["vae"] if with_vae else loaded.vae)


def text_to_image_within(options: PlanOptions) -> Build:
    """One row a prompt, all on models under one Memory Plan."""

    def build(scenario: Scenario) -> Graph:
        graph = Graph()
        latent = empty_latent(graph, scenario.settings)
        loaded = planned(graph, scenario, options, latent)
        for row, prompt in enumerate(scenario.settings.prompts):
            label = f": {prompt.name}"
            conds = encode(graph, loaded.clip, prompt, row, label)
            sampler = sample(graph, scenario.settings, prompt, loaded.model, conds, latent, row, label)
            image = decode(graph, scenario.plan, sampler["latent"], loaded, row, label)
            measure(graph, scenario, sampler["profile"], image[0], row, label)
        return graph

    return build


@dataclass(frozen=True)
class RefinerVariant:
    """One row: the base's share of steps. `steps` of `of` steps, so that an override of the steps scales it.

    `handoff` of an ensemble, or `refine` steps of image to image.
    """

    name: str
    steps: int
    of: int = 50
    handoff: float = 0.9
    refine: int = 0

    def scaled(self, settings: Settings) -> int:
        """This row's steps where the scenario's were changed."""
        return max(1, self.steps * settings.steps // self.of)


def prompts_of(rows: tuple[RefinerVariant, ...], prompt: Prompt) -> tuple[Prompt, ...]:
    """The same text and seed for every row, under the row's name."""
    return tuple(Prompt(row.name, prompt.text, prompt.seed, prompt.negative) for row in rows)


def _loaded_pair(graph: Graph, scenario: Scenario) -> tuple[Loaded, Loaded]:
    """The base with the scenario's plan, and the refiner."""
    base = load(graph, scenario, "checkpoint", title="Load Base")
    base = Loaded(scenario.plan.apply(graph, base.model), base.clip, base.vae)
    return base, load(graph, scenario, "refiner", title="Load Refiner")


def _both_encoded(
    graph: Graph, base: Loaded, refiner: Loaded, prompt: Prompt, row: int, label: str
) -> tuple[tuple[Link, Link], tuple[Link, Link]]:
    ours = encode(graph, base.clip, prompt, row, f"{label} (base)")
    return ours, encode(graph, refiner.clip, prompt, row, f"{label} (refiner)")


def ensemble(rows: tuple[RefinerVariant, ...]) -> Build:
    """Base to refiner on one schedule, each row with its own hand-over and steps."""

    def build(scenario: Scenario) -> Graph:
        graph, settings = Graph(), scenario.settings
        latent = empty_latent(graph, settings)
        base, refiner = _loaded_pair(graph, scenario)
        for row, (options, prompt) in enumerate(zip(rows, settings.prompts, strict=True)):
            label = f": {prompt.name}"
            ours, theirs = _both_encoded(graph, base, refiner, prompt, row, label)
            sampler = graph.add(
                "SpeedLabEnsembleSampler", group="Sample", row=row, title=f"Ensemble Sampler{label}",
                base_model=base.model, base_positive=ours[0], base_negative=ours[1],
                refiner_model=refiner.model, refiner_positive=theirs[0], refiner_negative=theirs[1],
                latent=latent, seed=prompt.seed, steps=options.scaled(settings), cfg=settings.cfg,
                sampler_name=settings.sampler, scheduler=settings.scheduler, handoff=options.handoff,
                detail=settings.detail,
            )  # fmt: skip
            image = decode(graph, scenario.plan, sampler["latent"], base, row, label)
            measure(graph, scenario, sampler["profile"], image[0], row, label)
        return graph

    return build


def refined(rows: tuple[RefinerVariant, ...], denoise: float) -> Build:
    """The base to the end, then the refiner as image to image at `denoise`; a report of each."""

    def build(scenario: Scenario) -> Graph:
        graph, settings = Graph(), scenario.settings
        latent = empty_latent(graph, settings)
        base, refiner = _loaded_pair(graph, scenario)
        for row, (options, prompt) in enumerate(zip(rows, settings.prompts, strict=True)):
            label = f": {prompt.name}"
            ours, theirs = _both_encoded(graph, base, refiner, prompt, row, label)
            common: dict[str, Any] = {
                "group": "Sample", "row": row, "seed": prompt.seed, "cfg": settings.cfg,
                "sampler_name": settings.sampler, "scheduler": settings.scheduler, "detail": settings.detail,
                "warmup": settings.warmup, "repeats": settings.repeats,
            }  # fmt: skip
            drawn = graph.add(
                "SpeedLabProfileSampler", title=f"Base{label}", model=base.model, positive=ours[0], negative=ours[1],
                latent_image=latent, steps=options.scaled(settings), denoise=1.0, **common,
            )  # fmt: skip
            finished = graph.add(
                "SpeedLabProfileSampler", title=f"Refiner{label}", model=refiner.model, positive=theirs[0],
                negative=theirs[1], latent_image=drawn["latent"], steps=options.refine, denoise=denoise, **common,
            )  # fmt: skip
            image = decode(graph, scenario.plan, finished["latent"], base, row, label)
            graph.add(
                "SpeedLabProfileReport", group="Measure", row=row, title=f"Report of the base{label}",
                profile=drawn["profile"],
            )  # fmt: skip
            measure(graph, scenario, finished["profile"], image[0], row, label)
        return graph

    return build

"""Graphs that many scenarios share, as functions of a scenario."""

from __future__ import annotations

from dataclasses import dataclass

from ..client.graph import Graph, Link, Node
from .scenario import NeededFile, Plan, Prompt, Scenario, Settings

PREFIX = "speedlab"


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint loader gives."""

    model: Link
    clip: Link
    vae: Link


def load_checkpoint(graph: Graph, scenario: Scenario) -> Loaded:
    """Load Checkpoint, and the techniques of the scenario's plan behind it."""
    checkpoint: NeededFile | None = scenario.file("checkpoint")
    if checkpoint is None:
        raise ValueError(f"scenario '{scenario.id}' names no checkpoint")
    loader = graph.add("SpeedLabCheckpointLoader", group="Load", title="Load Checkpoint", ckpt_name=checkpoint.default)
    model, vae = scenario.plan.apply(graph, loader["model"]), loader["vae"]
    other = scenario.file("vae")
    if other is not None:
        vae = graph.add("SpeedLabVAELoader", group="Load", title="Load VAE", vae_name=other.default)["vae"]
    return Loaded(model, loader["clip"], vae)


def encode(graph: Graph, clip: Link, prompt: Prompt, lane: int, label: str) -> tuple[Link, Link]:
    """Positive and negative conditioning; without a negative prompt core's Conditioning Zero Out."""
    positive = graph.add(
        "SpeedLabTextEncode", group="Prompt", lane=lane, title=f"Prompt{label}", clip=clip, text=prompt.text
    )
    if prompt.negative is None:
        negative = graph.add(
            "ConditioningZeroOut", group="Prompt", lane=lane, title=f"No negative{label}", conditioning=positive[0]
        )
    else:
        negative = graph.add(
            "SpeedLabTextEncode", group="Prompt", lane=lane, title=f"Negative{label}", clip=clip, text=prompt.negative
        )
    return positive[0], negative[0]


def decode(graph: Graph, plan: Plan, samples: Link, loaded: Loaded, lane: int, label: str) -> Node:
    """The plan's decoder: the checkpoint's own VAE or a Tiny VAE that fits the model."""
    if plan.decoder == "tiny":
        return graph.add(
            "SpeedLabTinyVAEDecode", group="Decode", lane=lane, title=f"Tiny VAE Decode{label}",
            samples=samples, model=loaded.model,
        )  # fmt: skip
    return graph.add(
        "SpeedLabVAEDecode", group="Decode", lane=lane, title=f"VAE Decode{label}", samples=samples, vae=loaded.vae
    )


def measure(graph: Graph, scenario: Scenario, profile: Link, images: Link, lane: int, label: str) -> None:
    """Profile Report, which saves the picture too, and the step chart where the scenario shows one."""
    report = graph.add(
        "SpeedLabProfileReport", group="Measure", lane=lane, title=f"Report{label}", profile=profile, images=images
    )
    if scenario.settings.chart:
        graph.add("PreviewImage", group="Measure", lane=lane, title=f"Step chart{label}", images=report["chart"])


def empty_latent(graph: Graph, settings: Settings) -> Link:
    """One empty latent for every lane, so that the size is set in one place."""
    node = graph.add(
        "EmptyLatentImage", group="Load", title="Size",
        width=settings.width, height=settings.height, batch_size=settings.batch,
    )  # fmt: skip
    return node[0]


def sample(
    graph: Graph, settings: Settings, prompt: Prompt, model: Link, conds: tuple[Link, Link], latent: Link, lane: int,
    label: str,
) -> Node:  # fmt: skip
    """Profile Sampler with the scenario's settings and the prompt's seed."""
    return graph.add(
        "SpeedLabProfileSampler", group="Sample", lane=lane, title=f"Profile Sampler{label}",
        model=model, seed=prompt.seed, steps=settings.steps, cfg=settings.cfg,
        sampler_name=settings.sampler, scheduler=settings.scheduler,
        positive=conds[0], negative=conds[1], latent_image=latent, denoise=1.0,
        detail=settings.detail, warmup=settings.warmup, repeats=settings.repeats,
    )  # fmt: skip


def text_to_image(scenario: Scenario) -> Graph:
    """One checkpoint, one lane a prompt: encode, sample under the profiler, decode, report, save."""
    graph = Graph()
    loaded = load_checkpoint(graph, scenario)
    latent = empty_latent(graph, scenario.settings)
    several = len(scenario.settings.prompts) > 1
    for lane, prompt in enumerate(scenario.settings.prompts):
        label = f": {prompt.name}" if several else ""
        conds = encode(graph, loaded.clip, prompt, lane, label)
        sampler = sample(graph, scenario.settings, prompt, loaded.model, conds, latent, lane, label)
        picture = decode(graph, scenario.plan, sampler["latent"], loaded, lane, label)
        measure(graph, scenario, sampler["profile"], picture[0], lane, label)
    return graph

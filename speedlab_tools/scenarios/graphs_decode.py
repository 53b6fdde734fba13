"""Graphs around decoding: prompts as one staged list, and lanes that differ in how they decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..client.graph import Graph
from .graphs import empty_latent, encode, load_checkpoint, measure, sample
from .scenario import Scenario

BATCHES = (1, 2, 8, 32)


def staged_batch(scenario: Scenario) -> Graph:
    """Encode all prompts, free the text encoders, sample all, free the UNet, decode all."""
    settings = scenario.settings
    graph = Graph()
    loaded = load_checkpoint(graph, scenario)
    queue = graph.add(
        "SpeedLabPromptQueue", group="Prompt", title="Prompt Queue", clip=loaded.clip,
        prompts="\n".join(prompt.text for prompt in settings.prompts),
        negative=settings.prompts[0].negative or "",
        seeds="\n".join(str(prompt.seed) for prompt in settings.prompts),
    )  # fmt: skip
    encoded = graph.add(
        "SpeedLabFreeMemory", group="Prompt", title="Free the text encoders",
        value=queue["positive"], what="text_encoders", wait_for=queue["negative"],
    )  # fmt: skip
    sampler = sample(
        graph, settings, settings.prompts[0], loaded.model, (encoded[0], queue["negative"]),
        empty_latent(graph, settings), lane=0, label="",
    )  # fmt: skip
    graph.set(sampler, seed=queue["seed"])
    sampled = graph.add(
        "SpeedLabFreeMemory", group="Sample", title="Free the UNet", value=sampler["latent"], what="diffusion"
    )
    pictures = _decode(graph, sampled[0], loaded.vae, 0, "")
    measure(graph, scenario, sampler["profile"], pictures[0], 0, "")
    return graph


def sliced_batches(scenario: Scenario) -> Graph:
    """One prompt in a lane for each batch size up to the scenario's, decoded one picture at a time."""
    settings = scenario.settings
    graph = Graph()
    loaded = load_checkpoint(graph, scenario)
    prompt = settings.prompts[0]
    for lane, batch in enumerate([*(size for size in BATCHES if size < settings.batch), settings.batch]):
        label = f": batch {batch}"
        latent = graph.add(
            "EmptyLatentImage", group="Load", lane=lane, title=f"Size{label}",
            width=settings.width, height=settings.height, batch_size=batch,
        )[0]  # fmt: skip
        conds = encode(graph, loaded.clip, prompt, lane, label)
        sampler = sample(graph, replace(settings, batch=batch), prompt, loaded.model, conds, latent, lane, label)
        pictures = _decode(graph, sampler["latent"], loaded.vae, lane, label, slicing=True)
        measure(graph, scenario, sampler["profile"], pictures[0], lane, label)
    return graph


def tiled_picture(scenario: Scenario) -> Graph:
    """One lane a prompt, decoded in tiles."""
    graph = Graph()
    loaded = load_checkpoint(graph, scenario)
    latent = empty_latent(graph, scenario.settings)
    for lane, prompt in enumerate(scenario.settings.prompts):
        label = f": {prompt.name}" if len(scenario.settings.prompts) > 1 else ""
        conds = encode(graph, loaded.clip, prompt, lane, label)
        sampler = sample(graph, scenario.settings, prompt, loaded.model, conds, latent, lane, label)
        pictures = _decode(graph, sampler["latent"], loaded.vae, lane, label, tile_size=1024, overlap=128)
        measure(graph, scenario, sampler["profile"], pictures[0], lane, label)
    return graph


def _decode(graph: Graph, samples: Any, vae: Any, lane: int, label: str, **options: Any) -> Any:
    return graph.add(
        "SpeedLabVAEDecode", group="Decode", lane=lane, title=f"VAE Decode{label}", samples=samples, vae=vae, **options
    )

"""The two graphs of `demo`: ComfyUI's own nodes, and the best plan; the same sampler, prompt and seed in both.

Profile Sampler stands in KSampler's place on both sides: it calls KSampler's own function and tells its step times,
which nobody can see from outside, where messages arrive in bursts.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..client.graph import Graph, Link
from ..scenarios.graphs import PREFIX
from ..scenarios.scenario import Plan


@dataclass(frozen=True)
class DemoSettings:
    """What both graphs sample."""

    text: str
    negative: str
    seed: int
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg: float = 8.0
    batch: int = 1
    sampler: str = "euler"
    scheduler: str = "normal"


def _sampled(graph: Graph, settings: DemoSettings, model: Link, positive: Link, negative: Link) -> Link:
    latent = graph.add(
        "EmptyLatentImage", group="Load", title="Size",
        width=settings.width, height=settings.height, batch_size=settings.batch,
    )  # fmt: skip
    sampler = graph.add(
        "SpeedLabProfileSampler", group="Sample", model=model, seed=settings.seed, steps=settings.steps,
        cfg=settings.cfg, sampler_name=settings.sampler, scheduler=settings.scheduler, positive=positive,
        negative=negative, latent_image=latent[0], denoise=1.0, detail="timing", warmup=0, repeats=1, nvtx=False,
    )  # fmt: skip
    return sampler[0]


def _saved(graph: Graph, images: Link, name: str) -> Graph:
    graph.add("SaveImage", group="Measure", images=images, filename_prefix=f"{PREFIX}/demo_{name}")
    return graph


def stock_graph(settings: DemoSettings, checkpoint: str) -> Graph:
    """Nodes of core, and their sampler measured."""
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", group="Load", ckpt_name=checkpoint)
    positive = graph.add("CLIPTextEncode", group="Prompt", clip=loader["CLIP"], text=settings.text)
    negative = graph.add("CLIPTextEncode", group="Prompt", clip=loader["CLIP"], text=settings.negative)
    samples = _sampled(graph, settings, loader["MODEL"], positive[0], negative[0])
    images = graph.add("VAEDecode", group="Decode", samples=samples, vae=loader["VAE"])
    return _saved(graph, images[0], "stock")


def plan_graph(settings: DemoSettings, checkpoint: str, plan: Plan) -> Graph:
    """The same picture with the nodes of this pack and the plan's techniques."""
    graph = Graph()
    loader = graph.add("SpeedLabCheckpointLoader", group="Load", ckpt_name=checkpoint)
    model = plan.apply(graph, loader["model"])
    positive = graph.add("SpeedLabTextEncode", group="Prompt", clip=loader["clip"], text=settings.text)
    negative = graph.add("SpeedLabTextEncode", group="Prompt", clip=loader["clip"], text=settings.negative)
    samples = _sampled(graph, settings, model, positive[0], negative[0])
    if plan.decoder == "tiny":
        images = graph.add("SpeedLabTinyVAEDecode", group="Decode", samples=samples, model=model)
    else:
        images = graph.add("SpeedLabVAEDecode", group="Decode", samples=samples, vae=loader["vae"])
    return _saved(graph, images[0], "best")


def compare_graph(picture: str, reference: str) -> Graph:
    """How far one uploaded picture is from another, in words."""
    graph = Graph()
    images = [graph.add("LoadImage", group="Load", image=name)["IMAGE"] for name in (picture, reference)]
    graph.add("SpeedLabCompareImages", group="Measure", image_a=images[0], image_b=images[1])
    return graph

"""Graphs whose one measuring node is Benchmark, and the plain graph in a precision of its own."""

from __future__ import annotations

from collections.abc import Callable

from ..client.graph import Graph
from .graphs import load_checkpoint, text_to_image
from .scenario import Scenario


def sweep(
    axis_x: str, values_x: str, axis_y: str = "none", values_y: str = "", plan: str = ""
) -> Callable[[Scenario], Graph]:
    """A builder: checkpoint, Benchmark over the axes with the scenario's settings, plot and contact sheet shown.

    The prompts share one negative text; without one it stays blank. `plan` is put on every cell.
    """

    def build(scenario: Scenario) -> Graph:
        settings, prompts = scenario.settings, scenario.settings.prompts
        graph = Graph()
        loaded = load_checkpoint(graph, scenario)
        bench = graph.add(
            "SpeedLabBenchmark", group="Measure", title="Benchmark",
            model=loaded.model, clip=loaded.clip, vae=loaded.vae,
            positive="\n".join(prompt.text for prompt in prompts), negative=prompts[0].negative or "",
            axis_x=axis_x, values_x=values_x, axis_y=axis_y, values_y=values_y,
            width=settings.width, height=settings.height, batch=settings.batch, steps=settings.steps, cfg=settings.cfg,
            sampler_name=settings.sampler, scheduler=settings.scheduler,
            seed="\n".join(str(prompt.seed) for prompt in prompts),
            warmup=settings.warmup, repeats=settings.repeats, plan=plan,
        )  # fmt: skip
        graph.add("PreviewImage", group="Measure", title="Plot", images=bench["plot"])
        graph.add("PreviewImage", group="Measure", title="Contact sheet", images=bench["contact_sheet"])
        return graph

    return build


def text_to_image_in(precision: str) -> Callable[[Scenario], Graph]:
    """A builder: one lane a prompt, with the checkpoint loaded in `precision`."""

    def build(scenario: Scenario) -> Graph:
        graph = text_to_image(scenario)
        (loader,) = graph.find("SpeedLabCheckpointLoader")
        graph.set(loader, precision=precision)
        return graph

    return build

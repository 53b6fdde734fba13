"""Graphs that run one thing in several ways: a lane for each variant and prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..client.graph import Graph, Link, Node
from .graphs import Loaded, decode, empty_latent, encode, measure, sample
from .scenario import STOCK, Plan, Prompt, Scenario, Settings


@dataclass(frozen=True)
class Variant:
    """One way: a plan on the checkpoint in `precision`, and where it differs, sampler, scheduler and steps."""

    plan: Plan
    precision: str = "auto"
    sampler: str | None = None
    scheduler: str | None = None
    steps: int | None = None

    def settings(self, settings: Settings, whole: Settings) -> Settings:
        """The scenario's `settings` with this variant's own, unless a command line changed the steps of `whole`."""
        steps = settings.steps if self.steps is None or settings.steps != whole.steps else self.steps
        return replace(
            settings, steps=steps, sampler=self.sampler or settings.sampler,
            scheduler=self.scheduler or settings.scheduler,
        )  # fmt: skip


def lanes_of(variants: Iterable[Variant], prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """One prompt a lane, named by variant and prompt: for the settings of a scenario of variants."""
    known = tuple(prompts)
    return tuple(
        replace(prompt, name=f"{variant.plan.name}, {prompt.name}" if len(known) > 1 else variant.plan.name)
        for variant in variants
        for prompt in known
    )


def in_variants(variants: tuple[Variant, ...], settings: Settings) -> Callable[[Scenario], Graph]:
    """A builder over `lanes_of(variants, prompts)`; `settings` are the scenario's own, before any command line."""

    def build(scenario: Scenario) -> Graph:
        graph = Graph()
        loaders = {precision: _load(graph, scenario, precision) for precision in _precisions(variants)}
        latent = empty_latent(graph, scenario.settings)
        prompts = scenario.settings.prompts
        each = len(prompts) // len(variants)
        for lane, prompt in enumerate(prompts):
            variant = variants[lane // each]
            loaded, label = loaders[variant.precision], f": {prompt.name}"
            if lane % each == 0:  # the lanes of a variant share its model
                model = variant.plan.apply(graph, loaded.model, lane)
            own = variant.settings(scenario.settings, settings)
            conds = encode(graph, loaded.clip, prompt, lane, label)
            sampler = sample(graph, own, prompt, model, conds, latent, lane, label)
            graph.plans[sampler.id] = variant.plan.name
            picture = decode(graph, variant.plan, sampler["latent"], replace(loaded, model=model), lane, label)
            measure(graph, scenario, sampler["profile"], picture[0], lane, label)
        return graph

    return build


def _precisions(variants: Iterable[Variant]) -> list[str]:
    return list(dict.fromkeys(variant.precision for variant in variants))


def _load(graph: Graph, scenario: Scenario, precision: str) -> Loaded:
    checkpoint = scenario.file("checkpoint")
    if checkpoint is None:
        raise ValueError(f"scenario '{scenario.id}' names no checkpoint")
    title = "Load Checkpoint" if precision == "auto" else f"Load Checkpoint: {precision}"
    loader = graph.add(
        "SpeedLabCheckpointLoader", group="Load", title=title, ckpt_name=checkpoint.default, precision=precision
    )
    return Loaded(loader["model"], loader["clip"], loader["vae"])


def with_control(scenario: Scenario) -> Graph:
    """ControlNet on edges of a picture; the control, the true picture and the result side by side."""
    graph, settings = Graph(), scenario.settings
    prompt = settings.prompts[0]
    net_file, image = scenario.file("controlnet"), scenario.file("image")
    if net_file is None or image is None:
        raise ValueError(f"scenario '{scenario.id}' names no ControlNet or no picture")
    loaded = _load(graph, scenario, "auto")
    model = scenario.plan.apply(graph, loaded.model)
    latent = empty_latent(graph, settings)
    net = graph.add("ControlNetLoader", group="Load", title="Load ControlNet", control_net_name=net_file.default)
    truth = graph.add("LoadImage", group="Load", title="True picture", image=image.default)
    edges = graph.add(
        "Canny", group="Prompt", title="Control: edges", image=truth[0], low_threshold=0.3, high_threshold=0.7
    )
    conds = encode(graph, loaded.clip, prompt, 0, "")
    controlled = graph.add(
        "ControlNetApplyAdvanced", group="Prompt", title="Apply ControlNet", positive=conds[0], negative=conds[1],
        control_net=net[0], image=edges[0], strength=1.0, start_percent=0.0, end_percent=1.0, vae=loaded.vae,
    )  # fmt: skip
    sampler = sample(graph, settings, prompt, model, (controlled[0], controlled[1]), latent, 0, "")
    picture = decode(graph, scenario.plan, sampler["latent"], replace(loaded, model=model), 0, "")
    measure(graph, scenario, sampler["profile"], picture[0], 0, "")
    row = _beside(graph, _beside(graph, edges[0], truth[0])[0], picture[0])
    graph.add("PreviewImage", group="Measure", title="Control, truth, result", images=row[0])
    return graph


def _beside(graph: Graph, left: Link, right: Link) -> Node:
    return graph.add(
        "ImageStitch", group="Measure", title="Side by side", image1=left, image2=right, direction="right",
        match_image_size=True, spacing_width=8, spacing_color="white",
    )  # fmt: skip


ALONE = Variant(STOCK)

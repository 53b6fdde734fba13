"""Graphs that many scenarios share, as functions of a scenario.

Graphs of the compile scenarios: one image under several plans, a row each.

Graphs around decoding: prompts as one staged list, and rows that differ in how they decode.

Graphs whose one measuring node is Benchmark, and the plain graph in a precision of its own.

Graphs that run one thing in several ways: a row for each variant and prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..client.graph import Graph, Link, Node
from .scenario import STOCK, NeededFile, Plan, Prompt, Scenario, Settings, Technique

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


def load_behind_accelerate(graph: Graph, scenario: Scenario) -> Loaded:
    """Load Checkpoint and Accelerate, which puts nothing on its parts until a preset is chosen."""
    loaded = load_checkpoint(graph, scenario)
    node = graph.add(
        "SpeedLabAccelerate", group="Load", title="Accelerate", model=loaded.model, preset="custom",
        custom=STOCK.name, clip=loaded.clip, vae=loaded.vae,
    )  # fmt: skip
    return Loaded(node["model"], node["clip"], node["vae"])


def encode(graph: Graph, clip: Link, prompt: Prompt, row: int, label: str) -> tuple[Link, Link]:
    """Positive and negative conditioning; without a negative prompt core's Conditioning Zero Out."""
    positive = graph.add(
        "SpeedLabTextEncode", group="Prompt", row=row, title=f"Prompt{label}", clip=clip, text=prompt.text
    )
    if prompt.negative is None:
        negative = graph.add(
            "ConditioningZeroOut", group="Prompt", row=row, title=f"No negative{label}", conditioning=positive[0]
        )
    else:
        negative = graph.add(
            "SpeedLabTextEncode", group="Prompt", row=row, title=f"Negative{label}", clip=clip, text=prompt.negative
        )
    return positive[0], negative[0]


def decode(graph: Graph, plan: Plan, samples: Link, loaded: Loaded, row: int, label: str) -> Node:
    """The plan's decoder: the checkpoint's own VAE or a Tiny VAE that fits the model."""
    if plan.decoder == "tiny":
        return graph.add(
            "SpeedLabTinyVAEDecode", group="Decode", row=row, title=f"Tiny VAE Decode{label}",
            samples=samples, model=loaded.model,
        )  # fmt: skip
    return graph.add(
        "SpeedLabVAEDecode", group="Decode", row=row, title=f"VAE Decode{label}", samples=samples, vae=loaded.vae
    )


def measure(graph: Graph, scenario: Scenario, profile: Link, images: Link, row: int, label: str) -> None:
    """Profile Report, which saves the image too, and the step chart where the scenario shows one."""
    report = graph.add(
        "SpeedLabProfileReport", group="Measure", row=row, title=f"Report{label}", profile=profile, images=images
    )
    if scenario.settings.chart:
        graph.add("PreviewImage", group="Measure", row=row, title=f"Step chart{label}", images=report["chart"])


def empty_latent(graph: Graph, settings: Settings) -> Link:
    """One empty latent for every row, so that the size is set in one place."""
    node = graph.add(
        "EmptyLatentImage", group="Load", title="Size",
        width=settings.width, height=settings.height, batch_size=settings.batch,
    )  # fmt: skip
    return node[0]


def sample(
    graph: Graph, settings: Settings, prompt: Prompt, model: Link, conds: tuple[Link, Link], latent: Link, row: int,
    label: str,
) -> Node:  # fmt: skip
    """Profile Sampler with the scenario's settings and the prompt's seed."""
    return graph.add(
        "SpeedLabProfileSampler", group="Sample", row=row, title=f"Profile Sampler{label}",
        model=model, seed=prompt.seed, steps=settings.steps, cfg=settings.cfg,
        sampler_name=settings.sampler, scheduler=settings.scheduler,
        positive=conds[0], negative=conds[1], latent_image=latent, denoise=1.0,
        detail=settings.detail, warmup=settings.warmup, repeats=settings.repeats,
    )  # fmt: skip


def text_to_image(scenario: Scenario, load: Callable[[Graph, Scenario], Loaded] = load_checkpoint) -> Graph:
    """One checkpoint, one row a prompt: encode, sample under the profiler, decode, report, save."""
    graph = Graph()
    loaded = load(graph, scenario)
    latent = empty_latent(graph, scenario.settings)
    several = len(scenario.settings.prompts) > 1
    for row, prompt in enumerate(scenario.settings.prompts):
        label = f": {prompt.name}" if several else ""
        conds = encode(graph, loaded.clip, prompt, row, label)
        sampler = sample(graph, scenario.settings, prompt, loaded.model, conds, latent, row, label)
        image = decode(graph, scenario.plan, sampler["latent"], loaded, row, label)
        measure(graph, scenario, sampler["profile"], image[0], row, label)
    return graph


@dataclass(frozen=True)
class Rung:
    """One row: what the checkpoint is loaded as, and the techniques on the model."""

    label: str
    load: dict[str, Any] = field(default_factory=dict)
    techniques: tuple[Technique, ...] = ()


def side_by_side(rungs: tuple[Rung, ...]) -> Callable[[Scenario], Graph]:
    """The scenario's first prompt once for each rung; rows that load alike share a loader and its text encoding."""

    def build(scenario: Scenario) -> Graph:
        graph = Graph()
        checkpoint, prompt = scenario.file("checkpoint"), scenario.settings.prompts[0]
        if checkpoint is None:
            raise ValueError(f"scenario '{scenario.id}' names no checkpoint")
        latent = empty_latent(graph, scenario.settings)
        shared: dict[tuple[tuple[str, Any], ...], tuple[Loaded, tuple[Link, Link]]] = {}
        for row, rung in enumerate(rungs):
            key = tuple(sorted(rung.load.items()))
            if key not in shared:
                loader = graph.add(
                    "SpeedLabCheckpointLoader", group="Load", row=row, title=f"Load Checkpoint: {rung.label}",
                    ckpt_name=checkpoint.default, **rung.load,
                )  # fmt: skip
                loaded = Loaded(loader["model"], loader["clip"], loader["vae"])
                shared[key] = loaded, encode(graph, loaded.clip, prompt, row, f": {rung.label}")
            loaded, conds = shared[key]
            model = Plan(rung.label, rung.techniques).apply(graph, loaded.model, row)
            _finish(graph, scenario, Loaded(model, loaded.clip, loaded.vae), conds, latent, row, rung.label)
        return graph

    return build


def switched_loras(strengths: tuple[tuple[float, float], ...], compile_model: Technique) -> Callable[[Scenario], Graph]:
    """Two LoRAs on one compiled model, a row for each pair of strengths; 0 leaves a LoRA out."""

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
        for row, (strength_1, strength_2) in enumerate(strengths):
            label = f"{strength_1:g} and {strength_2:g}"
            stack = graph.add(
                "SpeedLabLoraStack", group="Load", row=row, title=f"LoRAs at {label}",
                model=loader["model"], clip=loader["clip"], lora_1=first.default, lora_2=second.default,
                strength_1=strength_1, strength_2=strength_2,
            )  # fmt: skip
            model = Plan(label, (compile_model,)).apply(graph, stack["model"], row)
            loaded = Loaded(model, stack["clip"], loader["vae"])
            conds = encode(graph, loaded.clip, prompt, row, f": {label}")
            _finish(graph, scenario, loaded, conds, latent, row, label)
        return graph

    return build


def _finish(
    graph: Graph, scenario: Scenario, loaded: Loaded, conds: tuple[Link, Link], latent: Link, row: int, label: str
) -> None:
    prompt, settings = scenario.settings.prompts[0], scenario.settings
    sampler = sample(graph, settings, prompt, loaded.model, conds, latent, row, f": {label}")
    graph.plans[sampler.id] = label
    image = decode(graph, scenario.plan, sampler["latent"], loaded, row, f": {label}")
    measure(graph, scenario, sampler["profile"], image[0], row, f": {label}")


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
        empty_latent(graph, settings), row=0, label="",
    )  # fmt: skip
    graph.set(sampler, seed=queue["seed"])
    sampled = graph.add(
        "SpeedLabFreeMemory", group="Sample", title="Free the UNet", value=sampler["latent"], what="diffusion"
    )
    images = _decode(graph, sampled[0], loaded.vae, 0, "")
    measure(graph, scenario, sampler["profile"], images[0], 0, "")
    return graph


def sliced_batches(scenario: Scenario) -> Graph:
    """One prompt in a row for each batch size up to the scenario's, decoded one image at a time."""
    settings = scenario.settings
    graph = Graph()
    loaded = load_checkpoint(graph, scenario)
    prompt = settings.prompts[0]
    for row, batch in enumerate([*(size for size in BATCHES if size < settings.batch), settings.batch]):
        label = f": batch {batch}"
        latent = graph.add(
            "EmptyLatentImage", group="Load", row=row, title=f"Size{label}",
            width=settings.width, height=settings.height, batch_size=batch,
        )[0]  # fmt: skip
        conds = encode(graph, loaded.clip, prompt, row, label)
        sampler = sample(graph, replace(settings, batch=batch), prompt, loaded.model, conds, latent, row, label)
        images = _decode(graph, sampler["latent"], loaded.vae, row, label, slicing=True)
        measure(graph, scenario, sampler["profile"], images[0], row, label)
    return graph


def tiled_image(scenario: Scenario) -> Graph:
    """One row a prompt, decoded in tiles."""
    graph = Graph()
    loaded = load_checkpoint(graph, scenario)
    latent = empty_latent(graph, scenario.settings)
    for row, prompt in enumerate(scenario.settings.prompts):
        label = f": {prompt.name}" if len(scenario.settings.prompts) > 1 else ""
        conds = encode(graph, loaded.clip, prompt, row, label)
        sampler = sample(graph, scenario.settings, prompt, loaded.model, conds, latent, row, label)
        images = _decode(graph, sampler["latent"], loaded.vae, row, label, tile_size=1024, overlap=128)
        measure(graph, scenario, sampler["profile"], images[0], row, label)
    return graph


def _decode(graph: Graph, samples: Any, vae: Any, row: int, label: str, **options: Any) -> Any:
    return graph.add(
        "SpeedLabVAEDecode", group="Decode", row=row, title=f"VAE Decode{label}", samples=samples, vae=vae, **options
    )


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
            seed=", ".join(str(prompt.seed) for prompt in prompts),
            warmup=settings.warmup, repeats=settings.repeats, plan=plan,
        )  # fmt: skip
        graph.add("PreviewImage", group="Measure", title="Plot", images=bench["plot"])
        graph.add("PreviewImage", group="Measure", title="Contact sheet", images=bench["contact_sheet"])
        return graph

    return build


def text_to_image_in(precision: str) -> Callable[[Scenario], Graph]:
    """A builder: one row a prompt, with the checkpoint loaded in `precision`."""

    def build(scenario: Scenario) -> Graph:
        graph = text_to_image(scenario)
        (loader,) = graph.find("SpeedLabCheckpointLoader")
        graph.set(loader, precision=precision)
        return graph

    return build


@dataclass(frozen=True)
class Variant:
    """One way: a plan on the checkpoint in `precision`, and where it differs, sampler, scheduler, steps and CFG.

    `lora`: with the scenario's LoRA, under the plan.
    """

    plan: Plan
    precision: str = "auto"
    sampler: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    cfg: float | None = None
    lora: bool = False

    def settings(self, settings: Settings, whole: Settings) -> Settings:
        """The scenario's `settings` with this variant's own, unless a command line changed the steps of `whole`."""
        steps = settings.steps if self.steps is None or settings.steps != whole.steps else self.steps
        return replace(
            settings, steps=steps, sampler=self.sampler or settings.sampler,
            scheduler=self.scheduler or settings.scheduler, cfg=settings.cfg if self.cfg is None else self.cfg,
        )  # fmt: skip


def prompts_for(variants: Iterable[Variant], prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """One prompt a row, named by variant and prompt: for the settings of a scenario of variants."""
    known = tuple(prompts)
    return tuple(
        replace(prompt, name=f"{variant.plan.name}, {prompt.name}" if len(known) > 1 else variant.plan.name)
        for variant in variants
        for prompt in known
    )


def in_variants(variants: tuple[Variant, ...], settings: Settings) -> Callable[[Scenario], Graph]:
    """A builder over `prompts_for(variants, prompts)`; `settings` are the scenario's own, before any command line."""

    def build(scenario: Scenario) -> Graph:
        graph = Graph()
        loaders = {precision: _load(graph, scenario, precision) for precision in _precisions(variants)}
        latent = empty_latent(graph, scenario.settings)
        prompts = scenario.settings.prompts
        each = len(prompts) // len(variants)
        for row, prompt in enumerate(prompts):
            variant = variants[row // each]
            loaded, label = loaders[variant.precision], f": {prompt.name}"
            if row % each == 0:  # the rows of a variant share its model
                under = _with_lora(graph, scenario, loaded, row) if variant.lora else loaded
                model = variant.plan.apply(graph, under.model, row)
            own = variant.settings(scenario.settings, settings)
            conds = encode(graph, under.clip, prompt, row, label)
            sampler = sample(graph, own, prompt, model, conds, latent, row, label)
            graph.plans[sampler.id] = variant.plan.name
            image = decode(graph, variant.plan, sampler["latent"], replace(loaded, model=model), row, label)
            measure(graph, scenario, sampler["profile"], image[0], row, label)
        return graph

    return build


def _with_lora(graph: Graph, scenario: Scenario, loaded: Loaded, row: int) -> Loaded:
    """The scenario's LoRA, once for all rows that have it."""
    file = scenario.file("lora")
    if file is None:
        raise ValueError(f"scenario '{scenario.id}' names no LoRA")
    stacks = graph.find("SpeedLabLoraStack")
    stack = stacks[0] if stacks else graph.add(
        "SpeedLabLoraStack", group="Load", row=row, title="Load LoRA Stack", model=loaded.model, clip=loaded.clip,
        lora_1=file.default, strength_1=1.0,
    )  # fmt: skip
    return Loaded(stack["model"], stack["clip"], loaded.vae)


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
    """ControlNet on edges of an image; the control, the true image and the result side by side."""
    graph, settings = Graph(), scenario.settings
    prompt = settings.prompts[0]
    net_file, image = scenario.file("controlnet"), scenario.file("image")
    if net_file is None or image is None:
        raise ValueError(f"scenario '{scenario.id}' names no ControlNet or no image")
    loaded = _load(graph, scenario, "auto")
    model = scenario.plan.apply(graph, loaded.model)
    latent = empty_latent(graph, settings)
    net = graph.add("ControlNetLoader", group="Load", title="Load ControlNet", control_net_name=net_file.default)
    truth = graph.add("LoadImage", group="Load", title="True image", image=image.default)
    edges = graph.add(
        "Canny", group="Prompt", title="Control: edges", image=truth[0], low_threshold=0.3, high_threshold=0.7
    )
    conds = encode(graph, loaded.clip, prompt, 0, "")
    controlled = graph.add(
        "ControlNetApplyAdvanced", group="Prompt", title="Apply ControlNet", positive=conds[0], negative=conds[1],
        control_net=net[0], image=edges[0], strength=1.0, start_percent=0.0, end_percent=1.0, vae=loaded.vae,
    )  # fmt: skip
    sampler = sample(graph, settings, prompt, model, (controlled[0], controlled[1]), latent, 0, "")
    decoded = decode(graph, scenario.plan, sampler["latent"], replace(loaded, model=model), 0, "")
    measure(graph, scenario, sampler["profile"], decoded[0], 0, "")
    joined = _beside(graph, _beside(graph, edges[0], truth[0])[0], decoded[0])
    graph.add("PreviewImage", group="Measure", title="Control, truth, result", images=joined[0])
    return graph


def _beside(graph: Graph, left: Link, right: Link) -> Node:
    return graph.add(
        "ImageStitch", group="Measure", title="Side by side", image1=left, image2=right, direction="right",
        match_image_size=True, spacing_width=8, spacing_color="white",
    )  # fmt: skip


ALONE = Variant(STOCK)

"""What a scenario is made of: the types behind the table in `catalog.py`.

Plans: named stacks of techniques that a text-to-image graph can carry.

Files, prompts and settings that many scenarios share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..client.graph import Graph, Link

SOURCES = {
    "S0": "a ComfyUI timing and Nsight study of an SDXL checkpoint",
    "S1": '"Ultimate guide to optimizing Stable Diffusion XL"',
    "S2": "a GPU and CPU benchmark of Stable Diffusion",
    "S3": "the diffusers memory guide",
    "S4": "a general guide to faster Stable Diffusion",
}
FAMILIES = ("sd15", "sdxl", "refiner")


@dataclass(frozen=True)
class NeededFile:
    """A model file. `kind` is what a substitution replaces, `default` the name in the shipped graph.

    `url` is where its authors publish the very file, "" where they do not. ComfyUI saves it as `default`, but a browser
    that is told to fetch it keeps the address's name: `where` says so where that is another one.
    """

    kind: str
    folder: str
    default: str
    where: str
    optional: bool = False
    url: str = ""


def models_of(files: Iterable[NeededFile]) -> list[dict[str, str]]:
    """Those of the files that can be fetched, as ComfyUI's workflows name models."""
    return [
        {"name": entry.default, "url": entry.url, "directory": entry.folder.removeprefix("models/")}
        for entry in files
        if entry.url
    ]


@dataclass(frozen=True)
class Prompt:
    """A text with its seed. `negative` None means no negative prompt: zeroed conditioning."""

    name: str
    text: str
    seed: int
    negative: str | None = None


@dataclass(frozen=True)
class Settings:
    """What is sampled: sizes in pixels, `detail` and `decoder` as the nodes name them."""

    prompts: tuple[Prompt, ...]
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg: float = 8.0
    sampler: str = "euler"
    scheduler: str = "normal"
    batch: int = 1
    detail: str = "timing"
    warmup: int = 0
    repeats: int = 1
    chart: bool = False


@dataclass(frozen=True)
class Published:
    """A figure of the source and the device it was measured on."""

    figure: str
    device: str


@dataclass(frozen=True)
class Scenario:
    """One row of the table: a drag-in workflow, the same graph headless, and what both need.

    `packages` are Python modules beside ComfyUI's own that it cannot run without. `variant_of` names the scenario whose
    workflow file it shares, since one setting of one kind of node is all that differs.
    """

    id: str
    source: str
    title: str
    shows: str
    family: str
    files: tuple[NeededFile, ...]
    settings: Settings
    published: tuple[Published, ...]
    plan: Plan
    build: Callable[[Scenario], Graph]
    packages: tuple[str, ...] = ()
    variant_of: str = ""

    def graph(self) -> Graph:
        """The scenario's graph with its own settings."""
        return self.build(self)

    def with_settings(self, settings: Settings) -> Scenario:
        """The same scenario with other settings."""
        return replace(self, settings=settings)

    def file(self, kind: str) -> NeededFile | None:
        """The needed file of that kind, or None."""
        return next((entry for entry in self.files if entry.kind == kind), None)


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

    def apply(self, graph: Graph, model: Link, row: int = 0) -> Link:
        """Add the techniques behind `model`; returns the MODEL that the sampler takes."""
        for technique in self.techniques:
            node = graph.add(
                technique.node_id, group="Load", row=row, title=technique.name, model=model, **technique.options
            )
            model = node[0]
        return model


STOCK = Plan("stock")
TINY_VAE = Plan("Tiny VAE", decoder="tiny")

HUGGING_FACE = "https://huggingface.co"
CHECKPOINT_SDXL = NeededFile(
    kind="checkpoint", folder="models/checkpoints", default="sd_xl_base_1.0.safetensors",
    where="SDXL base 1.0 by Stability AI, on Hugging Face as stabilityai/stable-diffusion-xl-base-1.0",
    url=f"{HUGGING_FACE}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
)  # fmt: skip
CHECKPOINT_ANY = NeededFile(
    kind="checkpoint", folder="models/checkpoints", default="sd_xl_base_1.0.safetensors",
    where="any SD 1.x, SD 2.x or SDXL checkpoint; the published figures were taken with an SDXL one, such as SDXL base "
    "1.0 by Stability AI, on Hugging Face as stabilityai/stable-diffusion-xl-base-1.0",
    url=f"{HUGGING_FACE}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
)  # fmt: skip
CHECKPOINT_SD15 = NeededFile(
    kind="checkpoint",
    folder="models/checkpoints",
    default="v1-5-pruned-emaonly.safetensors",
    where="Stable Diffusion 1.5, on Hugging Face as stable-diffusion-v1-5/stable-diffusion-v1-5",
    url=f"{HUGGING_FACE}/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/v1-5-pruned-emaonly.safetensors",
)
TINY_VAE_SDXL = NeededFile(
    kind="tiny_vae", folder="models/vae_approx", default="taesdxl_decoder.safetensors",
    where="TAESDXL by madebyollin, on GitHub as madebyollin/taesd",
)  # fmt: skip

LIGHTHOUSE = Prompt(
    name="lighthouse",
    text="a lighthouse on a rocky coast at dawn, soft light, long exposure of the sea, photograph",
    seed=20230711,
    negative="text, watermark, blurry",
)
# The prompt of S2 and S3.
ASTRONAUT = Prompt(name="astronaut", text="a photo of an astronaut riding a horse on mars", seed=1024)
# The four prompts and seeds of S1, fixed in each of its scenarios; it uses no negative prompt.
FOUR_PROMPTS = (
    Prompt(
        "portrait",
        "3/4 shot, candid photograph of a beautiful 30 year old redhead woman with messy dark hair, peacefully "
        "sleeping in her bed, night, dark, light from window, dark shadows, masterpiece, uhd, moody",
        877866765,
    ),
    Prompt(
        "interior",
        "futuristic living room with big windows, brown sofas, coffee table, plants, cyberpunk city, concept art, "
        "earthy colors",
        5567822456,
    ),
    Prompt("macro", "macro shot of a bee collecting nectar from lavender flowers", 2257899453),
    Prompt("3d", "3d rendered isometric fiji island beach, 3d tile, polygon, cartoony, mobile game", 987867834),
)

S0_SETTINGS = Settings(prompts=(LIGHTHOUSE,), width=512, height=512, steps=20, cfg=8.0)
S1_SETTINGS = Settings(prompts=FOUR_PROMPTS, width=1024, height=1024, steps=50, cfg=5.0)
A100 = "A100-PCIE-40GB"
RTX_3090 = "RTX 3090"

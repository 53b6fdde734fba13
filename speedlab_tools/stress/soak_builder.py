"""Graphs of random prompts while they are made: nodes with random settings, and the small graphs beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from .soak_values import sockets, widget_values

# Nodes with a share of their own, for what they cost.
_APART = ("SpeedLabStress", "SpeedLabCompile", "SpeedLabMemoryPlan")
_AXES = (
    ("steps", "1, 2"),
    ("batch", "1, 2"),
    ("cfg", "1, 5"),
    ("sampler", "euler, heun"),
    ("attention", "sdpa, split"),
    ("deepcache_interval", "off, 2"),
    ("plan", "stock\nfast=attention(sdpa)+deepcache(cache_interval=2)"),
)
_PLAIN = {"seed": 1, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}

Link = list[Any]


@dataclass(frozen=True)
class Kit:
    """What the prompts may use: model files by their names on the server (`refiner` belongs to `sdxl`; "" where there
    is none), tiny decoders, and backends of Compile Model, of which many take a minute for their first program."""

    sd15: str
    loras: Sequence[str] = ()
    vaes: Sequence[str] = ()
    sdxl: str = ""
    refiner: str = ""
    backends: Sequence[str] = ("jit_trace",)
    tiny: Sequence[str] = ()


def chained(info: Mapping[str, Any]) -> list[str]:
    """The nodes of this pack that take a model, settings and nothing else, and give a model, but for those apart."""
    return [
        name
        for name, node in sorted(info.items())
        if name.startswith("SpeedLab")
        and not name.startswith(_APART)
        and list(sockets(node).values()) == ["MODEL"]
        and node["output"][:1] == ["MODEL"]
    ]


@dataclass
class GraphBuilder:
    """A graph of `nodes` by id, for a server that describes its nodes as `info`; `loader` is Load Checkpoint's."""

    info: Mapping[str, Any]
    kit: Kit
    rng: Random
    loader: Mapping[str, Any]
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> str:
        """A node; its id."""
        self.nodes[str(len(self.nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return str(len(self.nodes))

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def random(self, class_type: str, **inputs: Any) -> str:
        """A node with random settings but for `inputs`."""
        return self.add(class_type, **{**widget_values(self.info[class_type], self.rng), **inputs})

    def some(self, **inputs: Any) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if self.chance(0.6)}

    def freed(self, value: Link, wait_for: Link | None = None) -> Link:
        waits = {} if wait_for is None else {"wait_for": wait_for}
        return [self.random("SpeedLabFreeMemory", value=value, **waits), 0]

    def benchmark(self, model: Link, clip: Link, vae: Link) -> None:
        axis, values = self.rng.choice(_AXES)
        self.add("SpeedLabBenchmark", model=model, clip=clip, vae=vae, positive="a tree", negative="",
                 axis_x=axis, values_x=values, axis_y="none", values_y="", width=64, height=64, batch=1, steps=2,
                 cfg=5.0, sampler_name="euler", scheduler="normal", seed="1", warmup=0, repeats=1, plan="")  # fmt: skip

    def build_first(self, backend: str, measured: bool) -> None:
        """The model compiled by that backend; `measured`: traced, drawn and benchmarked too, and what a process loads
        once and keeps."""
        loaded = self.add("SpeedLabCheckpointLoader", **self.loader)
        compiled = self.add("SpeedLabCompileModel", model=[loaded, 0], backend=backend, scope="auto", mode="default",
                            dynamic="auto", on_failure="error", freeze_weights=False)  # fmt: skip
        latent, texts = self.small(loaded)
        sampled = self.add("SpeedLabProfileSampler", model=[compiled, 0], **_PLAIN, **texts, latent_image=[latent, 0],
                           detail="trace" if measured else "timing", warmup=0, repeats=1, nvtx=True)  # fmt: skip
        self.add("SpeedLabStressDigest", samples=[sampled, 0])
        if not measured:
            return
        report = self.add("SpeedLabProfileReport", profile=[sampled, 1])
        self.add("PreviewImage", images=[report, 2])
        self.benchmark([loaded, 0], [loaded, 1], [loaded, 2])
        for decoder in self.kit.tiny:
            images = self.add("SpeedLabTinyVAEDecode", samples=[latent, 0], decoder=decoder, slice_size=0, tile_size=0)
            self.add("SpeedLabStressDigest", samples=[latent, 0], images=[images, 0])
        # It takes gradients, for which PyTorch starts threads.
        deis = self.add("KSampler", model=[loaded, 0], **{**_PLAIN, "sampler_name": "deis"}, **texts,
                        latent_image=[latent, 0])  # fmt: skip
        self.add("SpeedLabStressDigest", samples=[deis, 0])

    def build_stock(self, settings: Mapping[str, Any]) -> None:
        """Core's sampler alone."""
        loaded = self.add("SpeedLabCheckpointLoader", **self.loader)
        latent, texts = self.small(loaded)
        inputs = {**_PLAIN, **settings, **texts, "latent_image": [latent, 0]}
        self.add("SpeedLabStressDigest", samples=[self.add("KSampler", model=[loaded, 0], **inputs), 0])

    def small(self, loaded: str) -> tuple[str, dict[str, Link]]:
        """A latent, and the positive and negative text."""
        text = self.add("SpeedLabTextEncode", clip=[loaded, 1], text="a tree")
        latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        return latent, {"positive": [text, 0], "negative": [text, 0]}

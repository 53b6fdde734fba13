"""Random values for the widgets of a node, from the server's own description of it.

Graphs of random prompts while they are made: nodes with random settings, and the small graphs beside them.

Random prompts over all nodes of this pack: which nodes, their settings, sizes, samplers, LoRAs, batches.

A prompt follows from the seed and its number alone, so that each can be made again by itself.

The graph of one random prompt: which nodes of this pack stand in it, in what order, with what settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from speedlab.plans.plan_text import PRESETS

from ..client.graph import ApiGraph

_WIDGETS = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
_DEFAULT_SHARE = 0.4
# Far from a default there is only more of the same, and it takes longer.
_MOST_OVER_DEFAULT = 6


def choices(node: Mapping[str, Any], name: str) -> list[Any]:
    """The choices of a node's combo, as `/object_info` tells them in old and in new words; empty where it is none."""
    spec = {**node["input"].get("required", {}), **node["input"].get("optional", {})}.get(name, [None])
    return list(spec[0] if isinstance(spec[0], list) else _options(spec).get("options", []))


def sockets(node: Mapping[str, Any], part: str = "required") -> dict[str, str]:
    """The inputs of a node that take links: name -> type."""
    return {name: spec[0] for name, spec in node["input"].get(part, {}).items() if not _is_widget(spec)}


def widget_values(node: Mapping[str, Any], rng: Random) -> dict[str, Any]:
    """A value for every widget, in range: the default, or a random one."""
    specs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    return {name: _value(spec, rng) for name, spec in specs.items() if _is_widget(spec)}


def _is_widget(spec: Sequence[Any]) -> bool:
    return isinstance(spec[0], list) or (spec[0] in _WIDGETS and not _options(spec).get("forceInput"))


def _options(spec: Sequence[Any]) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _value(spec: Sequence[Any], rng: Random) -> Any:
    kind, options = spec[0], _options(spec)
    if "default" in options and rng.random() < _DEFAULT_SHARE:
        return options["default"]
    if isinstance(kind, list) or kind == "COMBO":
        return rng.choice(kind if isinstance(kind, list) else options["options"])
    if kind == "BOOLEAN":
        return rng.random() < 0.5
    if kind == "STRING":
        return options.get("default", "")
    low, high = options.get("min", 0), options.get("max", 1)
    high = min(high, _MOST_OVER_DEFAULT * max(abs(options.get("default", 0)), 1))
    if kind == "INT":
        return low + options.get("step", 1) * rng.randint(0, int((high - low) // options.get("step", 1)))
    return round(rng.uniform(low, high), 3)


# Nodes with a share of their own, for what they cost.
_APART = ("SpeedLabStress", "SpeedLabCompile", "SpeedLabMemoryPlan", "SpeedLabAccelerate")
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

    def tune(self, model: Link, clip: Link, vae: Link) -> None:
        """Seconds for a plan or two: what counts is what stays behind."""
        self.add("SpeedLabTune", model=model, clip=clip, vae=vae, positive="a tree", negative="", width=64, height=64,
                 batch=1, steps=2, cfg=5.0, sampler_name="euler", scheduler="normal", seed="1", quality="any",
                 budget_minutes=0.1, budget_gb=0.0, candidates="deepcache(2)", steps_axis="",
                 samplers_axis="")  # fmt: skip

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


# Prompts in a row that share a checkpoint and its precision: loading one again takes longer than all that follows.
BLOCK = 20
# What picks by measuring may pick another way in another process, and inductor makes other code for sizes seen before.
_MEASURED = {
    ("SpeedLabAttention", "backend", "auto"),
    ("SpeedLabPrecision", "linear", "auto"),
    ("SpeedLabCompileModel", "backend", "inductor"),
    *(("SpeedLabAccelerate", "preset", preset) for preset in PRESETS),
}


@dataclass(frozen=True)
class SoakPrompt:
    """A prompt. `repeatable`: every choice in it is fixed, so that it gives the same bits in any process."""

    number: int
    graph: ApiGraph
    repeatable: bool

    @property
    def classes(self) -> set[str]:
        """The node classes in it."""
        return {str(node["class_type"]) for node in self.graph.values()}

    @property
    def loads(self) -> tuple[Any, ...]:
        """What it loads: prompts that agree follow each other without loading again."""
        return tuple(
            sorted(str(n["inputs"]) for n in self.graph.values() if n["class_type"] == "SpeedLabCheckpointLoader")
        )


class SoakPrompts:
    """The prompts of a seed, for a server that describes its nodes as `info` (`/object_info`)."""

    def __init__(self, info: Mapping[str, Any], kit: Kit, seed: int) -> None:
        self.info, self.kit, self.seed = info, kit, seed

    def prompt(self, number: int) -> SoakPrompt:
        """Prompt `number`, from 0 on."""
        block = Random(f"{self.seed}/block/{number // BLOCK}")
        sdxl = bool(self.kit.sdxl) and block.random() < 0.1
        loader = widget_values(self.info["SpeedLabCheckpointLoader"], block)
        loader["ckpt_name"] = self.kit.sdxl if sdxl else self.kit.sd15
        graph = SoakGraph(self.info, self.kit, Random(f"{self.seed}/{number}"), loader)
        graph.build(number)
        measured = any(
            (node["class_type"], name, value) in _MEASURED
            for node in graph.nodes.values()
            for name, value in node["inputs"].items()
            if isinstance(value, str)
        )
        return SoakPrompt(number, graph.nodes, not measured)

    def first(self) -> list[ApiGraph]:
        """Prompts with what loads a library or fills a cache once, to be run before anything is counted."""
        return [
            self._plain(partial(GraphBuilder.build_first, backend=backend, measured=number == 0))
            for number, backend in enumerate(self.kit.backends)
        ]

    def stock_twin(self, prompt: SoakPrompt) -> ApiGraph | None:
        """Core's sampler with the settings of a prompt's first one, on the plain model; None where it has none."""
        for node in prompt.graph.values():
            if node["class_type"] in ("SpeedLabProfileSampler", "KSampler"):
                kept = ("steps", "cfg", "sampler_name", "scheduler", "denoise")
                settings = {name: node["inputs"][name] for name in kept}
                return self._plain(partial(GraphBuilder.build_stock, settings=settings))
        return None

    def _plain(self, build: Callable[[GraphBuilder], None]) -> ApiGraph:
        loader = {"ckpt_name": self.kit.sd15, "precision": "auto", "memory_format": "contiguous"}
        graph = GraphBuilder(self.info, self.kit, Random(self.seed), loader)
        build(graph)
        return graph.nodes


# Of that many prompts one runs compiled: by jit_trace, or by another backend once in _COMPILED_OTHERWISE of these.
COMPILED = 33
_COMPILED_OTHERWISE = 5
# It takes as many evaluations as it likes, which on random weights is without end.
_NO_SAMPLER = frozenset({"dpm_adaptive"})
# Without fp16: CPUs without instructions for it take minutes for one small image.
_VAE_PRECISIONS = ("auto", "auto", "fp32", "bf16")
_WORDS = ("a tree", "a house by the sea", "", "fog", "an (old:1.3) man, [smiling]", "a very long road " * 30)


class SoakGraph(GraphBuilder):
    """Everything that a prompt may hold, at random."""

    def build(self, number: int) -> None:
        loaded = self.add("SpeedLabCheckpointLoader", **self.loader)
        model, clip, vae = [loaded, 0], [loaded, 1], [loaded, 2]
        latent = [self._latent(), 0]
        if self.kit.vaes and self.chance(0.15):
            vae = [self.random("SpeedLabVAELoader", vae_name=self.rng.choice(self.kit.vaes),
                                precision=self.rng.choice(_VAE_PRECISIONS)), 0]  # fmt: skip
        if self.kit.loras and self.loader["ckpt_name"] == self.kit.sd15 and self.chance(0.2):
            model, clip = self._loras(model, clip)
        plain = model
        # A choice of their own, so that all other choices of a seed stay what they were.
        plans = Random(f"{number}/{self.loader['ckpt_name']}/plans")
        if plans.random() < 0.05:
            done = self.add("SpeedLabAccelerate", model=model, preset=plans.choice(list(PRESETS)), custom="",
                            compile=False, clip=clip, vae=vae)  # fmt: skip
            model, clip, vae = [done, 0], [done, 1], [done, 2]
        if plans.random() < 0.02:
            self.tune(plain, [loaded, 1], [loaded, 2])
        model = self._chain(model)
        if self.chance(0.2):
            budget = self.rng.choice((0.0, 0.0, 0.0, 0.05, 2.0))
            planned = self.random("SpeedLabMemoryPlan", model=model, budget_gb=budget,
                                   **self.some(clip=clip, vae=vae, latent=latent))  # fmt: skip
            inputs = self.nodes[planned]["inputs"]
            model = [planned, 0]
            clip, vae = [planned, 1] if "clip" in inputs else clip, [planned, 2] if "vae" in inputs else vae
        if self.chance(1 / COMPILED):
            model = self._compiled(model)
        if self.chance(0.5 / COMPILED):
            vae = [self.add("SpeedLabCompileVAE", vae=vae, backend="jit_trace", mode="default"), 0]
        positive, negative, seed = self._texts(clip)
        if self.chance(0.02):
            self.benchmark(model, clip, vae)
        self._sample((model, plain), (positive, negative, seed), latent, vae, number)

    def _latent(self) -> str:
        width, height = (self.rng.choices((64, 72, 96), (10, 1, 1))[0] for _ in range(2))
        return self.add("EmptyLatentImage", width=width, height=height,
                        batch_size=self.rng.choices((1, 2, 3), (10, 2, 1))[0])  # fmt: skip

    def _loras(self, model: Link, clip: Link) -> tuple[Link, Link]:
        names = ["None", *self.kit.loras]
        chosen = {f"lora_{slot}": self.rng.choices(names, (4, *(1 for _ in names[1:])))[0] for slot in range(1, 5)}
        strengths = {f"strength_{slot}": self.rng.choice((1.0, 1.0, 0.5, 0.0, -0.7, 3.0)) for slot in range(1, 5)}
        stack = self.add("SpeedLabLoraStack", model=model, clip=clip, **chosen, **strengths)
        return [stack, 0], [stack, 1]

    def _chain(self, model: Link) -> Link:
        """Some of the nodes that change a model, in any order."""
        names = [name for name in chained(self.info) if self.chance(0.3)]
        self.rng.shuffle(names)
        for name in names:
            model = [self.random(name, model=model), 0]
        return model

    def _compiled(self, model: Link) -> Link:
        settings = {"backend": "jit_trace", "scope": "auto", "mode": "default", "dynamic": "auto"}
        if self.rng.randrange(_COMPILED_OTHERWISE) == 0:
            settings["backend"] = self.rng.choice(self.kit.backends)
        frozen = settings["backend"] == "jit_trace" and self.chance(0.3)
        return [self.add("SpeedLabCompileModel", model=model, on_failure="error", freeze_weights=frozen,
                         **settings), 0]  # fmt: skip

    def _texts(self, clip: Link) -> tuple[Link, Link, Any]:
        """Positive, negative and the seed."""
        seed: Any = self.rng.randrange(2**63)
        if self.chance(0.15):
            lines = self.rng.choices(("a dog", "a cat", "a hill"), k=self.rng.randint(1, 3))
            queue = self.add("SpeedLabPromptQueue", clip=clip, prompts="\n".join(lines),
                             negative=self.rng.choice(("", "blurry")), seeds=str(seed))  # fmt: skip
            positive, negative, seed = [queue, 0], [queue, 1], [queue, 2]
        else:
            positive, negative = ([self.add("SpeedLabTextEncode", clip=clip, text=self.rng.choice(_WORDS)), 0]
                                  for _ in range(2))  # fmt: skip
        if self.chance(0.15):
            positive = self.freed(positive, negative)
        return positive, negative, seed

    def _sample(self, models: tuple[Link, Link], texts: tuple[Link, Link, Any], latent: Link, vae: Link, number: int
                ) -> None:  # fmt: skip
        sampled, profile, same = self._sampler(models, texts, latent)
        result = [sampled, 0]
        if same is not None and self.chance(0.06):
            other = self.add("KSampler", **{**same, "seed": texts[2]})
            self.add("SpeedLabCompareLatents", samples_a=result, samples_b=[other, 0])
        if self.chance(0.2):
            result = self.freed(result)
        images = self._decoded(result, vae, models[0])
        if profile:
            report = self.add("SpeedLabProfileReport", profile=[sampled, 1], **({"images": images} if images else {}))
            if self.chance(0.04):
                self.add("PreviewImage", images=[report, 2])
        if images and self.chance(0.3):
            self.add("SaveImage", images=images, filename_prefix=f"soak/{number}")
        self.add("SpeedLabStressDigest", samples=result, **({"images": images} if images else {}))

    def _sampler(self, models: tuple[Link, Link], texts: tuple[Link, Link, Any], latent: Link
                 ) -> tuple[str, bool, dict[str, Any] | None]:  # fmt: skip
        """The sampler's id, whether it gives a profile, and the inputs that KSampler would take."""
        positive, negative, seed = texts
        samplers = [n for n in choices(self.info["KSampler"], "sampler_name") if n not in _NO_SAMPLER]
        common = {"seed": seed, "steps": self.rng.choice((1, 2, 2, 2, 3)), "cfg": self.rng.choice((1.0, 4.0, 7.5)),
                  "sampler_name": self.rng.choice(samplers),
                  "scheduler": self.rng.choice(choices(self.info["KSampler"], "scheduler"))}  # fmt: skip
        if self.chance(0.06):
            return self._ensemble(models, positive, negative, latent, common), True, None
        inputs = {**common, "model": models[0], "positive": positive, "negative": negative, "latent_image": latent,
                  "denoise": self.rng.choice((1.0, 1.0, 1.0, 0.6, 0.3))}  # fmt: skip
        if self.chance(0.1):
            return self.add("KSampler", **inputs), False, None
        detail = self.rng.choices(choices(self.info["SpeedLabProfileSampler"], "detail"), (20, 1, 1))[0]
        measured = {"detail": detail, "warmup": int(self.chance(0.04)), "repeats": 1 + int(self.chance(0.04)),
                    "nvtx": self.chance(0.5)}  # fmt: skip
        return self.add("SpeedLabProfileSampler", **inputs, **measured), True, inputs

    def _ensemble(self, models: tuple[Link, Link], positive: Link, negative: Link, latent: Link,
                  common: Mapping[str, Any]) -> str:  # fmt: skip
        """Base and refiner; where there is no refiner, the base with other techniques on it stands for one."""
        refiner, texts = self._chain(models[1]), (positive, negative)
        if self.kit.refiner and self.loader["ckpt_name"] == self.kit.sdxl and self.chance(0.5):
            loaded = self.add("SpeedLabCheckpointLoader", **{**self.loader, "ckpt_name": self.kit.refiner})
            refiner = [loaded, 0]
            texts = tuple(  # type: ignore[assignment]
                [self.add("SpeedLabTextEncode", clip=[loaded, 1], text=text), 0] for text in ("a tree", "")
            )
        return self.add("SpeedLabEnsembleSampler", base_model=models[0], base_positive=positive, base_negative=negative,
                        refiner_model=refiner, refiner_positive=texts[0], refiner_negative=texts[1], latent=latent,
                        handoff=self.rng.choice((0.0, 0.5, 0.8, 1.0)), detail="timing", **common)  # fmt: skip

    def _decoded(self, latent: Link, vae: Link, model: Link) -> Link | None:
        way = self.rng.choices(("tiny", "full", "both", "core", "none"), (10, 4, 1, 1, 4))[0]
        tiny = {"decoder": "auto", "model": model, "slice_size": self.rng.choice((0, 1, 2)),
                "tile_size": self.rng.choice((0, 64))}  # fmt: skip
        if way in ("tiny", "both"):
            images: Link = [self.add("SpeedLabTinyVAEDecode", samples=latent, **tiny), 0]
        elif way == "full":
            return [self._full(latent, vae), 0]
        else:
            return [self.add("VAEDecode", samples=latent, vae=vae), 0] if way == "core" else None
        if way == "both":
            self.add("SpeedLabCompareImages", image_a=images, image_b=[self._full(latent, vae), 0])
        return images

    def _full(self, latent: Link, vae: Link) -> str:
        return self.random("SpeedLabVAEDecode", samples=latent, vae=vae, tile_size=self.rng.choice((0, 0, 64)),
                            overlap=self.rng.choice((0, 32, 64)),
                            precision=self.rng.choice(_VAE_PRECISIONS))  # fmt: skip

"""The graph of one random prompt: which nodes of this pack stand in it, in what order, with what settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .soak_builder import GraphBuilder, Link, chained
from .soak_values import choices

# Of that many prompts one runs compiled: by jit_trace, or by another backend once in _COMPILED_OTHERWISE of these.
COMPILED = 33
_COMPILED_OTHERWISE = 5
# It takes as many evaluations as it likes, which on random weights is without end.
_NO_SAMPLER = frozenset({"dpm_adaptive"})
# Without fp16: processors without instructions for it take minutes for one small picture.
_VAE_PRECISIONS = ("auto", "auto", "fp32", "bf16")
_WORDS = ("a tree", "a house by the sea", "", "fog", "an (old:1.3) man, [smiling]", "a very long road " * 30)


class SoakGraph(GraphBuilder):
    """Everything that a prompt may hold, by chance."""

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

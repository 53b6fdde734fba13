"""What the training sees: scenes by number, their captions encoded once and kept on disk, pictures drawn afresh.

A drawing costs a millisecond, so no two steps see the same one; an encoded caption costs a hundred, so there is a pool.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from speedlab.measure.drawn import world

from ..drawn import latents
from ..drawn.factors import SD15, TOKENS, Model

_SCENES, _DRAWINGS, _HELD_OUT, NOISES = 1, 2, 3, 4
_HELD_SHARE = 0.1
Encode = Callable[[Sequence[str]], torch.Tensor]
"""Texts to (n, numbers of the model): what ComfyUI's text encoder of the demo checkpoint gives for them."""


def is_held_out(scene: world.Scene) -> bool:
    """Whether a scene is kept for the examination: it is never trained on, whatever its caption's order."""
    return hashlib.sha256(repr(scene).encode()).digest()[0] < 256 * _HELD_SHARE


def scenes(seed: int, count: int, held_out: bool = False) -> list[tuple[world.Scene, str]]:
    """The first `count` scenes of a seed with captions: those to train on, or those for the examination."""
    found: list[tuple[world.Scene, str]] = []
    number = 0
    while len(found) < count:
        rng = world.generator(seed, _HELD_OUT if held_out else _SCENES, number)
        scene = world.random_scene(rng)
        if is_held_out(scene) == held_out:
            found.append((scene, world.caption(scene, rng)))
        number += 1
    return found


# Height, width, where it was cut from (twice), and height and width again: what ComfyUI takes where no node tells them.
SIZES = (768, 768, 0, 0, 768, 768)
_SIDES = (64, 128, 256, 384, 512, 768, 1024)


def draw_sizes(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Sizes to tell SDXL of, (count, 6): those that ComfyUI takes for none, or any. A drawing follows none of them."""
    height, width = rng.choice(_SIDES, (2, count))
    told = np.stack([height, width, 0 * height, 0 * height, height, width], axis=1)
    return torch.from_numpy(np.where(rng.random((count, 1)) < 0.5, SIZES, told)).float()


@dataclass(frozen=True)
class Pool:
    """Captions with their encodings; number 0 is the empty one."""

    scenes: tuple[world.Scene, ...]
    encoded: np.ndarray
    model: Model = SD15

    def given(self, numbers: np.ndarray | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodings of captions: of their tokens (n, 77, width), and of the whole texts (n, 1280 or 0)."""
        rows = torch.from_numpy(np.array(self.encoded[numbers])).float()
        tokens = TOKENS * self.model.unet.context_dim
        return rows[:, :tokens].unflatten(1, (TOKENS, -1)), rows[:, tokens:]

    def batch(
        self, seed: int, step: int, count: int, side: int, dropped: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents and captions of a step: the same for the same numbers, whatever was trained before."""
        rng = world.generator(seed, _DRAWINGS, step)
        chosen = rng.integers(len(self.scenes), size=count)
        pictures = np.stack([world.draw(self.scenes[number], rng, side) for number in chosen])
        texts = np.where(rng.random(count) < dropped, 0, chosen + 1)
        return torch.from_numpy(latents.encode(pictures)), *self.given(texts)


def open_pool(
    folder: Path, seed: int, count: int, encode: Encode | None = None, batch: int = 16, model: Model = SD15
) -> Pool:
    """The pool of `count` captions in `folder`; what is missing is encoded by `encode`, a batch at a time.

    An interrupted run goes on where it stopped, and a larger `count` adds to what is there.
    """
    pairs = scenes(seed, count)
    texts = ["", *(text for _, text in pairs)]
    folder.mkdir(parents=True, exist_ok=True)
    about, path = folder / "captions.json", folder / "captions.f16"
    done, size = 0, 2 * model.numbers
    if about.is_file() and path.is_file():
        kept = json.loads(about.read_text())
        done = min(len(kept), path.stat().st_size // size)
        known = min(done, len(texts))
        if kept[:known] != texts[:known]:
            raise ValueError(f"{folder} holds captions of another seed or grammar; choose another folder")
    if done < len(texts):
        if encode is None:
            raise ValueError(f"{folder} holds {done} of {len(texts)} encoded captions; run the stage captions first")
        with path.open("r+b" if path.is_file() else "wb") as file:
            file.seek(done * size)
            about.write_text(json.dumps(texts))
            for start in range(done, len(texts), batch):
                file.write(encode(texts[start : start + batch]).to(torch.float16).numpy().tobytes())
                file.flush()
                if (start - done) % (20 * batch) == 0:
                    print(f"captions: {start} of {len(texts)}", flush=True)
    encoded = np.memmap(path, np.float16, "r", shape=(len(texts), model.numbers))
    return Pool(tuple(scene for scene, _ in pairs), encoded, model)

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

TOKENS, WIDTH = 77, 768
_SCENES, _DRAWINGS, _HELD_OUT, NOISES = 1, 2, 3, 4
_HELD_SHARE = 0.1
Encode = Callable[[Sequence[str]], torch.Tensor]
"""Texts to (n, 77, 768): what ComfyUI's text encoder makes of the demo checkpoint gives for them."""


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


@dataclass(frozen=True)
class Pool:
    """Captions with their encodings; number 0 is the empty one."""

    scenes: tuple[world.Scene, ...]
    encoded: np.ndarray

    def batch(self, seed: int, step: int, count: int, side: int, dropped: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and captions of a step: the same for the same numbers, whatever was trained before."""
        rng = world.generator(seed, _DRAWINGS, step)
        chosen = rng.integers(len(self.scenes), size=count)
        pictures = np.stack([world.draw(self.scenes[number], rng, side) for number in chosen])
        texts = np.where(rng.random(count) < dropped, 0, chosen + 1)
        return torch.from_numpy(latents.encode(pictures)), torch.from_numpy(self.encoded[texts]).float()


def open_pool(folder: Path, seed: int, count: int, encode: Encode | None = None, batch: int = 16) -> Pool:
    """The pool of `count` captions in `folder`; what is missing is encoded by `encode`, a batch at a time.

    An interrupted run goes on where it stopped, and a larger `count` adds to what is there.
    """
    pairs = scenes(seed, count)
    texts = ["", *(text for _, text in pairs)]
    folder.mkdir(parents=True, exist_ok=True)
    about, path = folder / "captions.json", folder / "captions.f16"
    done = 0
    if about.is_file() and path.is_file():
        kept = json.loads(about.read_text())
        done = min(len(kept), path.stat().st_size // (2 * TOKENS * WIDTH))
        known = min(done, len(texts))
        if kept[:known] != texts[:known]:
            raise ValueError(f"{folder} holds captions of another seed or grammar; choose another folder")
    if done < len(texts):
        if encode is None:
            raise ValueError(f"{folder} holds {done} of {len(texts)} encoded captions; run the stage captions first")
        with path.open("r+b" if path.is_file() else "wb") as file:
            file.seek(done * 2 * TOKENS * WIDTH)
            about.write_text(json.dumps(texts))
            for start in range(done, len(texts), batch):
                file.write(encode(texts[start : start + batch]).to(torch.float16).numpy().tobytes())
                file.flush()
                if (start - done) % (20 * batch) == 0:
                    print(f"captions: {start} of {len(texts)}", flush=True)
    encoded = np.memmap(path, np.float16, "r").reshape(-1, TOKENS, WIDTH)[: len(texts)]
    return Pool(tuple(scene for scene, _ in pairs), encoded)

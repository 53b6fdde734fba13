"""Held-out captions through ComfyUI's own nodes, as a user would sample them, read by the examiner."""

from __future__ import annotations

import csv
import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from speedlab.measure.drawn import examiner, world

from ..drawn import packed
from ..drawn.factors import SD15, Model
from .captions import comfyui
from .data import scenes

STEPS, SAMPLER, SCHEDULER = 25, "dpmpp_2m", "karras"
BATCH = 8
SHEET = 32
GAP, GREY = 4, 128
Rows = list[tuple[str, examiner.Score, str]]


def examine(
    factors: Path | None, folder: Path, seed: int, count: int, side: int, cfg: float, model_that_draws: Model = SD15
) -> float:
    """Attribute accuracy of `count` captions. Writes `examined.csv` and a contact sheet of the first 32.

    Both are written after each batch, so that an interrupted call leaves what it saw.
    """
    comfyui(folder)
    checkpoint = packed.write_drawn(folder / "drawn", factors, model=model_that_draws)[0]
    model, clip, vae = importlib.import_module("comfy.sd").load_checkpoint_guess_config(str(checkpoint))[:3]
    pairs = scenes(seed, count, held_out=True)
    rows: Rows = []
    pictures: list[world.Picture] = []
    for start in range(0, count, BATCH):
        part = pairs[start : start + BATCH]
        drawn = sample(model, clip, vae, [text for _, text in part], seed + start, side, cfg)
        pictures += drawn
        rows += [
            (kind_of(scene), examiner.examine(picture, scene), text)
            for (scene, text), picture in zip(part, drawn, strict=True)
        ]
        print(f"examined {len(rows)} of {count}: {by_kind(rows)['all']:.1%}", flush=True)
        if start < SHEET:
            sheet(pictures).save(folder / "examined.png")
        _write(folder / "examined.csv", rows)
    shares = by_kind(rows)
    for name, share in shares.items():
        print(f"{name}: {share:.1%}")
    return shares["all"]


def sample(
    model: Any, clip: Any, vae: Any, texts: list[str], seed: int, side: int, cfg: float, steps: int = STEPS
) -> list[world.Picture]:
    """A picture of each text in one batch, through ComfyUI's own encoding, sampling and decoding."""
    with torch.inference_mode():
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in texts]
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        pooled = torch.cat([about["pooled_output"] for _, about in conds])
        positive = [[torch.cat([tokens for tokens, _ in conds]), {"pooled_output": pooled}]]
        latent = {"samples": torch.zeros(len(texts), 4, side // 8, side // 8)}
        core = importlib.import_module("nodes")
        sampled = core.common_ksampler(model, seed, steps, cfg, SAMPLER, SCHEDULER, positive, empty, latent)[0]
        decoded = vae.decode(sampled["samples"]).clamp(0, 1)
    return list((decoded * 255).round().to(torch.uint8).numpy())


def kind_of(scene: world.Scene) -> str:
    """One, two, many or landscape."""
    if isinstance(scene, world.Landscape):
        return "landscape"
    return "many" if scene.count > 1 else ("one", "two")[len(scene.things) - 1]


def by_kind(rows: Rows) -> dict[str, float]:
    """Attribute accuracy of each kind of scene, and of all."""
    kinds: dict[str, Rows] = defaultdict(list)
    for row in rows:
        kinds[row[0]].append(row)
    kinds["all"] = rows
    return {
        kind: sum(score.right for _, score, _ in part) / sum(score.asked for _, score, _ in part)
        for kind, part in sorted(kinds.items())
    }


def sheet(pictures: list[world.Picture]) -> Image.Image:
    """Pictures in rows of eight, with a grey line between them: two dark ones beside each other would look like one."""
    framed = [np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=GREY) for picture in pictures]
    framed += [np.full_like(framed[0], GREY)] * (-len(framed) % 8)
    rows = [np.concatenate(framed[start : start + 8], axis=1) for start in range(0, len(framed), 8)]
    return Image.fromarray(np.concatenate(rows, axis=0)[:-GAP, :-GAP])


def _write(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "right", "asked", "caption", "wrong"))
        writer.writerows((kind, score.right, score.asked, text, "; ".join(score.wrong)) for kind, score, text in rows)

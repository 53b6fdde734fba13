"""Held-out captions through ComfyUI's own nodes, as a user would sample them, read by the examiner."""

from __future__ import annotations

import csv
import importlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..drawn import examiner, packed, world
from .captions import comfyui
from .data import scenes

STEPS, SAMPLER, SCHEDULER = 25, "dpmpp_2m", "karras"
BATCH = 8
SHEET = 32


def examine(factors: Path, folder: Path, seed: int, count: int, side: int, cfg: float) -> float:
    """Attribute accuracy of `count` captions. Writes `examined.csv` and a contact sheet of the first 32."""
    comfyui(folder)
    checkpoint = packed.write_drawn(folder / "models" / "drawn.safetensors", factors)
    model, clip, vae = importlib.import_module("comfy.sd").load_checkpoint_guess_config(str(checkpoint))[:3]
    pairs = scenes(seed, count, held_out=True)
    rows, pictures = [], []
    with torch.inference_mode():
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        for start in range(0, count, BATCH):
            part = pairs[start : start + BATCH]
            conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for _, text in part]
            positive = [[torch.cat([cond[0] for cond in conds]), {"pooled_output": None}]]
            latent = {"samples": torch.zeros(len(part), 4, side // 8, side // 8)}
            sampled = importlib.import_module("nodes").common_ksampler(
                model, seed + start, STEPS, cfg, SAMPLER, SCHEDULER, positive, empty, latent
            )[0]["samples"]
            decoded = (vae.decode(sampled).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            for (scene, text), picture in zip(part, decoded, strict=True):
                score = examiner.examine(picture, scene)
                rows.append((kind_of(scene), score, text))
                pictures.append(picture)
            print(f"examined {len(rows)} of {count}: {_share(rows):.1%}", flush=True)
    sheet(pictures[:SHEET]).save(folder / "examined.png")
    _write(folder / "examined.csv", rows)
    for name, share in by_kind(rows).items():
        print(f"{name}: {share:.1%}")
    return _share(rows)


def kind_of(scene: world.Scene) -> str:
    """One, two, many or landscape."""
    if isinstance(scene, world.Landscape):
        return "landscape"
    return "many" if scene.count > 1 else ("one", "two")[len(scene.things) - 1]


Rows = list[tuple[str, examiner.Score, str]]


def _share(rows: Rows) -> float:
    return sum(score.right for _, score, _ in rows) / sum(score.asked for _, score, _ in rows)


def by_kind(rows: Rows) -> dict[str, float]:
    """Attribute accuracy of each kind of scene, and of all."""
    kinds: dict[str, Rows] = defaultdict(list)
    for row in rows:
        kinds[row[0]].append(row)
    return {**{kind: _share(part) for kind, part in sorted(kinds.items())}, "all": _share(rows)}


def sheet(pictures: list[world.Picture]) -> Image.Image:
    """Pictures in rows of eight."""
    blank = np.zeros_like(pictures[0])
    padded = [*pictures, *[blank] * (-len(pictures) % 8)]
    rows = [np.concatenate(padded[start : start + 8], axis=1) for start in range(0, len(padded), 8)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def _write(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "right", "asked", "caption", "wrong"))
        writer.writerows((kind, score.right, score.asked, text, "; ".join(score.wrong)) for kind, score, text in rows)

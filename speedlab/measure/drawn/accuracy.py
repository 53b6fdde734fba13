"""Attribute accuracy: of what a prompt asks the model that draws for, how much its images show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.errors import SpeedLabError
from ...models.loading import SOURCE, find_model_file
from ..context import NodeContext
from . import examiner, world

# The title in a checkpoint's metadata, by which the model that draws is known.
TITLE = "SpeedLab model that draws"
_TITLED = "modelspec.title"


def is_model_that_draws(path: Path) -> bool:
    """Whether a checkpoint says of itself that it is the model that draws."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(_TITLED) == TITLE
    except (OSError, SafetensorError):
        return False


def draws(model: Any, context: NodeContext) -> bool:
    """Whether a graph's model is the one that draws, whichever loader made it."""
    path = checkpoint_path(model, context)
    return path is not None and is_model_that_draws(path)


def checkpoint_path(model: Any, context: NodeContext) -> Path | None:
    """The checkpoint of a graph's model, whichever loader made it; None where nothing tells it."""
    source = model.get_attachment(SOURCE)
    if source is not None:
        return source.path
    name = context.checkpoint_name()
    try:
        return find_model_file("checkpoints", name) if name else None
    except SpeedLabError:
        return None


def accuracy(images: Any, texts: Sequence[str]) -> float | None:
    """The share of attributes that are right in an IMAGE batch [B, H, W, 3] in 0..1, over all its prompts.

    None where a prompt is no caption of the drawn world: then what would be right is not known.
    """
    import numpy as np

    scenes = [world.scene_of(text) for text in texts]
    if not scenes or len(scenes) != len(images):
        return None
    right = asked = 0
    for image, scene in zip(images, scenes, strict=True):
        if scene is None:
            return None
        pixels = np.nan_to_num(image[..., :3].float().cpu().numpy()).clip(0.0, 1.0)
        score = examiner.examine((pixels * 255.0).round().astype(np.uint8), scene)
        right, asked = right + score.right, asked + score.asked
    return right / asked

"""Scenarios on the demo model that draws: captions in place of their prompts, at the size that it knows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from speedlab.common.errors import SpeedLabError

from .scenario import Scenario

CHECKPOINT = "speedlab_demo_drawn.safetensors"
FACTORS = Path(__file__).parents[1] / "synthetic" / "drawn" / "factors.safetensors"
CFG = 3.0
_LONGEST_HEADER = 10**7
# None of these scenes was trained on.
CAPTIONS = (
    "a white house on the left and a tree on the right on a green hill, sun on the right, day",
    "a big red ring on the right, green background",
    "a red house on the right and a tree on the left on a green hill, sun on the left, sunset",
    "a purple square on the left and a purple triangle on the right, white background",
    "a yellow house on the left and a tree on the right on the snow, moon on the right, night",
    "four yellow cross shapes, white background",
    "a big white star on the bottom left, purple background",
    "a red triangle on the top and a black circle on the bottom, blue background",
)


def is_there() -> bool:
    """Whether the pack has the trained weights; without them demo checkpoints have random ones."""
    return FACTORS.is_file()


def is_drawn(checkpoint: str | None) -> bool:
    """Whether a checkpoint's name is that of the model that draws."""
    return checkpoint == CHECKPOINT and is_there()


def side() -> int:
    """The side in pixels of the pictures that the weights were trained on last. Raises SpeedLabError for a file that is
    cut off or another one, such as the pointer that a clone without large files has."""
    try:
        with FACTORS.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
        return int(header["__metadata__"]["side"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SpeedLabError(f"{FACTORS} cannot be read ({error}); get it again from the repository") from error


def on_drawn(scenario: Scenario) -> Scenario:
    """The scenario with each of its texts replaced by a caption, smaller and with the guidance that the model needs.

    Equal texts stay equal: rows that differ by a setting go on showing that alone.
    """
    settings = scenario.settings
    texts = list(dict.fromkeys(prompt.text for prompt in settings.prompts))
    prompts = (
        replace(prompt, text=CAPTIONS[texts.index(prompt.text) % len(CAPTIONS)], negative="")
        for prompt in settings.prompts
    )
    most = side()
    return scenario.with_settings(
        replace(
            settings,
            prompts=tuple(prompts),
            cfg=CFG,
            width=min(settings.width, most),
            height=min(settings.height, most),
        )
    )

"""Scenarios on the demo models that draw: captions in place of their prompts, at the size that they know."""

from __future__ import annotations

import json
from dataclasses import replace

from speedlab.common.errors import SpeedLabError

from ..drawn_files import CHECKPOINTS, FACTORS
from .scenario import Scenario

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


def is_there(family: str = "sd15") -> bool:
    """Whether the pack has the trained weights of a family; without them its demo checkpoint has random ones."""
    # What the others begin with is SD 1.5's.
    return family in FACTORS and all(FACTORS[each].is_file() for each in ("sd15", family))


def family_of(checkpoint: str | None) -> str | None:
    """The family of the model that draws whose checkpoint has this name; None for any other checkpoint."""
    return next((family for family, name in CHECKPOINTS.items() if name == checkpoint and is_there(family)), None)


def side(family: str = "sd15") -> int:
    """The side in pixels of the pictures that the weights were trained on last. Raises SpeedLabError for a file that is
    cut off or another one, such as the pointer that a clone without large files has."""
    path = FACTORS[family]
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
        return int(header["__metadata__"]["side"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SpeedLabError(f"{path} cannot be read ({error}); get it again from the repository") from error


def on_drawn(scenario: Scenario, family: str = "sd15") -> Scenario:
    """The scenario with each of its texts replaced by a caption, smaller and with the guidance that the model needs.

    Equal texts stay equal: rows that differ by a setting go on showing that alone.
    """
    settings = scenario.settings
    texts = list(dict.fromkeys(prompt.text for prompt in settings.prompts))
    prompts = (
        replace(prompt, text=CAPTIONS[texts.index(prompt.text) % len(CAPTIONS)], negative="")
        for prompt in settings.prompts
    )
    most = side(family)
    return scenario.with_settings(
        replace(
            settings,
            prompts=tuple(prompts),
            cfg=CFG,
            width=min(settings.width, most),
            height=min(settings.height, most),
        )
    )

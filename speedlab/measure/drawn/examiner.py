"""Reads a picture of the drawn world by rules, and says which of the attributes that were asked for are right.

It looks at pixels alone and never at the model: colours against the world's, outlines against drawn ones, places by
where the middle of a thing lies. What it reads is compared with the scene only afterwards.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from . import world

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

SIDE = 128  # pictures are read at this size
_SEEN = 45.0  # a colour this far from the background is something
_SMALLEST = 0.004  # of the picture; what is smaller is a speck
_BIG = 0.195  # half the extent of a big thing is above this, of a small one below
_MASK = 32
_RING = 6  # pixels at the border that tell the background
_PLAIN = 0.6  # of an area that is to be of one colour, so much must be near its median
_ALIKE = 0.55  # of an outline, so much must be that of the shape
_NONE = "none"


@dataclass(frozen=True)
class Found:
    """One thing: colour, shape, where its middle lies and half its extent, both of the picture."""

    colour: str
    shape: str
    x: float
    y: float
    half: float

    @property
    def place(self) -> str:
        """The place whose middle is nearest."""
        return min(world.PLACES, key=lambda name: math.dist(world.PLACES[name], (self.x, self.y)))

    @property
    def size(self) -> str:
        return "big" if self.half > _BIG else "small"


@dataclass(frozen=True)
class Score:
    """How many of the attributes that were asked for are right, and which are not."""

    right: int
    asked: int
    wrong: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


def examine(picture: world.Picture, scene: world.Scene) -> Score:
    """Compare what the picture shows with the scene that was asked for."""
    if isinstance(scene, world.Shapes):
        asked, found = _shapes(scene, *read_shapes(picture))
    else:
        asked, found = _attributes(scene), read_landscape(picture)
    wrong = tuple(f"{name}: {found.get(name)} for {value}" for name, value in asked.items() if found.get(name) != value)
    return Score(len(asked) - len(wrong), len(asked), wrong)


def _shapes(scene: world.Shapes, background: str, things: list[Found]) -> tuple[dict[str, str], dict[str, str]]:
    count = scene.count if scene.count > 1 else len(scene.things)
    asked = {"background": scene.background, "count": str(count)}
    found = {"background": background, "count": str(len(things))}
    if scene.count > 1:
        asked |= {"colour": scene.things[0].colour, "shape": scene.things[0].shape}
        found |= {"colour": _most([each.colour for each in things]), "shape": _most([each.shape for each in things])}
        return asked, found
    for number, (thing, seen) in enumerate(_matched(scene.things, things), start=1):
        asked |= {f"colour {number}": thing.colour, f"shape {number}": thing.shape, f"place {number}": thing.place}
        if seen is not None:
            found |= {f"colour {number}": seen.colour, f"shape {number}": seen.shape, f"place {number}": seen.place}
    if scene.size is not None:
        asked["size"] = scene.size
        found["size"] = max(things, key=lambda each: each.half).size if things else ""
    return asked, found


def _matched(wanted: tuple[world.Thing, ...], things: list[Found]) -> list[tuple[world.Thing, Found | None]]:
    """Each thing with the one found that stands for it: the assignment with the most attributes right."""
    things = sorted(things, key=lambda each: -each.half)[:4]
    padded: list[Found | None] = [*things, *[None] * len(wanted)]

    def right(chosen: tuple[Found | None, ...]) -> int:
        return sum(
            2 * (seen.place == thing.place) + (seen.colour == thing.colour) + (seen.shape == thing.shape)
            for thing, seen in zip(wanted, chosen, strict=True)
            if seen is not None
        )

    best = max(itertools.permutations(padded, len(wanted)), key=right)
    return list(zip(wanted, best, strict=True))


def _most(names: list[str]) -> str:
    return Counter(names).most_common(1)[0][0] if names else ""


def _pixels(picture: world.Picture) -> Floats:
    if picture.shape[:2] != (SIDE, SIDE):
        from PIL import Image

        picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))
    # A median takes single pixels away and leaves edges where they are.
    return ndimage.median_filter(picture.astype(np.float64), size=(3, 3, 1))


def _plain(pixels: Floats, names: Mapping[str, world.RGB]) -> tuple[Floats, str]:
    """The median colour of an area with its name, which is "none" where the area is of many colours."""
    colour = np.median(pixels.reshape(-1, 3), axis=0)
    near = np.linalg.norm(pixels.reshape(-1, 3) - colour, axis=1) < _SEEN
    return colour, _nearest(colour, names) if near.mean() >= _PLAIN else _NONE


def _nearest(colour: Floats, names: Mapping[str, world.RGB]) -> str:
    return min(names, key=lambda name: math.dist(names[name], colour))


def read_shapes(picture: world.Picture) -> tuple[str, list[Found]]:
    """The background's colour and the things before it."""
    pixels = _pixels(picture)
    border = np.ones((SIDE, SIDE), dtype=bool)
    border[_RING:-_RING, _RING:-_RING] = False
    background, named = _plain(pixels[border], world.COLOURS)
    distance = np.linalg.norm(pixels - background, axis=2)
    things = []
    for area in _areas(distance > _SEEN):
        far = distance[area]
        colour = np.median(pixels[area][far >= np.median(far)], axis=0)
        # Half-way between both colours lies the edge, however blurred it is.
        towards = colour - background
        share = (pixels - background) @ towards / max(1.0, float(towards @ towards))
        mask = (share > 0.5) & ndimage.binary_dilation(area, iterations=2)
        rows, columns = np.nonzero(mask)
        if len(rows) < _SMALLEST * SIDE**2:
            continue
        y0, y1, x0, x1 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        things.append(
            Found(
                _nearest(colour, world.COLOURS), _shape(mask[y0:y1, x0:x1]), (x0 + x1) / 2 / SIDE, (y0 + y1) / 2 / SIDE,
                max(y1 - y0, x1 - x0) / 2 / SIDE,
            )
        )  # fmt: skip
    return named, things


def _areas(mask: Mask) -> list[Mask]:
    """Connected areas that are more than specks."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return [labels == label for label in range(1, count + 1) if (labels == label).sum() >= _SMALLEST * SIDE**2]


def _shape(mask: Mask) -> str:
    """The shape whose outline, stretched to the same box, covers most of the same."""
    fitted = _fit(mask)
    scores = {
        shape: np.minimum(fitted, outline).sum() / np.maximum(fitted, outline).sum()
        for shape, outline in _outlines().items()
    }
    best = max(scores, key=lambda shape: scores[shape])
    return best if scores[best] >= _ALIKE else _NONE


def _fit(mask: Mask) -> Floats:
    from PIL import Image

    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((_MASK, _MASK), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float64) / 255.0


@lru_cache(maxsize=1)
def _outlines() -> dict[str, Floats]:
    outlines = {}
    for shape in world.SHAPES:
        canvas = world.Canvas(256)
        world.draw_shape(canvas, shape, 0.5, 0.5, 0.4, (255, 255, 255), (0, 0, 0))
        mask = np.asarray(canvas.image)[..., 0] > 127
        rows, columns = np.nonzero(mask)
        outlines[shape] = _fit(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return outlines


def _attributes(scene: world.Landscape) -> dict[str, str]:
    asked = {"time": scene.time, "ground": scene.ground, "light": scene.light}
    asked |= {"tree": scene.tree or _NONE, "house": _NONE, "boat": _NONE}
    if scene.house:
        asked |= {"house": scene.house[1], "wall": scene.house[0]}
    if scene.boat:
        asked |= {"boat": scene.boat[1], "sail": scene.boat[0]}
    return asked


def read_landscape(picture: world.Picture) -> dict[str, str]:
    """Time of day, ground, the side of the light, and what stands there with side and colour."""
    pixels = _pixels(picture)
    sky, time = _plain(pixels[2:10], world.SKY)
    dim = world.DIMMED.get(time, 1.0)
    grounds = {name: world.times(rgb, dim) for name, rgb in world.GROUND.items()}
    ground_colour, ground = _plain(pixels[-6:], grounds)
    if _NONE in (time, ground):
        return {"time": time, "ground": ground}

    named = {"sky": tuple(sky), "ground": tuple(ground_colour), "shadow": tuple(0.78 * ground_colour),
             "light": world.LIGHT[time]}  # fmt: skip
    things = {"crown": world.CROWN, "wood": world.WOOD, "roof": world.ROOF}
    colours = world.SAILS if ground == "sea" else [c for c in world.WALLS if (ground, c) not in world.ALIKE]
    things |= {name: world.COLOURS[name] for name in colours}
    named |= {name: world.times(rgb, dim) for name, rgb in things.items()}
    names = list(named)
    distances = np.stack([np.linalg.norm(pixels - np.asarray(named[name]), axis=2) for name in names])
    nearest = distances.argmin(axis=0)
    low, high = int(0.3 * SIDE), int(0.95 * SIDE)

    def area(name: str, top: int, bottom: int) -> Mask:
        """Where a colour is, without the thin lines in which two others mix."""
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[top:bottom] = nearest[top:bottom] == names.index(name)
        return ndimage.binary_opening(mask, structure=np.ones((3, 3)))

    # In the upper part nothing else is bright: a yellow wall has the sun's colour, but stands lower.
    upper = np.linalg.norm(pixels - sky, axis=2)
    upper[low:] = 0
    bright = np.isin(nearest, [names.index(name) for name in ("light", *colours) if name != "red"])
    found = {"time": time, "ground": ground, "light": _side((upper > _SEEN) & bright)}
    seen = {name: area(name, low, high) for name in things}
    least = 0.006 * SIDE**2
    standing = {"tree": "crown", "house": "roof"} if ground != "sea" else {"boat": "wood"}
    found |= dict.fromkeys(("tree", "house", "boat"), _NONE)
    for thing, part in standing.items():
        mask = seen[part]
        if mask.sum() >= least:
            found[thing] = _side(mask)
            if thing == "tree":
                continue
            # Walls and sails are coloured areas on the same side as roof or hull.
            left = slice(0, SIDE // 2) if found[thing] == "left" else slice(SIDE // 2, SIDE)
            areas = {name: int(seen[name][:, left].sum()) for name in colours}
            found["wall" if thing == "house" else "sail"] = max(areas, key=lambda name: areas[name])
    return found


def _side(mask: Mask) -> str:
    columns = np.nonzero(mask)[1]
    if not len(columns):
        return _NONE
    return "left" if np.median(columns) < SIDE / 2 else "right"

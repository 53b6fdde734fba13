"""The drawn world: what a picture shows, its caption, and the picture itself.

A scene is drawn in two steps. Its attributes, which caption and examiner name, are chosen first; where exactly and how
large things are within what the words allow is chosen when it is drawn. Both follow a seed and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]
RGB = tuple[float, float, float]
Generator: TypeAlias = "np.random.Generator"

COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 60),
    "green": (50, 165, 70),
    "blue": (45, 85, 215),
    "purple": (145, 60, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "big")
# Where the middle of a thing lies, of the picture's width and height.
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.28, 0.28),
    "top": (0.5, 0.28),
    "top right": (0.72, 0.28),
    "left": (0.28, 0.5),
    "center": (0.5, 0.5),
    "right": (0.72, 0.5),
    "bottom left": (0.28, 0.72),
    "bottom": (0.5, 0.72),
    "bottom right": (0.72, 0.72),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
_PAIRS = (("left", "right"), ("top", "bottom"))
_RADIUS = {"small": (0.125, 0.15), "big": (0.235, 0.265), None: (0.165, 0.185)}
_ROW: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((0.3, 0.5), (0.7, 0.5)),
    3: ((0.2, 0.5), (0.5, 0.5), (0.8, 0.5)),
    4: ((0.3, 0.3), (0.7, 0.3), (0.3, 0.7), (0.7, 0.7)),
}
# Colours nearer to each other than this are not put side by side: neither a person nor a reader would part them.
_CONTRAST = 120.0

TIMES = ("day", "sunset", "night")
SKY: dict[str, RGB] = {"day": (150, 205, 250), "sunset": (250, 150, 95), "night": (20, 25, 75)}
LIGHT: dict[str, RGB] = {"day": (255, 225, 50), "sunset": (255, 240, 150), "night": (240, 240, 225)}
# What a time of day leaves of the colours of things.
DIMMED = {"day": 1.0, "sunset": 0.9, "night": 0.65}
GROUND: dict[str, RGB] = {
    "hill": (110, 190, 75),
    "sea": (30, 95, 165),
    "snow": (235, 240, 250),
    "sand": (225, 200, 135),
}
_GROUND_WORDS = {"hill": "a green hill", "sea": "the sea", "snow": "the snow", "sand": "the sand"}
SIDES = ("left", "right")
WALLS = ("red", "white", "yellow")
SAILS = ("red", "white", "yellow")
CROWN: RGB = (20, 95, 45)
WOOD: RGB = (105, 60, 35)
ROOF: RGB = (75, 65, 80)
ALIKE = {("snow", "white"), ("sand", "yellow")}


@dataclass(frozen=True)
class Thing:
    """One shape: its colour, and the place its caption names."""

    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Shapes:
    """Things on a plain background: one with a size, two at places, or `count` alike in a row."""

    background: str
    things: tuple[Thing, ...]
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Landscape:
    """Sky, ground and light, with what stands there: each a side, with a colour where it has one."""

    time: str
    ground: str
    light: str
    tree: str | None = None
    house: tuple[str, str] | None = None
    boat: tuple[str, str] | None = None


Scene = Shapes | Landscape
Kind = Literal["one", "two", "many", "landscape"]
KINDS: dict[Kind, float] = {"one": 0.45, "two": 0.2, "many": 0.12, "landscape": 0.23}


def generator(*seed: int) -> Generator:
    """Random numbers for a seed and what stands below it, such as an index."""
    return np.random.default_rng(seed)


def _pick(rng: Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def contrast(a: str, b: str) -> float:
    """How far two colours lie apart."""
    return math.dist(COLOURS[a], COLOURS[b])


def random_scene(rng: Generator, kind: Kind | None = None) -> Scene:
    """A scene of the kind, or of any."""
    kind = kind or tuple(KINDS)[int(rng.choice(len(KINDS), p=list(KINDS.values())))]
    if kind == "landscape":
        return _random_landscape(rng)
    colours = tuple(COLOURS)
    background = _pick(rng, colours)
    seen = [colour for colour in colours if contrast(colour, background) > _CONTRAST]
    if kind == "two":
        pair = _PAIRS[int(rng.integers(2))]
        things = tuple(Thing(_pick(rng, seen), _pick(rng, SHAPES), place) for place in pair)
        return Shapes(background, things)
    thing = Thing(_pick(rng, seen), _pick(rng, SHAPES), _pick(rng, tuple(PLACES)) if kind == "one" else "")
    if kind == "one":
        return Shapes(background, (thing,), size=_pick(rng, SIZES))
    return Shapes(background, (thing,), count=int(rng.integers(2, 5)))


def _random_landscape(rng: Generator) -> Landscape:
    time, ground, light = _pick(rng, TIMES), _pick(rng, tuple(GROUND)), _pick(rng, SIDES)
    if ground == "sea":
        return Landscape(time, ground, light, boat=(_pick(rng, SAILS), _pick(rng, SIDES)))
    what, side = int(rng.integers(3)), _pick(rng, SIDES)
    other = SIDES[1 - SIDES.index(side)]
    walls = [wall for wall in WALLS if (ground, wall) not in ALIKE]
    house = (_pick(rng, walls), side) if what != 0 else None
    tree = other if house else side
    return Landscape(time, ground, light, tree=tree if what != 1 else None, house=house)


def caption(scene: Scene, rng: Generator) -> str:
    """What the picture shows, in words; of the two orders the usual one more often."""
    return _both_orders(scene)[0 if rng.random() < 0.75 else 1]


def _both_orders(scene: Scene) -> tuple[str, str]:
    if isinstance(scene, Shapes):
        parts = [_things(scene), f"{scene.background} background"]
    else:
        light = "moon" if scene.time == "night" else "sun"
        parts = [f"{_standing(scene)} on {_GROUND_WORDS[scene.ground]}", f"{light} on the {scene.light}, {scene.time}"]
    return ", ".join(parts), ", ".join(parts[::-1])


def _things(scene: Shapes) -> str:
    first = scene.things[0]
    if scene.count > 1:
        # "shapes" bears the plural: with it, every word is one token.
        return f"{NUMBERS[scene.count]} {first.colour} {first.shape} shapes"
    size = f"{scene.size} " if scene.size else ""
    where = [
        f"{'an' if not size and thing.colour == 'orange' else 'a'} {size}{thing.colour} {thing.shape} "
        f"{'in' if thing.place == 'center' else 'on'} the {thing.place}"
        for thing in scene.things
    ]
    return " and ".join(where)


def _standing(scene: Landscape) -> str:
    parts = []
    if scene.house:
        parts.append(f"a {scene.house[0]} house on the {scene.house[1]}")
    if scene.tree:
        parts.append(f"a tree on the {scene.tree}")
    if scene.boat:
        parts.append(f"a boat with a {scene.boat[0]} sail on the {scene.boat[1]}")
    return " and ".join(parts)


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_PLACE, _SIDE = "|".join(sorted(PLACES, key=len, reverse=True)), "|".join(SIDES)
_THING = re.compile(rf"an? (?:(small|big) )?({_COLOUR}) ({_SHAPE}) (?:in|on) the ({_PLACE})")
_MANY = re.compile(rf"({'|'.join(NUMBERS.values())}) ({_COLOUR}) ({_SHAPE}) shapes")
_LIGHT = re.compile(rf"(?:sun|moon) on the ({_SIDE}), ({'|'.join(TIMES)})")
_STANDING = re.compile(
    rf"(?:a ({'|'.join(WALLS)}) (house)|a (tree)|a boat with a ({'|'.join(SAILS)}) (sail)) on the ({_SIDE})"
)


def scene_of(text: str) -> Scene | None:
    """The scene that a caption names, in either order; None for a text that is none of this world's captions."""
    text = " ".join(text.split())
    # What a caption says is all that is in it: it must come out again.
    scene: Scene | None = _read_shapes(text) or _read_landscape(text)
    return scene if scene is not None and text in _both_orders(scene) else None


def _read_shapes(text: str) -> Shapes | None:
    background = re.search(rf"({_COLOUR}) background", text)
    if background is None:
        return None
    many = _MANY.search(text)
    if many is not None:
        count = next(number for number, word in NUMBERS.items() if word == many[1])
        return Shapes(background[1], (Thing(many[2], many[3], ""),), count=count)
    found = [match.groups() for match in _THING.finditer(text)]
    size = found[0][0] if found else None
    return Shapes(background[1], tuple(Thing(*rest) for _, *rest in found), size=size) if found else None


def _read_landscape(text: str) -> Landscape | None:
    light = _LIGHT.search(text)
    ground = next((name for name, words in _GROUND_WORDS.items() if f"on {words}" in text), None)
    if light is None or ground is None:
        return None
    standing = {match[2] or match[3] or match[5]: match for match in _STANDING.finditer(text)}
    house, tree, sail = (standing.get(name) for name in ("house", "tree", "sail"))
    return Landscape(
        light[2], ground, light[1], tree=tree and tree[6], house=house and (house[1], house[6]),
        boat=sail and (sail[4], sail[6]),
    )  # fmt: skip


def draw(scene: Scene, rng: Generator, size: int) -> Picture:
    """The picture, size x size, anti-aliased: drawn large and averaged."""
    factor = max(1, -(-512 // size))
    canvas = Canvas(size * factor)
    if isinstance(scene, Shapes):
        _draw_shapes(canvas, scene, rng)
    else:
        _draw_landscape(canvas, scene, rng)
    return np.asarray(canvas.image.reduce(factor) if factor > 1 else canvas.image)


class Canvas:
    """PIL's drawing in fractions of the picture."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.image = Image.new("RGB", (side, side))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[tuple[float, float]], colour: RGB) -> None:
        self._draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=_whole(colour))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
        self._draw.rectangle([each * self.side for each in (x0, y0, x1, y1)], fill=_whole(colour))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        self._draw.ellipse([each * self.side for each in (x - rx, y - ry, x + rx, y + ry)], fill=_whole(colour))

    def gradient(self, top: RGB, bottom: RGB, until: float) -> None:
        """A vertical one from the upper edge to `until`, and its last colour below."""
        share = np.minimum(np.arange(self.side) / (until * self.side), 1.0)[:, None]
        rows = (np.asarray(top) * (1 - share) + np.asarray(bottom) * share).round().clip(0, 255).astype(np.uint8)
        self.image.paste(Image.fromarray(rows[:, None, :]).resize((self.side, self.side), Image.Resampling.NEAREST))


def _whole(colour: RGB) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(part))) for part in colour)
    return red, green, blue


def times(colour: RGB, factor: float) -> RGB:
    """A colour made darker or lighter."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _near(rng: Generator, colour: RGB, by: float = 6.0) -> RGB:
    red, green, blue = np.asarray(colour) + rng.uniform(-by, by, 3)
    return float(red), float(green), float(blue)


def _draw_shapes(canvas: Canvas, scene: Shapes, rng: Generator) -> None:
    background = _near(rng, COLOURS[scene.background])
    canvas.box(0, 0, 1, 1, background)
    if scene.count > 1:
        places = _ROW[scene.count]
        low, high = (0.095, 0.11) if scene.count == 3 else (0.13, 0.15)
        things = scene.things * scene.count
    else:
        places = tuple(PLACES[thing.place] for thing in scene.things)
        low, high = _RADIUS[scene.size]
        things = scene.things
    radius = rng.uniform(low, high)
    for thing, (x, y) in zip(things, places, strict=True):
        x, y = x + rng.uniform(-0.025, 0.025), y + rng.uniform(-0.025, 0.025)
        colour = _near(rng, COLOURS[thing.colour])
        draw_shape(canvas, thing.shape, x, y, radius, colour, background)


def draw_shape(canvas: Canvas, shape: str, x: float, y: float, radius: float, colour: RGB, background: RGB) -> None:
    """One shape; `radius` reaches to its bounding box, roughly."""
    if shape in ("circle", "ring"):
        canvas.ellipse(x, y, radius, radius, colour)
        if shape == "ring":
            canvas.ellipse(x, y, 0.55 * radius, 0.55 * radius, background)
    elif shape == "square":
        half = 0.9 * radius
        canvas.box(x - half, y - half, x + half, y + half, colour)
    elif shape == "triangle":
        canvas.polygon([(x, y - radius), (x + 1.05 * radius, y + 0.9 * radius), (x - 1.05 * radius, y + 0.9 * radius)],
                       colour)  # fmt: skip
    elif shape == "star":
        points = []
        for corner in range(10):
            reach = 1.12 * radius * (1.0 if corner % 2 == 0 else 0.42)
            angle = math.pi * corner / 5
            points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
        canvas.polygon(points, colour)
    else:
        arm = 0.34 * radius
        canvas.box(x - arm, y - radius, x + arm, y + radius, colour)
        canvas.box(x - radius, y - arm, x + radius, y + arm, colour)


def _draw_landscape(canvas: Canvas, scene: Landscape, rng: Generator) -> None:
    dim = DIMMED[scene.time]
    horizon = rng.uniform(0.58, 0.64)
    sky = _near(rng, SKY[scene.time])
    canvas.gradient(sky, times(sky, 1.06), horizon)
    light_x = _aside(scene.light, rng.uniform(0.2, 0.28))
    radius = rng.uniform(0.085, 0.1)
    canvas.ellipse(light_x, rng.uniform(0.17, 0.23), radius, radius, _near(rng, LIGHT[scene.time]))
    ground = _near(rng, times(GROUND[scene.ground], dim))
    if scene.ground == "sea":
        canvas.box(0, horizon, 1, 1, ground)
        # Light on the water, below what gives it.
        for row in range(4):
            y, half = horizon + 0.05 + 0.08 * row, 0.05 + 0.015 * row
            canvas.box(light_x - half, y, light_x + half, y + 0.018, times(ground, 1.3))
    else:
        canvas.ellipse(rng.uniform(0.4, 0.6), horizon + 0.5, 1.0, 0.5, ground)
    if scene.tree:
        _draw_tree(canvas, _aside(scene.tree, rng.uniform(0.24, 0.3)), horizon + rng.uniform(0.14, 0.2), scene, ground)
    if scene.house:
        x, y = _aside(scene.house[1], rng.uniform(0.25, 0.31)), horizon + rng.uniform(0.18, 0.24)
        _draw_house(canvas, x, y, scene, ground)
    if scene.boat:
        x, y = _aside(scene.boat[1], rng.uniform(0.27, 0.33)), horizon + rng.uniform(0.12, 0.18)
        _draw_boat(canvas, x, y, scene, ground)


def _aside(side: str, x: float) -> float:
    return x if side == "left" else 1.0 - x


def _shadow(canvas: Canvas, x: float, y: float, half: float, scene: Landscape, ground: RGB) -> None:
    """On the ground, away from the light."""
    away = 0.5 * half if scene.light == "left" else -0.5 * half
    canvas.ellipse(x + away, y, half, 0.028, times(ground, 0.78))


def _draw_tree(canvas: Canvas, x: float, y: float, scene: Landscape, ground: RGB) -> None:
    dim = DIMMED[scene.time]
    _shadow(canvas, x, y, 0.13, scene, ground)
    canvas.box(x - 0.025, y - 0.2, x + 0.025, y, times(WOOD, dim))
    crown = times(CROWN, dim)
    for dx, dy, radius in ((0, -0.31, 0.115), (-0.06, -0.24, 0.095), (0.06, -0.24, 0.095)):
        canvas.ellipse(x + dx, y + dy, radius, radius, crown)
    lit = -0.045 if scene.light == "left" else 0.045
    canvas.ellipse(x + lit, y - 0.32, 0.05, 0.05, times(crown, 1.25))


def _draw_house(canvas: Canvas, x: float, y: float, scene: Landscape, ground: RGB) -> None:
    assert scene.house is not None
    dim = DIMMED[scene.time]
    wall = times(COLOURS[scene.house[0]], dim)
    _shadow(canvas, x, y, 0.18, scene, ground)
    canvas.box(x - 0.14, y - 0.2, x + 0.14, y, wall)
    dark = (x + 0.05, x + 0.14) if scene.light == "left" else (x - 0.14, x - 0.05)
    canvas.box(dark[0], y - 0.2, dark[1], y, times(wall, 0.88))
    canvas.polygon([(x, y - 0.36), (x + 0.19, y - 0.2), (x - 0.19, y - 0.2)], times(ROOF, dim))
    canvas.box(x - 0.03, y - 0.1, x + 0.03, y, times(WOOD, dim))


def _draw_boat(canvas: Canvas, x: float, y: float, scene: Landscape, ground: RGB) -> None:
    assert scene.boat is not None
    dim = DIMMED[scene.time]
    canvas.ellipse(x, y + 0.06, 0.17, 0.022, times(ground, 0.78))
    sail = times(COLOURS[scene.boat[0]], dim)
    canvas.box(x - 0.012, y - 0.33, x + 0.012, y, times(WOOD, dim))
    canvas.polygon([(x + 0.012, y - 0.32), (x + 0.17, y - 0.05), (x + 0.012, y - 0.05)], sail)
    canvas.polygon([(x - 0.012, y - 0.27), (x - 0.13, y - 0.05), (x - 0.012, y - 0.05)], sail)
    canvas.polygon([(x - 0.2, y - 0.03), (x + 0.2, y - 0.03), (x + 0.13, y + 0.06), (x - 0.13, y + 0.06)],
                   times(WOOD, dim))  # fmt: skip

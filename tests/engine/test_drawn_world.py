"""The drawn world and its examiner: what is drawn follows the seed, and is read as it was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage

from speedlab.measure.drawn import accuracy, examiner, world

SEED = 26
Picture = world.Picture


def drawn(number: int, side: int = 128, kind: world.Kind | None = None) -> tuple[world.Scene, str, Picture]:
    rng = world.generator(SEED, number)
    scene = world.random_scene(rng, kind)
    return scene, world.caption(scene, rng), world.draw(scene, rng, side)


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first[:2] == again[:2]
    assert np.array_equal(first[2], again[2])
    assert first[:2] != other[:2]


@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_a_picture_has_the_size_asked_for_and_soft_edges(side: int) -> None:
    rng = world.generator(SEED)
    scene = world.Shapes("white", (world.Thing("black", "circle", "center"),), size="big")
    picture = world.draw(scene, rng, side)
    assert picture.shape == (side, side, 3)
    between = (picture[..., 0] > 80) & (picture[..., 0] < 200)
    assert between.any() == (side < 512)  # at 512 nothing is averaged


def test_captions_name_all_attributes() -> None:
    rng = world.generator(SEED)
    thing = world.Thing("orange", "star", "top left")
    assert "a small orange star on the top left" in world.caption(world.Shapes("blue", (thing,), size="small"), rng)
    assert "blue background" in world.caption(world.Shapes("blue", (thing,), size="small"), rng)
    three = world.Shapes("white", (world.Thing("red", "cross", ""),), count=3)
    assert "three red cross shapes" in world.caption(three, rng)
    sea = world.caption(world.Landscape("night", "sea", "left", boat=("red", "right")), rng)
    for words in ("a boat with a red sail on the right", "on the sea", "moon on the left", "night"):
        assert words in sea


def test_every_kind_of_scene_comes_up_and_colours_differ_from_their_background() -> None:
    kinds: Counter[str] = Counter()
    for number in range(300):
        scene = world.random_scene(world.generator(SEED, number))
        if isinstance(scene, world.Landscape):
            kinds["landscape"] += 1
            continue
        kinds["many" if scene.count > 1 else ("two", "one")[len(scene.things) == 1]] += 1
        assert all(world.contrast(thing.colour, scene.background) > 100 for thing in scene.things)
    assert min(kinds[kind] for kind in world.KINDS) > 15


def as_drawn(picture: Picture) -> Picture:
    return picture


def as_decoded(picture: Picture) -> Picture:
    """Blurred and noisy, as decoders leave pictures."""
    blurred = ndimage.gaussian_filter(picture.astype(np.float64), (1.2, 1.2, 0))
    noise = np.random.default_rng(SEED).normal(0, 8, picture.shape)
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", list(world.KINDS))
@pytest.mark.parametrize(("treated", "least"), [(as_drawn, 0.99), (as_decoded, 0.98)])
def test_the_examiner_reads_drawings_right(
    treated: Callable[[Picture], Picture], least: float, kind: world.Kind
) -> None:
    right = asked = 0
    for number in range(60):
        scene, _, picture = drawn(number, kind=kind)
        score = examiner.examine(treated(picture), scene)
        right, asked = right + score.right, asked + score.asked
    assert right / asked >= least


@pytest.mark.parametrize("side", [64, 256])
def test_the_examiner_reads_other_sizes(side: int) -> None:
    scores = [examiner.examine(picture, scene) for scene, _, picture in (drawn(number, side) for number in range(40))]
    assert sum(score.right for score in scores) / sum(score.asked for score in scores) >= 0.97


def test_each_attribute_counts_alone() -> None:
    thing = world.Thing("red", "circle", "left")
    picture = world.draw(world.Shapes("white", (thing,), size="small"), world.generator(SEED), 128)

    def wrong(*, background: str = "white", size: str = "small", count: int = 1, **change: str) -> set[str]:
        asked = world.Shapes(background, (world.Thing(**{**vars(thing), **change}),), size=size, count=count)
        return {text.split(":")[0] for text in examiner.examine(picture, asked).wrong}

    assert wrong() == set()
    assert wrong(background="black") == {"background"}
    assert wrong(colour="green") == {"colour 1"}
    assert wrong(shape="square") == {"shape 1"}
    assert wrong(place="right") == {"place 1"}
    assert wrong(size="big") == {"size"}
    assert wrong(count=3) == {"count"}


def test_a_landscape_s_attributes_count_alone() -> None:
    scene = world.Landscape("day", "hill", "left", tree="right", house=("red", "left"))
    picture = world.draw(scene, world.generator(SEED), 128)
    assert examiner.examine(picture, scene).wrong == ()
    other = world.Landscape("day", "hill", "right", house=("white", "left"))
    wrong = {text.split(":")[0] for text in examiner.examine(picture, other).wrong}
    assert wrong == {"light", "tree", "wall"}


@pytest.mark.parametrize("block", [1, 8, 128])
def test_noise_and_an_empty_picture_score_low(block: int) -> None:
    """Noise of single pixels, of blocks as an untrained model gives it, and a plain picture."""
    right = asked = 0
    for number in range(40):
        few = world.generator(SEED, number).integers(0, 256, (128 // block, 128 // block, 3)).astype(np.uint8)
        picture = few.repeat(block, axis=0).repeat(block, axis=1)
        score = examiner.examine(picture, world.random_scene(world.generator(SEED, number)))
        right, asked = right + score.right, asked + score.asked
    assert right / asked < 0.2


def test_a_wrong_scene_s_picture_scores_low() -> None:
    """What a swapped or a stale prompt would give."""
    pairs = [(drawn(number)[0], drawn(number + 1)[2]) for number in range(60)]
    scores = [examiner.examine(picture, scene) for scene, picture in pairs]
    assert sum(score.right for score in scores) / sum(score.asked for score in scores) < 0.5


def test_a_caption_is_read_back_to_its_scene_and_no_other_text_is() -> None:
    for number in range(400):
        scene, text, _ = drawn(number)
        assert world.scene_of(text) == scene
        assert world.scene_of(f"{text} and a dog") is None
    for text in ("", "a lighthouse on a rocky coast", "a big red circle, blue background", "sun on the left, day"):
        assert world.scene_of(text) is None


def test_accuracy_is_of_all_prompts_of_a_batch_and_of_captions_alone() -> None:
    scenes = [drawn(number) for number in (1, 2)]
    pictures = torch.stack([torch.from_numpy(picture.copy()).float() / 255.0 for _, _, picture in scenes])
    texts = [text for _, text, _ in scenes]
    assert accuracy.accuracy(pictures, texts) == 1.0
    swapped = accuracy.accuracy(pictures, texts[::-1])
    assert swapped is not None and swapped < 0.7
    assert accuracy.accuracy(pictures, [texts[0], "a lighthouse"]) is None
    assert accuracy.accuracy(pictures[:1], texts) is None
    assert accuracy.accuracy(pictures * float("nan"), texts) is not None

"""Tiles cover the image, share what they should, and blend to exactly one; the order of precisions."""

from __future__ import annotations

import itertools

import pytest
import torch

from speedlab.vae.attempts import blend, feather, grid, spans
from speedlab.vae.precision import Abilities, first_sound, safer


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40, 64, 511, 512])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (16, 4), (64, 8)])
def test_spans_cover_everything_with_the_overlap(length, tile, overlap):
    found = spans(length, tile, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(stop - start == min(tile, length) for start, stop in found)
    for before, after in itertools.pairwise(found):
        assert before[0] < after[0]
        assert before[1] - after[0] >= overlap
    longest = 1 + -(-max(length - tile, 0) // (tile - overlap))
    assert len(found) == longest, "no more tiles than needed"


@pytest.mark.parametrize(("length", "tile", "overlap"), [(40, 16, 4), (17, 16, 4), (33, 8, 2), (24, 8, 0), (5, 8, 2)])
def test_weights_sum_to_one_and_have_no_edge(length, tile, overlap):
    parts, scale = spans(length, tile, overlap), 8
    total = torch.zeros(length * scale)
    for (start, stop), weights in zip(parts, feather(parts, scale), strict=True):
        assert weights.shape == ((stop - start) * scale,)
        assert weights.min() > 0
        total[start * scale : stop * scale] += weights
        if overlap:
            assert weights.diff().abs().max() < 0.1
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_blending_tiles_of_a_local_function_gives_the_whole():
    def upscale(part):
        return part.repeat_interleave(4, -1).repeat_interleave(4, -2)[:, :3]

    samples = torch.randn(1, 4, 30, 21)
    seen = []
    tiles = grid(30, 21, 48, 12, 4)
    blended = blend(samples, tiles, upscale, lambda: seen.append(1))
    assert tiles.count == len(seen) > 1
    assert torch.allclose(blended, upscale(samples), atol=1e-5)


def test_the_overlap_is_at_most_a_quarter_tile():
    tiles = grid(64, 64, 64, 4096, 8)
    assert tiles.rows == spans(64, 8, 2)


def test_precisions_get_safer_until_fp32():
    modern, old = Abilities(fp16=True, bf16=True), Abilities(fp16=True, bf16=False)
    assert (safer("fp16", modern), safer("fp16", old)) == ("bf16", "fp32")
    assert (safer("bf16", modern), safer("fp32", modern)) == ("fp32", None)
    assert first_sound("fp16", set(), modern) == "fp16"
    assert first_sound("fp16", {"fp16"}, modern) == "bf16"
    assert first_sound("fp16", {"fp16", "bf16"}, modern) == "fp32"
    assert first_sound("fp16", {"fp16", "bf16", "fp32"}, modern) == "fp32"

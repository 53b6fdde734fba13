"""The whole schedule behind a part of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from speedlab.patching.position import Part, is_cut, is_whole, part_of

WHOLE = torch.tensor([14.0, 9.0, 5.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("sigmas", "part"),
    [
        (WHOLE, Part(0, 5)),
        (WHOLE[2:], Part(2, 5)),
        (WHOLE[:4], Part(0, 5)),
        (WHOLE[1:4], Part(1, 5)),
        (WHOLE[1:4].clone(), Part(0, 2)),  # cut off from its whole
        (WHOLE[::2], Part(0, 2)),  # not a stretch of it
        (WHOLE.flip(0)[1:], Part(1, 5)),  # noise inversion
        (WHOLE.flip(0)[:3], Part(0, 5)),
        (torch.cat([WHOLE, WHOLE])[4:8], Part(0, 3)),  # no schedule: it turns
        (torch.zeros(10)[2:5], Part(0, 2)),
        (torch.tensor([float("inf"), 3.0, 2.0, 0.0])[1:], Part(0, 2)),
    ],
)
def test_part(sigmas: torch.Tensor, part: Part) -> None:
    assert part_of(sigmas) == part


def test_a_run_that_ends_early_with_sigma_0() -> None:
    """As KSampler (Advanced) writes it, into the whole."""
    whole = WHOLE.clone()
    run = whole[:4]
    run[-1] = 0
    assert part_of(run[1:]) == Part(1, 5)


def padded(*sigmas: float) -> torch.Tensor:
    """A buffer that is larger than its schedule."""
    return torch.cat([torch.tensor(sigmas), torch.zeros(5)])


@pytest.mark.parametrize(
    ("sigmas", "part"),
    [
        (padded(14.0, 9.0, 5.0, 2.0, 0.0)[:5], Part(0, 4)),
        (padded(14.0, 9.0, 5.0, 2.0, 0.0)[2:5], Part(2, 4)),
        (padded(14.0, 9.0, 5.0, 2.0, 0.0)[1:3], Part(1, 4)),
        (padded(14.0, 9.0, 5.0, 2.0)[:3], Part(0, 4)),
        (padded(14.0, 9.0, 5.0, 2.0, 0.0)[3:8], Part(3, 7)),  # the run itself takes in the padding
    ],
)
def test_zeros_behind_the_schedule_are_no_steps(sigmas: torch.Tensor, part: Part) -> None:
    assert part_of(sigmas) == part


def test_a_run_that_ends_one_step_early_with_sigma_0() -> None:
    whole = WHOLE.clone()
    run = whole[:5]
    run[-1] = 0
    assert part_of(run) == Part(0, 5)


def test_what_lies_around_a_part_of_an_unknown_schedule_is_noticed() -> None:
    both = torch.cat([WHOLE, WHOLE])
    assert is_cut(both[:6]) and is_cut(both[6:]) and not is_cut(both) and not is_cut(both.clone()[::2])
    assert not is_cut(padded(14.0, 9.0, 0.0)[:3])


@pytest.mark.parametrize(
    ("sigmas", "whole"),
    [
        ((14.0, 5.0, 0.0), True),
        ((14.0, 5.0, 1.0), False),
        ((5.0, 1.0, 0.0), False),
        ((0.0001, 5.0, 14.0), True),  # as FlipSigmas gives it
        ((0.0001, 1.0, 5.0), False),
        ((1.0, 5.0, 14.0), False),
        ((14.0, 5.0, 0.001), True),  # after UniPC
        ((14.0, 1.0, 5.0, 0.0), True),
        ((0.0001, 14.0, 0.0), True),
        ((14.0, 1.0, 14.0), True),
        ((14.0, 14.0), False),
        ((5.0, 1.0, 5.0), False),
    ],
)
def test_a_whole_schedule_runs_from_end_to_end(sigmas: tuple[float, ...], whole: bool) -> None:
    sampling = SimpleNamespace(sigma_max=torch.tensor(14.6))
    assert is_whole(torch.tensor(sigmas), sampling) == whole

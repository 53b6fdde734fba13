"""The whole schedule behind a part of it."""

from __future__ import annotations

import pytest
import torch

from speedlab.accelerate.whole_schedule import Part, part_of

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
        (WHOLE.flip(0)[1:], Part(0, 4)),  # no schedule: it rises
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

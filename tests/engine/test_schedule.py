"""Step positions and fractions: pure arithmetic, checked over its whole range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.schedule import step_of, steps_before


@st.composite
def schedules(draw):
    ratios = draw(st.lists(st.floats(1.01, 2.0), min_size=1, max_size=60))
    sigmas = [0.03]
    for ratio in ratios:
        sigmas.append(sigmas[-1] * ratio)
    return [*reversed(sigmas), 0.0]


@given(schedules())
def test_every_sigma_of_the_schedule_is_its_own_step(sigmas):
    for index, sigma in enumerate(sigmas[:-1]):
        assert step_of(sigma, sigmas) == index


@given(schedules(), st.floats(0.0, 1.0))
def test_a_sigma_between_two_steps_belongs_to_the_earlier(sigmas, where):
    for index in range(len(sigmas) - 2):
        high, low = sigmas[index], sigmas[index + 1]
        between = low + (high - low) * (0.01 + 0.98 * where)
        if between > low * 1.0001:
            assert step_of(between, sigmas) == index


def test_a_sigma_above_the_schedule_is_the_first_step_and_below_it_the_last():
    assert step_of(99.0, [10.0, 5.0, 1.0, 0.0]) == 0
    assert step_of(0.001, [10.0, 5.0, 1.0, 0.0]) == 2


def test_the_rounding_of_an_exp_log_round_trip_does_not_move_a_step():
    assert step_of(5.0 * (1 + 3e-7), [10.0, 5.0, 1.0, 0.0]) == 1


def test_a_schedule_without_steps_is_refused():
    with pytest.raises(ValueError, match="two sigmas"):
        step_of(1.0, [1.0])


@pytest.mark.parametrize(
    ("fraction", "steps", "expected"),
    [
        (0.75, 20, 15),
        (0.0, 20, 0),
        (1.0, 20, 20),
        (0.7, 10, 7),
        (0.3, 10, 3),
        (0.29, 10, 2),
        (0.5, 7, 3),
        (0.55, 20, 11),
    ],
)
def test_fractions_count_whole_steps(fraction, steps, expected):
    assert steps_before(fraction, steps) == expected

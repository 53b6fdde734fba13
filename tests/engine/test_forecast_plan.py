"""Which steps Forecast's fixed plan leaves out: exact lists and counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.patching.position import Part
from speedlab.techniques.forecast.plan import ForecastConfig, fixed_plan, open_steps

FIXED = ForecastConfig(mode="fixed")


def full(steps, part=None, **options):
    return sorted(set(range(steps)) - fixed_plan(ForecastConfig(mode="fixed", **options), steps, part))


def test_the_published_lists():
    assert full(20) == [0, 1, 2, 3, 5, 7, 10, 13, 16, 18, 19]
    assert full(30) == [0, 1, 2, 3, 5, 7, 10, 13, 16, 19, 22, 25, 28, 29]


@pytest.mark.parametrize(("steps", "count"), [(10, 8), (12, 8), (15, 9), (20, 11), (25, 13), (30, 14), (50, 21)])
def test_counts(steps, count):
    assert len(full(steps)) == count


@pytest.mark.parametrize("steps", range(1, 10))
def test_nothing_is_left_out_of_nine_steps_and_fewer(steps):
    assert full(steps) == list(range(steps))
    assert not open_steps(ForecastConfig(), steps)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_skip": 1}, [0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 18, 19]),
        ({"max_skip": 2}, [0, 1, 2, 3, 5, 7, 10, 13, 16, 18, 19]),
        ({"max_skip": 9}, [0, 1, 2, 3, 5, 7, 10, 13, 16, 18, 19]),
        ({"max_skip": 0}, list(range(20))),
        ({"start": 0.5}, [*range(10), 11, 13, 16, 18, 19]),
        ({"end": 0.5}, [0, 1, 2, 3, 5, 7, *range(10, 20)]),
        ({"start": 0.95}, list(range(20))),
        ({"end": 0.2}, list(range(20))),
    ],
)
def test_limits_and_windows(options, expected):
    assert full(20, **options) == expected


def test_a_window_counts_the_steps_of_the_whole_schedule():
    """Steps 20 to 39 of 40: half of the whole is over at the run's first step."""
    part = Part(20, 40)
    assert full(20, part) == full(20)
    assert full(20, part, end=0.5) == list(range(20))
    assert full(20, part, start=0.75) == full(20, start=0.5)


@given(steps=st.integers(1, 200), start=st.floats(0, 1), end=st.floats(0, 1), most=st.integers(0, 6))
def test_every_plan(steps, start, end, most):
    left_out = fixed_plan(ForecastConfig("fixed", max_skip=most, start=start, end=end), steps)
    assert all(4 <= step < steps - 2 for step in left_out)
    in_a_row = 0
    for step in range(steps):
        in_a_row = in_a_row + 1 if step in left_out else 0
        assert in_a_row <= min(most, 2)
    assert not left_out or steps >= 10


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mode": "auto"}, "mode"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": 1.5}, "tolerance"),
        ({"max_skip": -1}, "max_skip"),
        ({"start": -0.1}, "start_percent"),
        ({"end": 1.1}, "end_percent"),
        ({"end": float("nan")}, "end_percent"),
    ],
)
def test_values_out_of_range_name_their_input(options, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        ForecastConfig(**options)


def test_what_is_off():
    assert ForecastConfig(max_skip=0).is_off and ForecastConfig(tolerance=0.0).is_off
    assert ForecastConfig(start=0.5, end=0.5).is_off and ForecastConfig(start=0.6, end=0.4).is_off
    assert not ForecastConfig().is_off and not ForecastConfig("fixed", tolerance=0.0).is_off

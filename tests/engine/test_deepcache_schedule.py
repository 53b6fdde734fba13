"""Which steps are full, and which full step serves a cached one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.patching.position import Part
from speedlab.techniques.deepcache.schedule import DeepCacheConfig, fallback, nonuniform_steps, sources


def test_uniform() -> None:
    assert sources(DeepCacheConfig(interval=3), 8) == (0, 0, 0, 3, 3, 3, 6, 6)


def test_window_counts_steps() -> None:
    config = DeepCacheConfig(interval=2, start=0.25, end=0.75)
    assert sources(config, 8) == (None, None, 2, 2, 4, 4, None, None)
    assert sources(config, 3) == (0, 0, None)


def test_a_window_of_the_whole_schedule_in_a_run_that_is_a_part_of_it() -> None:
    """Steps 5 to 9 of 20; the window is 6 to 14, then 2 to 7."""
    assert sources(DeepCacheConfig(interval=3, start=0.3, end=0.7), 5, Part(5, 20)) == (None, 1, 1, 1, 4)
    assert sources(DeepCacheConfig(interval=3, start=0.1, end=0.35), 5, Part(5, 20)) == (0, 0, None, None, None)


@pytest.mark.parametrize("config", [DeepCacheConfig(interval=1), DeepCacheConfig(start=0.5, end=0.5)])
def test_off(config: DeepCacheConfig) -> None:
    assert config.is_off
    assert sources(config, 20) == (None,) * 20


def test_a_window_between_two_steps_is_empty() -> None:
    assert sources(DeepCacheConfig(start=0.31, end=0.39), 10) == (None,) * 10


# Lists that the DeepCache package's formula gives.
@pytest.mark.parametrize(
    ("steps", "count", "center", "expected"),
    [
        (20, 7, 15, (0, 4, 8, 11, 14, 15, 17)),
        (12, 4, 15, (0, 4, 7, 10)),
        (30, 10, 15, (0, 4, 7, 10, 13, 15, 17, 20, 23, 26)),
        (50, 10, 15, (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)),
        (4, 1, 15, (0,)),
    ],
)
def test_nonuniform(steps: int, count: int, center: int, expected: tuple[int, ...]) -> None:
    assert nonuniform_steps(steps, count, center, 1.4) == expected


def test_nonuniform_window() -> None:
    config = DeepCacheConfig(interval=3, start=0.5, schedule="nonuniform", center=25)
    plan = sources(config, 40)
    assert plan[:20] == (None,) * 20
    assert plan[20] == 20
    assert len({step for step in plan if step is not None}) == 7


def test_no_nonuniform_schedule_falls_back_and_says_so() -> None:
    assert nonuniform_steps(30, 15, 15, 1.4) is None
    config = DeepCacheConfig(interval=2, schedule="nonuniform")
    assert sources(config, 30) == sources(DeepCacheConfig(interval=2), 30)
    assert "no non-uniform schedule has 15 full steps of 30 around step 15" in str(fallback(config, 30))
    evenly = DeepCacheConfig(interval=3, schedule="nonuniform", power=1.0)
    assert sources(evenly, 30) == sources(DeepCacheConfig(interval=3), 30)
    assert "Choose a power above 1" in str(fallback(evenly, 30))
    assert fallback(DeepCacheConfig(interval=3), 30) is None
    assert fallback(DeepCacheConfig(interval=3, schedule="nonuniform"), 30) is None


@given(
    interval=st.integers(1, 30),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    steps=st.integers(1, 80),
    schedule=st.sampled_from(["uniform", "nonuniform"]),
    center=st.integers(0, 60),
    power=st.floats(1.0, 4.0),
)
def test_sources_are_earlier_full_steps(
    interval: int, start: float, end: float, steps: int, schedule: str, center: int, power: float
) -> None:
    plan = sources(DeepCacheConfig(interval, 0, start, end, schedule, center, power), steps)  # type: ignore[arg-type]
    assert len(plan) == steps
    inside = [step for step, source in enumerate(plan) if source is not None]
    assert inside == list(range(inside[0], inside[-1] + 1)) if inside else True
    for step in inside:
        source = plan[step]
        assert source is not None and source <= step and plan[source] == source
    if inside:
        assert plan[inside[0]] == inside[0]
        assert len(set(plan) - {None}) == -(-len(inside) // interval)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"interval": 0}, "cache_interval"),
        ({"branch": -1}, "cache_branch_id"),
        ({"start": -0.1}, "start_percent"),
        ({"end": 1.1}, "end_percent"),
        ({"schedule": "other"}, "schedule"),
        ({"center": -1}, "center"),
    ],
)
def test_bad_values_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DeepCacheConfig(**options)

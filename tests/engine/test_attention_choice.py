"""How `auto` chooses: by measurement, in favour of SDPA, once for each shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.techniques.attention.choice import ChoiceTable, Shape, bucket, candidates, measure, measured_length, pick


class Workshop:
    """A clock that only the work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes each of `seconds` in turn, the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_a_cpu_never_compares_sub_quadratic_attention() -> None:
    assert "sub_quadratic" not in candidates("cpu")
    assert all(candidates(device)[0] == "sdpa" for device in ("cpu", "cuda", "mps", "xpu"))
    assert all("sage" not in candidates(device) for device in ("cpu", "cuda", "mps"))


@given(st.integers(1, 10**6))
def test_buckets(length: int) -> None:
    found = bucket(length)
    assert found & (found - 1) == 0
    assert bucket(found) == found
    assert length <= found < 2 * max(length, 16)


def test_long_sequences_are_measured_by_shorter_ones() -> None:
    assert measured_length(64, "cpu") == 64
    assert measured_length(4096, "cpu") == measured_length(16384, "cpu") == 1024
    assert measured_length(4096, "cuda") == 4096


def test_pick() -> None:
    assert pick({"sdpa": 1.0, "split": 0.5}).name == "split"
    assert pick({"sdpa": 1.0, "split": 0.95}).name == "sdpa", "about as fast: no change by chance"
    assert pick({"sdpa": 1.0, "split": 3.0}).name == "sdpa"
    assert pick({"split": 2.0, "sub_quadratic": 1.0}).name == "sub_quadratic"
    assert pick({}).name == "sdpa"


def test_the_first_call_and_busy_moments_do_not_count() -> None:
    shop = Workshop()
    runners = {"sdpa": shop.work("sdpa", 9.0, 0.7, 0.02, 0.5), "split": shop.work("split", 0.1, 0.3, 0.03, 0.03)}
    assert measure(runners, shop.clock) == pytest.approx({"sdpa": 0.02, "split": 0.03})
    assert shop.log == ["sdpa", "split"] * 6, "in turns, and no more than needed"


def test_quick_ones_are_measured_more_often() -> None:
    shop = Workshop()
    measure({"sdpa": shop.work("sdpa", 1e-4), "split": shop.work("split", 1e-4)}, shop.clock)
    assert shop.log.count("sdpa") == shop.log.count("split") == 1 + 10


def test_a_hopeless_one_is_dropped() -> None:
    shop = Workshop()
    runners = {name: shop.work(name, seconds) for name, seconds in (("sdpa", 1.0), ("split", 4.0))}
    assert measure(runners, shop.clock) == {"sdpa": 1.0, "split": 4.0}
    assert shop.log == ["sdpa", "split"] * 2, "nothing left to compare"


def test_a_busy_moment_does_not_drop_the_preferred_one() -> None:
    shop = Workshop()
    runners = {"sdpa": shop.work("sdpa", 1.0, 9.0, 0.1), "split": shop.work("split", 0.2)}
    assert pick(measure(runners, shop.clock)).name == "sdpa"


def test_small_ones_are_not_measured() -> None:
    table = ChoiceTable()
    shape = Shape("cpu", "float32", 40, 256, 128, False)
    assert table.choose(shape, lambda: pytest.fail("asked"), lambda: pytest.fail("measured")).name == "sdpa"


def test_one_that_fails_is_no_candidate() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel")

    shop = Workshop()
    assert list(measure({"sdpa": shop.work("sdpa", 1.0), "split": fail}, shop.clock)) == ["sdpa"]
    assert pick(measure({"sdpa": fail}, shop.clock)).name == "sdpa"


def test_a_failed_measurement_is_not_kept_for_the_next_start(unmeasured: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    shape = Shape("cpu", "float32", 40, 1024, 1024, False)
    for failing, chosen in ((("sdpa", "split"), "sdpa"), (("sdpa",), "split")):
        ways = {name: fail if name in failing else lambda: None for name in ("sdpa", "split")}
        assert ChoiceTable().choose(shape, able, lambda ways=ways: ways).name == chosen
        assert not unmeasured.exists()


def able() -> tuple[str, ...]:
    return candidates("cpu")


@pytest.mark.usefixtures("unmeasured")
def test_a_shape_is_measured_once() -> None:
    table, asked = ChoiceTable(), []

    def runners() -> dict[str, Callable[[], None]]:
        asked.append(1)
        return {"sdpa": lambda: None}

    shape = Shape("cpu", "float32", 40, 1024, 1024, False)
    first = table.choose(shape, able, runners)
    assert table.choose(Shape("cpu", "float32", 40, 1024, 1024, False), able, runners) is first
    assert len(asked) == 1
    table.choose(Shape("cpu", "float32", 40, 1024, 1024, True), able, runners)
    assert len(asked) == 2
    assert str(shape) == "1024x1024 tokens, head size 40, float32"

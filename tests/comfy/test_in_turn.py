"""Measuring in turn: the order of turns, warm-up, and failures that end one variant alone."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@pytest.fixture
def in_turn(engine: Any) -> Any:
    return engine("plans.in_turn")


@pytest.fixture
def series(in_turn: Any) -> Any:
    """Makes series with names."""

    @dataclass
    class Named(in_turn.Series):  # type: ignore[misc]
        name: str

    return lambda names: [Named(name) for name in names]


def test_warm_up_and_first_round_are_in_order_and_later_rounds_rotate(in_turn: Any, series: Any) -> None:
    variants, told = series("ABC"), []
    for turn in in_turn.turns(variants, repeats=3, warmup=1):
        told.append((turn.series.name, turn.text, turn.left))
        turn.keep(f"{turn.series.name}{turn.number}")
    assert "".join(name for name, _, _ in told) == "ABCABCBCACAB"
    assert told[0] == ("A", "warm-up", 4) and told[3] == ("A", "repeat 1 of 3", 3) and told[-1][2] == 1
    assert variants[1].first == "B0" and variants[1].repeats == ["B1", "B2", "B3"]


def test_rounds_end_where_there_is_no_time_left_and_a_round_is_whole(in_turn: Any, series: Any) -> None:
    asked: list[int] = []

    def goes_on(done: int) -> bool:
        asked.append(done)
        return done < 2

    assert [turn.series.name for turn in in_turn.turns(series("AB"), 5, goes_on=goes_on)] == ["A", "B", "B", "A"]
    assert asked == [1, 2]


def test_a_variant_that_fails_is_left_out_and_the_others_go_on(in_turn: Any, series: Any, comfy: Any) -> None:
    variants = series("ABC")

    def failed(error: Exception) -> str:
        turn.series.status, turn.series.error = "error", str(error)
        return "error"

    for turn in in_turn.turns(variants, 2, warmup=1):
        with in_turn.own_failure(failed):
            if turn.series.name == "B" and turn.counts:
                raise ValueError("no such kernel")
            turn.keep(turn.number)
    assert [len(one.repeats) for one in variants] == [2, 0, 2] and variants[1].first == 0
    assert variants[1].error == "no such kernel"


def test_what_did_not_fit_is_gone_before_memory_is_freed(in_turn: Any, comfy: Any, monkeypatch: Any) -> None:
    held: list[Any] = []
    alive: list[bool] = []

    def deep() -> None:
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        try:
            raise MemoryError("inner")
        except MemoryError as error:
            raise RuntimeError("CUDA out of memory") from error

    monkeypatch.setattr(in_turn, "release_unused_memory", lambda: alive.append(held[0]() is not None))
    with in_turn.own_failure(lambda error: "oom"):
        deep()
    with in_turn.own_failure(lambda error: None):
        raise ValueError("the device does not answer")
    assert alive == [False], "freed once, and not on a device that must be left alone"


def test_a_cancel_and_a_full_disk_end_everything(in_turn: Any, engine: Any, comfy: Any) -> None:
    cancel = importlib.import_module("comfy.model_management").InterruptProcessingException
    for kind in (cancel, KeyboardInterrupt, engine("common.errors").ResultsError):
        with pytest.raises(kind), in_turn.own_failure(lambda error: pytest.fail("it is no variant's")):
            raise kind("over")

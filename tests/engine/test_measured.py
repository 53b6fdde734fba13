"""What was timed on this machine is kept for the next start, and a user may write another choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speedlab.common import measured
from speedlab.common.measured import measured_once
from speedlab.techniques.attention.choice import ChoiceTable, Shape, candidates
from speedlab.techniques.cpu import conv_as_matmul, onednn

WAYS = ("this", "that")


def ask(what: str = "way", found: str = "that") -> tuple[str, bool]:
    """The choice, and whether it was measured."""
    calls: list[int] = []
    return measured_once(what, lambda: calls.append(1) or found, WAYS), bool(calls)  # type: ignore[func-returns-value]


def test_once_a_machine_and_a_user_may_choose(unmeasured: Path) -> None:
    assert ask() == ("that", True)
    assert ask(found="this") == ("that", False)
    assert ask("another") == ("that", True)
    (file,) = unmeasured.iterdir()
    held = json.loads(file.read_text())
    assert held["choices"] == {"way": "that", "another": "that"} and held["machine"]["torch"] == torch.__version__
    file.write_text(json.dumps({**held, "choices": {**held["choices"], "way": "this"}}))
    assert ask() == ("this", False)
    file.unlink()
    assert ask() == ("that", True)


def test_of_two_that_measure_at_once_the_first_to_write_is_kept(unmeasured: Path) -> None:
    def slower() -> str:
        assert ask(found="this") == ("this", True)
        return "that"

    assert measured_once("way", slower, WAYS) == "this"
    assert ask() == ("this", False)


@pytest.mark.parametrize("changed", ["cpu", "instructions", "threads", "torch", "speedlab"])
def test_another_machine_or_version_measures(unmeasured: Path, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask()
    other = {**measured._machine(), changed: "other"}
    monkeypatch.setattr(measured, "_machine", lambda: other)
    assert ask(found="this") == ("this", True)
    assert len(list(unmeasured.iterdir())) == 2, "both are kept"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: "{}",
        lambda text: text.replace('"that"', "1"), lambda text: text.replace('"that"', '"gone"'),
        lambda text: text.replace('"that"', '["that"]'), lambda text: text.replace(torch.__version__, "1.0"),
        lambda text: '{"machine": null, "choices": 3}', lambda text: "\x00" * 9,
    ],
)  # fmt: skip
def test_a_wrong_file_is_made_anew(unmeasured: Path, damage: Callable[[str], str], caplog: Any) -> None:
    ask()
    (file,) = unmeasured.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert ask() == ("that", True)
    assert "measured anew" in caplog.text and file.read_text() == whole


def test_where_nothing_can_be_kept_it_is_measured(unmeasured: Path, caplog: Any, monkeypatch: Any) -> None:
    unmeasured.write_text("a file in its place")
    assert ask() == ask() == ("that", True)
    assert "cannot be written" in caplog.text
    monkeypatch.setattr(measured, "folder", lambda: None)  # without a ComfyUI
    assert ask() == ask() == ("that", True)


def test_each_auto_of_a_cpu_takes_what_was_kept(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has measured nothing yet."""
    shape, timed = Shape("cpu", "float32", 40, 1024, 1024, False), [lambda: {"sdpa": lambda: None}]
    caches = () if onednn.why_not() else (onednn.is_faster_here, conv_as_matmul.most_pixels_here)

    def start() -> list[Any]:
        for cache in caches:
            cache.cache_clear()
        return [ChoiceTable().choose(shape, lambda: candidates("cpu"), timed[0]).name, *(cache() for cache in caches)]

    first = start()
    timed[0] = lambda: pytest.fail("measured")
    for module in (onednn, conv_as_matmul):
        monkeypatch.setattr(module, "least_seconds", lambda *_, **__: pytest.fail("measured"))
    assert start() == first
    (file,) = unmeasured.iterdir()
    text = file.read_text().replace('"sdpa"', '"onednn"').replace('"PyTorch"', '"oneDNN"')
    file.write_text(text)
    assert start()[:2] == ["onednn", *([True] if caches else [])]
    for cache in caches:
        cache.cache_clear()

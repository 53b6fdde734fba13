"""Times computed from a server's messages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from speedlab_tools.client import client as module
from speedlab_tools.client.events import Event, EventLog, node_spans, text_to_image_s

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple"},
    "2": {"class_type": "CLIPTextEncode"},
    "3": {"class_type": "CLIPTextEncode"},
    "4": {"class_type": "KSampler"},
    "5": {"class_type": "VAEDecode"},
    "6": {"class_type": "SaveImage"},
    "7": {"class_type": "VAELoader"},
}


def log_of(*marks: tuple[float, str | None]) -> EventLog:
    log = EventLog()
    for time_s, node in marks:
        log.add(Event(time_s, "executing", node))
    return log


def test_text_to_picture_leaves_out_loading_before_and_between():
    log = log_of((0, "1"), (10, "2"), (11, "3"), (12, "4"), (20, "7"), (25, "5"), (27, "6"), (28, None))
    assert text_to_image_s(log, GRAPH) == 28 - 10 - 5


def test_text_to_picture_ends_with_the_last_picture_not_with_later_nodes():
    log = log_of((1, "2"), (2, "4"), (3, "6"), (4, "5"), (9, None))
    assert text_to_image_s(log, GRAPH) == 3


def test_nothing_is_timed_where_nodes_were_cached_or_the_log_has_holes():
    assert text_to_image_s(log_of((1, "4"), (2, "6"), (3, None)), GRAPH) is None
    assert text_to_image_s(log_of((1, "2"), (2, "4"), (3, None)), GRAPH) is None
    broken = log_of((1, "2"), (2, "6"), (3, None))
    broken.complete = False
    assert text_to_image_s(broken, GRAPH) is None


def test_spans_pair_each_node_with_the_next_mark():
    spans = node_spans(log_of((0, "1"), (2, "2"), (5, None)).events)
    assert [(span.node, span.seconds) for span in spans] == [("1", 2), ("2", 3)]
    assert node_spans([]) == []


def test_a_cancelled_run_lets_its_prompt_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Waits:
        prompt_id = "7"

        def __init__(self, *_: Any) -> None:
            self.run = lambda _extra: asyncio.sleep(60)

    class Client(module.ComfyClient):
        async def interrupt(self, prompt_id: str | None = None) -> None:
            said.append(prompt_id)

        async def is_queued(self, prompt_id: str) -> bool:
            said.append(prompt_id)
            return len(said) < 3

    async def cancelled(**options: Any) -> None:
        task = asyncio.ensure_future(Client("http://127.0.0.1:1").run({}, **options))
        await asyncio.sleep(0)
        task.cancel()
        await task

    monkeypatch.setattr(module, "Follower", Waits)
    for options, calls in (({}, 1), ({"ends_s": 60.0}, 3)):
        said.clear()
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled(**options))
        assert said == ["7"] * calls

"""The live feed: at most ten messages a second, the last state always arrives, and no failure reaches the run."""

from __future__ import annotations

import asyncio
import sys
import types

import pytest

from speedlab.measure.clock import Mark
from speedlab.measure.context import NodeContext
from speedlab.measure.timeline import Executing
from speedlab.measure.trace import Evaluation
from speedlab.web import live

CLIENT = "a-browser"


class Server:
    """What of ComfyUI's server the feed uses, on a loop of the test's; the browser tier runs the real one."""

    def __init__(self, loop) -> None:
        self.loop, self.client_id, self.sockets = loop, CLIENT, {CLIENT: object()}
        self.sent: list[tuple[float, str, dict, str]] = []

    def send_sync(self, event, data, sid=None) -> None:
        self.sent.append((self.loop.time(), event, data, sid))


@pytest.fixture
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture
def server(loop, monkeypatch):
    made = Server(loop)
    module = types.ModuleType("server")
    module.PromptServer = types.SimpleNamespace(instance=made)
    monkeypatch.setitem(sys.modules, "server", module)
    live.listen(CLIENT, True)
    yield made
    live.listen(CLIENT, False)


def context(node_id: str = "12:3") -> NodeContext:
    return NodeContext.of({}, {"workflow": {"id": "canvas"}}, node_id)


def sample(run: live.LiveRun, steps: int, step_ms: float = 1.0, cached=(), without_uncond=()) -> None:
    run.began(steps, Mark(0))
    for index in range(steps):
        evaluation = Evaluation(None, Mark(int(index * step_ms * 1e6)), Mark(0), 1, int(index not in without_uncond), 1)
        evaluation.cached = index in cached
        run.evaluating(evaluation)
        run.step_done()
    run.ended(Mark(int(steps * step_ms * 1e6)))


async def until_quiet(server, seconds: float = 0.3) -> None:
    count = -1
    while count != len(server.sent):
        count = len(server.sent)
        await asyncio.sleep(seconds)


def test_one_message_tells_all_steps_of_a_quick_run(loop, server):
    feed = live.open_feed(context(), "run", warmup=0, repeats=1)
    sample(feed.run(0), 4, 2.0, cached={1}, without_uncond={3})
    feed.close("ok")
    loop.run_until_complete(until_quiet(server))
    (entry,) = server.sent
    assert entry[1] == "speedlab.step" and entry[3] == CLIENT
    told = entry[2]
    assert (told["node"], told["workflow"], told["state"], told["total"]) == ("12:3", "canvas", "ok", 4)
    assert told["steps"] == [[2.0, 2], [2.0, 3], [2.0, 2], [2.0, 0]]
    assert told["summary"] == {"steps": 4, "step_time_ms": 2.0, "it_per_s": 500.0}


def test_never_more_than_ten_a_second_and_the_last_state_arrives(loop, server):
    async def work() -> None:
        feeds = [live.open_feed(context(str(n)), f"run{n}", 0, 1) for n in range(3)]
        runs = [feed.run(0) for feed in feeds]
        for run in runs:
            run.began(400, Mark(0))
        for index in range(400):
            for run in runs:
                run.evaluating(Evaluation(None, Mark(index * 1000), Mark(0), 1, 1, 1))
                run.step_done()
            await asyncio.sleep(0.004)
        for run, feed in zip(runs, feeds, strict=True):
            run.ended(Mark(400_000))
            feed.close("ok")
        await until_quiet(server, 0.5)

    loop.run_until_complete(work())
    times = [entry[0] for entry in server.sent]
    assert len(times) > 6
    assert all(sum(start <= t < start + 1.0 for t in times) <= 10 for start in times)
    for number in range(3):
        mine = [entry[2] for entry in server.sent if entry[2]["node"] == str(number)]
        assert mine[-1]["state"] == "ok"
        assert sum(len(message["steps"]) for message in mine) == 400
        assert [m["first"] for m in mine] == [sum(len(e["steps"]) for e in mine[:i]) for i in range(len(mine))]


def test_a_new_run_starts_over_and_a_failed_one_says_so(loop, server):
    feed = live.open_feed(context(), "run", warmup=1, repeats=1)
    sample(feed.run(0), 2)
    loop.run_until_complete(until_quiet(server))
    second = feed.run(1)
    second.began(2, Mark(0))
    feed.close("cancelled")
    loop.run_until_complete(until_quiet(server))
    told = [entry[2] for entry in server.sent]
    assert [(m["run"], m["runs"], m["warmup"], m["first"], len(m["steps"])) for m in told] == [
        (0, 2, 1, 0, 2),
        (1, 2, 1, 0, 0),
    ]
    assert told[-1]["state"] == "cancelled"


def test_a_second_evaluation_in_a_step_belongs_to_one_bar(loop, server):
    feed = live.open_feed(context(), "run", 0, 1)
    run = feed.run(0)
    run.began(2, Mark(0))
    for start in (0, 1, 2):  # Heun: two evaluations, then one, the callback after the first of each
        run.evaluating(Evaluation(None, Mark(start * 1_000_000), Mark(0), 1, 1, 1))
        if start != 1:
            run.step_done()
    run.ended(Mark(3_000_000))
    assert sum(ms for ms, _ in run.steps) == 3.0
    assert len(run.steps) == 2


def test_times_of_a_device_with_a_queue_are_told_as_such_and_compiling_is_in_none(loop, server):
    feed = live.open_feed(context(), "run", 0, 1)
    for index, event in enumerate((None, object())):
        run = feed.run(index)
        run.began(1, Mark(0, event), [(Mark(1_000_000), Mark(6_000_000))])
        run.evaluating(Evaluation(None, Mark(0), Mark(0), 1, 1, 1))
        run.step_done()
        run.ended(Mark(10_000_000))
        told = feed.message()
        assert told["queued"] == (event is not None)
        assert told["summary"]["step_time_ms"] == told["steps"][0][0] == 5.0


def test_nobody_listens_nothing_is_made(loop, server):
    live.listen(CLIENT, False)
    assert live.open_feed(context(), "run", 0, 1) is None
    live.listen(CLIENT, True)
    server.client_id = None
    assert live.open_feed(context(), "run", 0, 1) is None
    server.client_id = CLIENT
    server.sockets.clear()
    assert live.open_feed(context(), "run", 0, 1) is None
    assert live.open_feed(NodeContext(), "run", 0, 1) is None


def test_without_a_server_there_is_no_feed(monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    assert live.open_feed(context(), "run", 0, 1) is None


def test_a_failing_send_is_logged_once_and_hurts_nobody(loop, server, caplog, monkeypatch):
    monkeypatch.setattr(live, "_warned", False)

    def fail(*_args) -> None:
        raise ConnectionError("the browser is gone")

    server.send_sync = fail
    feed = live.open_feed(context(), "run", 0, 1)
    sample(feed.run(0), 3)
    loop.run_until_complete(asyncio.sleep(0.3))
    sample(feed.run(1), 3)
    loop.run_until_complete(asyncio.sleep(0.3))
    loop.close()
    feed.close("ok")
    assert [r.getMessage() for r in caplog.records if "live chart" in r.getMessage()] == [
        "SpeedLab: the live chart cannot be fed: the browser is gone. Runs are not affected."
    ]


def test_the_clients_that_listen_are_kept_to_a_number():
    for number in range(1000):
        live.listen(f"client-{number}", True)
    assert len(live._listeners.clients) <= 256
    assert live._listeners.has("client-999")
    for number in range(1000):
        live.listen(f"client-{number}", False)


def test_work_that_is_done_once_is_told_on_the_node_that_runs(server, monkeypatch):
    told = []
    monkeypatch.setattr(live, "executing", lambda: Executing("prompt", "12:3"))
    live.tell_of_work("Compiling", 0.0, False)  # a ComfyUI that shows no such text
    server.send_progress_text = lambda *words: told.append(words)
    live.tell_of_work("Compiling", 0.0, False)
    live.tell_of_work("Compiling", 12.34, True)
    assert told == [
        ("Compiling (once for this model and size) ...", "12:3", CLIENT),
        ("Compiling: 12.3 s, paid once", "12:3", CLIENT),
    ]
    monkeypatch.setattr(live, "executing", lambda: Executing())
    live.tell_of_work("Compiling", 0.0, False)
    server.client_id = None
    live.tell_of_work("Compiling", 0.0, False)
    assert len(told) == 2, "outside of a prompt, or for a script, nobody looks"


def test_a_text_that_cannot_be_sent_reaches_no_run(server, monkeypatch, caplog):
    def broken(*_):
        raise OSError("the browser is gone")

    monkeypatch.setattr(live, "executing", lambda: Executing("prompt", "12:3"))
    monkeypatch.setattr(live, "_warned", False)
    server.send_progress_text = broken
    for _ in range(2):
        live.tell_of_work("Compiling", 0.0, False)
    assert caplog.text.count("the browser is gone") == 1

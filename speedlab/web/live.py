"""Step times for the browser while a sampler runs.

The sampling thread only keeps host times and raises a flag; the server's own loop builds and sends the messages, at
most ten a second in all. Nothing here waits for a GPU: on one, live times are those of the host, and the device's
arrive with the result. Nothing is sent to a browser that did not ask, and no failure here reaches the run.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import first_line
from ..measure.clock import Mark
from ..measure.context import NodeContext
from ..measure.summary import speed
from ..measure.timeline import executing
from ..measure.trace import Evaluation

log = logging.getLogger(__name__)

EVENT = "speedlab.step"
# A little over a tenth of a second, so that no second ever sees an eleventh message.
INTERVAL_S = 0.105
MAX_STEPS_A_MESSAGE = 2000
_KEPT_CLIENTS = 256

_CACHED, _WITH_UNCOND, _FORECAST = 1, 2, 4


@dataclass
class _Listeners:
    """The clients that show a live chart."""

    clients: dict[str, None] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, client_id: str, listens: bool) -> None:
        with self.lock:
            self.clients.pop(client_id, None)
            if listens:
                self.clients[client_id] = None
                while len(self.clients) > _KEPT_CLIENTS:
                    del self.clients[next(iter(self.clients))]

    def has(self, client_id: object) -> bool:
        with self.lock:
            return client_id in self.clients


_listeners = _Listeners()
_warned = False


def listen(client_id: str, listens: bool) -> None:
    """Note that a browser shows live charts, or no longer does."""
    _listeners.set(client_id, listens)


def open_feed(context: NodeContext, run_id: str, warmup: int, repeats: int) -> LiveFeed | None:
    """A feed to the browser that queued the executing prompt; None where it does not show live charts."""
    try:
        server: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        client = getattr(server, "client_id", None)
        if context.node_id is None or client is None or not _listeners.has(client) or client not in server.sockets:
            return None
        info = {"node": context.node_id, "workflow": context.workflow_id(), "run_id": run_id}
        return LiveFeed(_pump_of(server), client, {**info, "warmup": warmup, "runs": warmup + repeats})
    except Exception as error:
        _warn_once(error)
        return None


def tell_of_work(what: str, seconds: float, done: bool) -> None:
    """Say on the node that runs what is done once, for the browser that queued it, where this ComfyUI shows such texts.

    Compiling can take minutes in which nothing else is to be seen.
    """
    try:
        server: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        send, client, node = getattr(server, "send_progress_text", None), server.client_id, executing().node_id
        if send is not None and client is not None and node is not None:
            text = f"{what}: {seconds:.1f} s, paid once" if done else f"{what} (once for this model and size) ..."
            send(text, node, client)
    except Exception as error:
        _warn_once(error)


class LiveFeed:
    """What one node tells one browser about the runs of one call."""

    def __init__(self, pump: _Pump, client_id: str, info: Mapping[str, Any]) -> None:
        self.client_id = client_id
        self.waiting = False
        self._pump = pump
        self._info = info
        self._run: LiveRun | None = None
        self._state = "running"
        self._sent_run, self._sent_steps = -1, 0

    def run(self, index: int) -> LiveRun:
        """Start telling about run `index`, counted from the first warm-up."""
        self._run = LiveRun(index, self)
        return self._run

    def close(self, state: str) -> None:
        """Tell how the call ended: the record's status. The step times known by then are sent with it."""
        self._state = state
        self.changed()

    def changed(self) -> None:
        """Have the present state sent when its turn comes; costs next to nothing while that is under way."""
        if not self.waiting:
            self.waiting = True
            self._pump.ask(self)

    def message(self) -> dict[str, Any]:
        """The state now: the steps done since the last message of this run, `first` being the first one's index.

        `queued`: the device is behind, so that the times tell when work was handed to it.
        `summary` is of all steps of this run that are done, computed as the record's is.
        """
        run = self._run
        if run is None:
            nothing = {"run": 0, "total": 0, "first": 0, "steps": [], "summary": speed(None, 0), "queued": False}
            return {**self._info, "state": self._state, **nothing}
        if run.index != self._sent_run:
            self._sent_run, self._sent_steps = run.index, 0
        first = self._sent_steps
        steps = run.steps[first : first + MAX_STEPS_A_MESSAGE]
        self._sent_steps = first + len(steps)
        if self._sent_steps < len(run.steps):
            self.changed()
        return {**self._info, "state": self._state, "run": run.index, "total": run.total, "first": first,
                "steps": [list(step) for step in steps], "summary": run.speed(), "queued": run.queued}  # fmt: skip


class LiveRun:
    """The steps of one sampler run as the host sees them, for the live chart.

    A step lasts from its first evaluation to the first one after its callback. A sampler that evaluates twice a step
    has its second evaluation counted with the next step here; the record attributes by sigma.
    """

    def __init__(self, index: int, feed: LiveFeed) -> None:
        self.index = index
        self.total = 0
        self.queued = False
        self.steps: list[tuple[float, int]] = []
        self._feed = feed
        self._evaluations: list[Evaluation] = []
        self._start_ns = 0
        self._apart: Sequence[tuple[Mark, Mark]] = ()
        self._done = False
        # One value, which the server's loop reads while the sampling thread replaces it.
        self._so_far = (0, 0)

    def speed(self) -> dict[str, Any]:
        """Sampling time over steps until the end of the last whole step."""
        steps, nanoseconds = self._so_far
        return speed(nanoseconds / 1e6, steps)

    def began(self, steps: int, mark: Mark, apart: Sequence[tuple[Mark, Mark]] = ()) -> None:
        # A run that goes on with another model begins again for the steps that are left.
        self.total, self._start_ns = self.total + steps, mark.host_ns
        self.queued, self._apart = mark.event is not None, apart
        self._feed.changed()

    def evaluating(self, evaluation: Evaluation) -> None:
        if self._done:
            self._close_step(evaluation.start.host_ns)
        self._evaluations.append(evaluation)

    def step_done(self) -> None:
        self._done = True

    def ended(self, mark: Mark) -> None:
        if self._evaluations and self._done:
            self._close_step(mark.host_ns)

    def _close_step(self, end_ns: int) -> None:
        inside = [(a, b) for a, b in self._apart if a.host_ns >= self._start_ns and b.host_ns <= end_ns]
        spent_ns = end_ns - self._start_ns - sum(b.host_ns - a.host_ns for a, b in inside)
        self.steps.append((round(spent_ns / 1e6, 2), _flags(self._evaluations)))
        self._so_far = (len(self.steps), self._so_far[1] + spent_ns)
        self._evaluations, self._start_ns, self._done = [], end_ns, False
        self._feed.changed()


def _flags(evaluations: Sequence[Evaluation]) -> int:
    cached = any(e.cached or (e.end is not None and e.forwards == 0) for e in evaluations)
    uncond = any(e.uncond_rows for e in evaluations)
    forecast = not any(e.cond_rows or e.uncond_rows for e in evaluations)
    return (_CACHED if cached else 0) | (_WITH_UNCOND if uncond else 0) | (_FORECAST if forecast else 0)


class _Pump:
    """Sends what feeds have to say on the server's loop, one message an interval, the feeds in turn."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self._queue: deque[LiveFeed] = deque()
        self._timer: Any = None
        self._last = -INTERVAL_S

    def ask(self, feed: LiveFeed) -> None:
        """Put a feed into the queue, from any thread."""
        try:
            self.server.loop.call_soon_threadsafe(self._arrive, feed)
        except Exception as error:  # a loop that was closed meanwhile, say; the run goes on without a live chart
            _warn_once(error)

    def _arrive(self, feed: LiveFeed) -> None:
        self._queue.append(feed)
        if self._timer is None:
            self._plan()

    def _plan(self) -> None:
        loop = self.server.loop
        self._timer = loop.call_later(max(0.0, self._last + INTERVAL_S - loop.time()), self._send)

    def _send(self) -> None:
        self._timer, feed = None, self._queue.popleft()
        # Lowered first: what changes while the message is built raises it again, so the last state is never lost.
        feed.waiting = False
        try:
            message = feed.message()
            self.server.send_sync(EVENT, message, feed.client_id)
        except Exception as error:
            _warn_once(error)
        # Of the sending, not of its beginning: a message that took long to build would be followed too soon.
        self._last = self.server.loop.time()
        if self._queue:
            self._plan()


_pumps: dict[int, _Pump] = {}


def _pump_of(server: Any) -> _Pump:
    pump = _pumps.get(id(server))
    if pump is None or pump.server is not server:
        pump = _pumps[id(server)] = _Pump(server)
    return pump


def _warn_once(error: BaseException) -> None:
    global _warned
    if not _warned:
        _warned = True
        log.warning("SpeedLab: the live chart cannot be fed: %s. Runs are not affected.", first_line(error))

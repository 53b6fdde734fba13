"""Which of several ways to compute the same thing is fastest here: least time of each, measured in turns.

Work that is done once and that no repeat pays again, reported to what measures the work around it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import first_line
from .torch_private import compile_callbacks, is_dynamo_loaded

# Another way must beat the usual one by this factor: two that are equally fast must not change places by chance, for
# then the same seed would give images that differ in the last bits.
MARGIN = 0.85
_HOPELESS = 2.0


def least_seconds(
    ways: Mapping[str, Callable[[], object]],
    *,
    rounds: tuple[int, int] = (5, 5),
    budget_s: float = 0.0,
    may_fail: Collection[str] = (),
    may_be_dropped: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The least seconds that each of `ways` took, in turns, so that a busy moment hits all alike.

    A first turn, which loads kernels and allocates, does not count. `rounds` is the least and the most number of turns:
    past the least, turns end with `budget_s`. Of `may_fail`, a way that raises RuntimeError is left out. Of
    `may_be_dropped`, one that takes twice as long as the best gets no further turn.
    """
    running = dict(ways)
    for name, run in ways.items():
        try:
            run()
        except RuntimeError as error:
            if name not in may_fail:
                raise
            logging.debug("%s is no candidate: %s", name, first_line(error))
            del running[name]
    best = dict.fromkeys(running, float("inf"))
    least, most = rounds
    began = clock()
    for turn in range(most):
        for name, run in running.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
        limit = _HOPELESS * min(best.values(), default=0.0)
        running = {name: run for name, run in running.items() if name not in may_be_dropped or best[name] <= limit}
        if not running or (may_be_dropped and len(running) < 2) or (turn + 1 >= least and clock() - began > budget_s):
            break
    return best


M = TypeVar("M")


class _Watches(threading.local):
    """Who measures in this thread, and how deep this thread is in work that is done once."""

    def __init__(self) -> None:
        self.open: list[tuple[Callable[[], Any], list[tuple[Any, Any]]]] = []
        self.depth = 0
        self.begun: list[tuple[Callable[[], Any], list[tuple[Any, Any]], Any]] = []
        # What the user was told of under the outermost watch, the seconds of such work so far, and when it began anew.
        self.what = ""
        self.seconds = 0.0
        self.since = 0.0


_watches = _Watches()

# Gets what is done, the seconds of it so far, and whether all of it is over.
Tell = Callable[[str, float, bool], None]


@dataclass
class _Listener:
    """Who tells the user of work that can take minutes: none, until a server registers."""

    tell: Tell = lambda *_: None


_listener = _Listener()


def tell_of_work_through(tell: Tell) -> None:
    """Have `tell` called when work of `apart` begins during a measurement, and when all of it is over."""
    _listener.tell = tell


@contextmanager
def apart(what: str = "Compiling") -> Iterator[None]:
    """Around work that no repeat does again, which stands apart in a record: compiling, tracing, timing of ways."""
    _begin(what)
    try:
        yield
    finally:
        _end()


@contextmanager
def watching(mark: Callable[[], M], spans: list[tuple[M, M]]) -> Iterator[None]:
    """Gather in `spans` when work of `apart`, and torch.compile's, began and ended in this thread, as `mark` says."""
    watch = (mark, spans)
    if not _watches.open:
        _watches.depth, _watches.begun = 0, []
        _watches.what, _watches.seconds = "", 0.0
    _watches.open.append(watch)
    watch_dynamo()
    try:
        yield
    finally:
        _watches.open.remove(watch)
        if not _watches.open and _watches.what:
            _listener.tell(_watches.what, _watches.seconds, True)


def watch_dynamo() -> None:
    """Have torch.compile, which compiles in the middle of a call, tell when it does; where it is in use at all."""
    handler = compile_callbacks()
    # `torch._dynamo.reset` forgets them.
    if handler is not None and _dynamo_begins not in handler.start_callbacks:
        handler.register_start_callback(_dynamo_begins)
        handler.register_end_callback(_end)


def tells_of_dynamo() -> bool:
    """Whether this PyTorch tells when torch.compile compiles, or nothing was compiled with it yet."""
    return not is_dynamo_loaded() or compile_callbacks() is not None


def _dynamo_begins(*_: Any) -> None:
    _begin("Compiling")


def _begin(what: str) -> None:
    _watches.depth += 1
    if _watches.depth == 1:
        if _watches.open:
            if what != _watches.what:
                _listener.tell(what, _watches.seconds, False)
            _watches.what, _watches.since = what, time.perf_counter()
        _watches.begun = [(mark, spans, mark()) for mark, spans in _watches.open]


def _end(*_: Any) -> None:
    _watches.depth = max(_watches.depth - 1, 0)
    if _watches.depth == 0:
        if _watches.open:
            _watches.seconds += time.perf_counter() - _watches.since
        begun, _watches.begun = _watches.begun, []
        for mark, spans, start in begun:
            spans.append((start, mark()))

"""Which of several ways to compute the same thing is fastest here: least time of each, measured in turns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping

from .errors import first_line

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

"""Work that no repeat does again stands apart: not in a step, a sampling or a phase, and nowhere twice."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest

from speedlab.common import timing
from speedlab.measure import trace as traces
from speedlab.measure.clock import Mark
from speedlab.measure.timeline import measured


class Clock:
    """Marks a second apart, and a device that is a tenth of a second behind the host."""

    has_device_time = True
    is_synchronised = True

    def __init__(self):
        self._now = count()

    def mark(self):
        now = next(self._now)
        return Mark(now * 10**9, event=1000.0 * now + 100.0)

    def settle(self):
        pass

    def device_ms(self, start, end):
        return end.event - start.event


class Sigma:
    """A noise level that is read without a device."""

    def __init__(self, value):
        self.value = value


class Emitter:
    def push(self, *_):
        pass

    def pop(self):
        pass


@pytest.fixture
def run(monkeypatch):
    """A run of two steps on a clock of whole seconds; `work` names the evaluation in which something is compiled."""
    monkeypatch.setattr(traces, "_host_sigmas", lambda evaluations: [e.sigma.value for e in evaluations])

    def sample(work):
        trace = traces.SamplingTrace(Clock(), Emitter())
        with timing.watching(trace.clock.mark, trace.apart):
            trace.called = trace.clock.mark()
            trace.begin([2.0, 1.0, 0.0])
            for index, sigma in enumerate((2.0, 1.0)):
                with trace.evaluation(Sigma(sigma)):
                    for _ in range(work.get(index, 0)):
                        with timing.apart(), timing.apart():
                            trace.clock.mark()  # a second of work that takes no part in anything
                trace.step_done(index)
            trace.finish()
            trace.returned = trace.clock.mark()
        return trace

    return sample


@pytest.mark.parametrize("work", [{}, {0: 1}, {0: 3, 1: 1}])
def test_steps_sampling_and_rest_are_those_of_a_repeat(run, work):
    trace, repeat = run(work), run({})
    # Each piece of work takes the marks around it as well.
    marks = sum(work.values())
    assert traces.compile_ms(trace) == 2000.0 * marks
    for one, other in zip(traces.step_rows(trace), traces.step_rows(repeat), strict=True):
        told = 1000.0 * work.get(one.index, 0)  # the mark at which each piece of work begins is the run's own
        assert (one.cpu_ms, one.gpu_ms) == (other.cpu_ms + told, other.gpu_ms + told)
    sampling = traces.sampling_ms(trace)
    assert sampling == sum(row.ms for row in traces.step_rows(trace))
    whole = (trace.returned.host_ns - trace.called.host_ns) / 1e6
    assert sampling + traces.around_ms(trace) + traces.compile_ms(trace) == whole
    assert traces.first_eval_ms(trace) == traces.first_eval_ms(repeat) + 3000.0 * work.get(0, 0)


def test_a_block_tells_its_work_apart_once():
    start = time.perf_counter()
    with measured("decode") as block, timing.apart(), timing.apart():
        threading.Event().wait(0.02)
    assert block.apart_ms >= 20.0
    assert 0.0 < block.ms <= 1000.0 * (time.perf_counter() - start) - block.apart_ms


def test_only_this_threads_work_counts():
    spans = []
    with timing.watching(lambda: 0, spans):
        other = threading.Thread(target=_work)
        other.start()
        other.join()
        assert not spans
        _work()
    _work()
    assert spans == [(0, 0)]


def test_work_that_fails_is_closed():
    spans = []
    with timing.watching(lambda: 0, spans):
        with pytest.raises(ValueError, match="no such program"), timing.apart():
            raise ValueError("no such program")
        _work()
    assert spans == [(0, 0), (0, 0)]


def _work():
    with timing.apart():
        pass


def test_the_user_is_told_of_work_once_at_its_beginning_and_once_when_it_is_over(monkeypatch):
    told = []
    monkeypatch.setattr(timing._listener, "tell", lambda *words: told.append(words))
    with timing.apart():
        pass
    assert told == [], "nobody measures, so that no node stands for it"
    with timing.watching(time.perf_counter, []), timing.watching(time.perf_counter, []):
        for _ in range(3):
            with timing.apart(), timing.apart():
                pass
        with timing.apart("Timing"):
            time.sleep(0.01)
        assert [(what, done) for what, _, done in told] == [("Compiling", False), ("Timing", False)]
    assert [(what, done) for what, _, done in told[2:]] == [("Timing", True)]
    assert told[2][1] >= 0.01
    with timing.watching(time.perf_counter, []):
        pass
    assert len(told) == 3, "where nothing was done there is nothing to tell"


def test_another_threads_work_is_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(timing._listener, "tell", lambda *words: told.append(words))

    def work():
        with timing.apart():
            pass

    with timing.watching(time.perf_counter, []):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert told == []

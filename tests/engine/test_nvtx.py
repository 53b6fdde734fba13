"""NVTX: fixed names, numbers in payloads, ranges closed whatever happens."""

from __future__ import annotations

import pytest

from speedlab.measure import nvtx


class Recording:
    """An emitter that keeps what it is told."""

    def __init__(self):
        self.calls = []
        self.depth = 0

    def push(self, name, payload=None):
        self.calls.append((name, payload))
        self.depth += 1

    def pop(self):
        self.depth -= 1


def test_a_range_is_popped_when_its_block_fails():
    out = Recording()
    with pytest.raises(RuntimeError), nvtx.nvtx_range(out, nvtx.LOAD):
        raise RuntimeError
    assert out.depth == 0


def test_the_real_emitter_takes_every_name_and_refuses_others():
    emitter = nvtx.emitter()
    for name in nvtx.NAMES:
        emitter.push(name, 3)
        emitter.pop()
    if isinstance(emitter, nvtx.NvtxEmitter):
        with pytest.raises(ValueError, match="sl/step"):
            emitter.push("step 17")


def test_switched_off_it_emits_nothing():
    assert isinstance(nvtx.emitter(False), nvtx.NullEmitter)


def test_names_do_not_grow_with_steps():
    from speedlab.measure.clock import HostClock
    from speedlab.measure.trace import SamplingTrace

    def names(steps: int) -> tuple[set[str], int]:
        pushed = []

        class Counting(Recording):
            def push(self, name, payload=None):
                pushed.append(name)
                super().push(name, payload)

        out = Counting()
        trace = SamplingTrace(HostClock("cpu"), out)
        trace.begin([float(n) for n in range(steps, -1, -1)])
        for step in range(steps):
            with trace.evaluation(None), trace.forward((0, 1), 2):
                pass
            trace.step_done(step)
        trace.finish()
        assert out.depth == 0
        return set(pushed), len(pushed)

    (few, count), (many, larger) = names(2), names(200)
    assert few == many <= set(nvtx.NAMES)
    assert (count, larger) == (1 + 3 * 2, 1 + 3 * 200)

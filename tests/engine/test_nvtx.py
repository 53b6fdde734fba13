"""NVTX: fixed names, numbers in payloads, ranges closed whatever happens."""

from __future__ import annotations

import pytest

from speedlab.profiling import nvtx


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

"""Precision's `memory` where users have it: in the thread in which a ComfyUI on a CPU samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedlab.techniques.cpu.host_allocator import why_not_reused

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(bool(why_not_reused()), reason=why_not_reused() or "glibc is there"),
]
seeds = itertools.count(1)
# In each step some layers make blocks of 84 MB, 20,480 pages of 4 KB each.
SIZE, STEPS = 512, 2
BLOCK_PAGES = (80 << 20) // 4096


def minor_faults(server: Any) -> int:
    """Page faults of the whole server so far that read no disk (proc(5))."""
    text = Path(f"/proc/{server.server.process.pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[7])


@pytest.fixture
def faults(graph: Callable[..., dict[str, Any]]) -> Callable[..., tuple[int, list[str]]]:
    """Page faults of one prompt, and the warnings of its record."""

    def count(server: Any, memory: str, steps: int = STEPS) -> tuple[int, list[str]]:
        prompt = graph(size=SIZE, seed=next(seeds), steps=steps)
        del prompt["6"], prompt["8"], prompt["7"]["inputs"]["images"]
        settings = ("tf32", "cudnn_tf32", "cudnn_benchmark", "fp16_accumulation", "memory_format")
        prompt["9"] = {"class_type": "SpeedLabPrecision", "inputs": {
            "model": ["1", 0], **dict.fromkeys(settings, "keep"), "autocast": "off", "memory": memory}}  # fmt: skip
        prompt["5"]["inputs"]["model"] = ["9", 0]
        before = minor_faults(server)
        entry = server.run(prompt)
        counted = minor_faults(server) - before
        assert entry["status"]["status_str"] == "success", entry["status"]
        return counted, server.record(entry["outputs"]["7"]["speedlab"][0]["run_id"])["warnings"]

    return count


@pytest.mark.full
def test_large_blocks_are_kept_in_the_thread_that_samples(
    server: Any, start_server: Callable[..., Any], faults: Callable[..., tuple[int, list[str]]]
) -> None:
    faults(server, "keep", steps=1)
    plain, _ = faults(server, "keep")
    kept, warnings = faults(server, "reuse")
    # One server whose sampling thread has an arena of its own, which keeps what is smaller.
    other = start_server(env={"MALLOC_ARENA_MAX": "8"})
    faults(other, "keep", steps=1)
    smaller_kept, told = faults(other, "reuse")
    counted = f"page faults: {plain} without, {kept} with memory=reuse, {smaller_kept} in an arena of its own"
    assert not [text for text in warnings if "64 MB" in text]
    assert [text for text in told if "memory keeps blocks of up to 64 MB only" in text and "MALLOC_ARENA_MAX=1" in text]
    pages_are_small = smaller_kept > STEPS * BLOCK_PAGES  # with pages of 2 MB there are few faults either way
    assert not pages_are_small or kept < smaller_kept / 2, counted
    assert kept <= plain, counted

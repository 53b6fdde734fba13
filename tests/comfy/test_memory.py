"""Memory peaks: of a phase, of what runs between phases, and overall."""

from __future__ import annotations

import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process reset its own peak")
def test_a_peak_that_is_gone_again_is_still_seen(engine):
    import mmap

    memory = engine("profiling.memory")
    with memory.measure_peak("cpu") as quiet:
        pass
    # Fresh pages: an allocator may hand out memory that is resident already, and then nothing grows.
    with memory.measure_peak("cpu") as busy, mmap.mmap(-1, 240_000_000) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    with memory.measure_peak("cpu") as after:
        pass
    assert busy.peak.rss - quiet.peak.rss > 200_000_000
    assert after.peak.rss < busy.peak.rss - 200_000_000
    assert after.before.rss == pytest.approx(busy.peak.rss, rel=0.05)
    assert busy.peak.allocated is None


def test_merging_keeps_the_larger_and_what_is_known(engine):
    memory_peak = engine("profiling.memory").MemoryPeak
    merged = memory_peak(1, None, 5, None).merged(memory_peak(3, None, 2, 7))
    assert merged == memory_peak(3, None, 5, 7)


def test_what_core_nodes_use_between_counts_for_the_overall_peak(engine, monkeypatch):
    timeline, runner = engine("profiling.timeline"), engine("profiling.runner")
    memory_peak = engine("profiling.memory").MemoryPeak
    now = timeline.Executing("a prompt of this test", "9")
    monkeypatch.setattr(timeline, "executing", lambda: now)
    timeline.note_between(memory_peak(rss=99_000_000_000))
    assert timeline.entries(now.prompt_id) == (), "what ran before the prompt's first block is none of its business"
    timeline.note(timeline.PhaseEntry("load", "1", 5.0, memory_peak(rss=1_000_000_000)))
    timeline.note_between(memory_peak(rss=4_000_000_000))
    entries = timeline.entries(now.prompt_id)
    memory = runner._memory(entries, entries, memory_peak(rss=2_000_000_000))
    assert memory["overall"]["peak_rss_gb"] == 4.0
    assert memory["load"]["peak_rss_gb"] == 1.0
    assert memory["sample"]["peak_rss_gb"] == 2.0
    assert "between" not in memory


def test_old_prompts_are_forgotten(engine, monkeypatch):
    timeline = engine("profiling.timeline")
    memory_peak = engine("profiling.memory").MemoryPeak
    for number in range(100):
        monkeypatch.setattr(timeline, "executing", lambda number=number: timeline.Executing(f"old {number}", "1"))
        timeline.note(timeline.PhaseEntry("load", "1", 1.0, memory_peak()))
    assert timeline.entries("old 0") == ()
    assert len(timeline.entries("old 99")) == 1
    assert timeline.entries(None) == ()

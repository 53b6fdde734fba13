"""Memory peaks: of a phase, of what runs between phases, and overall."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process reset its own peak")
def test_a_peak_that_is_gone_again_is_still_seen(engine):
    import mmap

    memory = engine("measure.peaks")
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
    memory_peak = engine("measure.peaks").MemoryPeak
    merged = memory_peak(1, None, 5, None).merged(memory_peak(3, None, 2, 7))
    assert merged == memory_peak(3, None, 5, 7)


class PagedPatcher:
    """The part of ComfyUI's ModelPatcherDynamic that tells what is loaded: pages, and weights in PyTorch's memory."""

    def __init__(self, device, pages, in_torch, dynamic=True):
        self.load_device, self.pages, self.dynamic = device, pages, dynamic
        self.model = SimpleNamespace(model_loaded_weight_memory=in_torch)

    def is_dynamic(self):
        return self.dynamic

    def loaded_size(self):
        return self.pages + self.model.model_loaded_weight_memory


def test_pages_that_pytorch_does_not_count_are_in_the_peaks(engine, comfy, monkeypatch):
    import torch

    memory, record = engine("measure.peaks"), engine("measure.record")
    management = importlib.import_module("comfy.model_management")
    card, other = torch.device("cuda", 0), torch.device("cuda", 1)
    unet = PagedPatcher(card, 3_000_000_000, 500_000_000)
    clone = PagedPatcher(card, 3_000_000_000, 0)
    clone.model = unet.model
    elsewhere, plain = PagedPatcher(other, 9_000_000_000, 0), PagedPatcher(card, 0, 7_000_000_000, dynamic=False)
    loaded = [SimpleNamespace(model=m) for m in (unet, clone, elsewhere, plain, None)]
    monkeypatch.setattr(management, "current_loaded_models", loaded)
    counters = SimpleNamespace(
        max_memory_allocated=lambda device: 2_000_000_000, max_memory_reserved=lambda device: 2_500_000_000,
        reset_peak_memory_stats=lambda device: None, mem_get_info=lambda device: (1, 8_000_000_001),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(memory, "_cuda_for", lambda device: counters)
    with memory.measure_peak(card) as reading:
        unet.pages = clone.pages = 1_000_000_000
    told = record.memory_dict(reading.peak)
    assert told["outside_torch_gb"] == 3.0, "the pages that were there at the start and went"
    assert (told["peak_allocated_gb"], told["peak_reserved_gb"], told["device_used_gb"]) == (5.0, 5.5, 8.0)
    with memory.measure_peak("cuda") as reading:
        pass
    assert record.memory_dict(reading.peak)["peak_allocated_gb"] == 3.0


def test_a_patcher_of_this_comfyui_has_no_pages_that_are_not_its_own(engine, tiny):
    assert engine("measure.peaks").paged_bytes(tiny.model) == 0


@pytest.mark.parametrize(("module", "told"), [({"aimdo_enabled": True}, True), ({"aimdo_enabled": False}, False),
                                              ({}, None), (None, None)])  # fmt: skip
def test_the_record_says_whether_weights_are_paged(engine, comfy, monkeypatch, module, told):
    import torch

    made = None if module is None else ModuleType("comfy.memory_management")
    if made is not None:
        vars(made).update(module)
        monkeypatch.setattr(importlib.import_module("comfy"), "memory_management", made, raising=False)
    monkeypatch.setitem(sys.modules, "comfy.memory_management", made)
    env = engine("measure.environment").environment(torch.device("cpu"))
    assert env["dynamic_vram"] is told and "allocator" in env


def test_what_core_nodes_use_between_counts_for_the_overall_peak(engine, monkeypatch):
    timeline, runner = engine("measure.timeline"), engine("sampling.run_record")
    memory_peak = engine("measure.peaks").MemoryPeak
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
    timeline = engine("measure.timeline")
    memory_peak = engine("measure.peaks").MemoryPeak
    for number in range(100):
        monkeypatch.setattr(timeline, "executing", lambda number=number: timeline.Executing(f"old {number}", "1"))
        timeline.note(timeline.PhaseEntry("load", "1", 1.0, memory_peak()))
    assert timeline.entries("old 0") == ()
    assert len(timeline.entries("old 99")) == 1
    assert timeline.entries(None) == ()

"""Memory peaks of a phase: the device allocator's counters, and the process's resident set.

Where ComfyUI keeps weights in pages of its own (dynamic VRAM), PyTorch's counters do not see them: what its models hold
there is added to the peaks, and kept apart as `outside`. Pages stay until others need their room, so their most is
taken from the two ends of a block.

Sizes are bytes here; the record turns them into GB of 10^9 bytes. A number that the platform does not have is None.

What a cell adds to the memory of the process. Its peak would tell of all cells, whose weights are there in turn.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryPeak:
    """Peaks over a span of time, in bytes. `allocated` and `reserved` hold `outside`, what PyTorch does not count.

    `device_used` is what the driver calls used, by all processes, at the ends of the span.
    """

    allocated: int | None = None
    reserved: int | None = None
    rss: int | None = None
    device_used: int | None = None
    outside: int | None = None

    def merged(self, other: MemoryPeak) -> MemoryPeak:
        """The peak over both spans."""
        return MemoryPeak(
            *(
                _largest(getattr(self, name), getattr(other, name))
                for name in ("allocated", "reserved", "rss", "device_used", "outside")
            )
        )


class PeakReading:
    """`before`: the peak between the last measured block and this one; `peak`: filled when this one ends.

    `part` gives the peak since its last call and begins anew; it waits for nothing, and costs some ten microseconds.
    The process's peak is in it only where it can be reset.
    """

    before: MemoryPeak = MemoryPeak()
    peak: MemoryPeak = MemoryPeak()
    part: Callable[[], MemoryPeak] = MemoryPeak


@contextmanager
def measure_peak(device: Any) -> Iterator[PeakReading]:
    """Measure the peaks of a block on `device`; the device's peak counters are reset at its start."""
    reading = PeakReading()
    cuda = _cuda_for(device)
    at_start = _outside_of(cuda, device)
    reading.before = _read(cuda, device, rss_peak_bytes(), at_start)
    if cuda is not None:
        cuda.reset_peak_memory_stats(device)
    resettable = _reset_rss_peak()
    start = rss_bytes()
    if not resettable:
        reading.before = replace(reading.before, rss=start)
    so_far = MemoryPeak()

    def part() -> MemoryPeak:
        nonlocal so_far
        allocated, reserved = _torch_peaks(cuda, device)
        outside = _outside_of(cuda, device)
        now = MemoryPeak(_sum(allocated, outside), _sum(reserved, outside), rss_peak_bytes() if resettable else None)
        so_far = so_far.merged(replace(now, outside=outside))
        if cuda is not None:
            cuda.reset_peak_memory_stats(device)
        if resettable:
            _reset_rss_peak()
        return now

    reading.part = part
    try:
        yield reading
    finally:
        rss = rss_peak_bytes() if resettable else _largest(start, rss_bytes())
        outside = _largest(at_start, _outside_of(cuda, device))
        peak = _read(cuda, device, rss, outside).merged(so_far)
        reading.peak = replace(peak, device_used=_largest(reading.before.device_used, peak.device_used))


def _read(cuda: Any | None, device: Any, rss: int | None, outside: int | None) -> MemoryPeak:
    return MemoryPeak(
        allocated=cuda.max_memory_allocated(device) + (outside or 0) if cuda else None,
        reserved=cuda.max_memory_reserved(device) + (outside or 0) if cuda else None,
        rss=rss,
        device_used=_device_used(cuda, device),
        outside=outside,
    )


def _torch_peaks(cuda: Any | None, device: Any) -> tuple[int | None, int | None]:
    """Peaks of allocated and reserved bytes since the last reset, without the flat table of all counters."""
    if cuda is None:
        return None, None
    counted = cuda.memory_stats_as_nested_dict(device)
    names = ("allocated_bytes", "reserved_bytes")
    allocated, reserved = (counted.get(name, {}).get("all", {}).get("peak", 0) for name in names)
    return int(allocated), int(reserved)


def _sum(value: int | None, more: int | None) -> int | None:
    return None if value is None else value + (more or 0)


def _outside_of(cuda: Any | None, device: Any) -> int | None:
    """Bytes of weights that ComfyUI's loaded models keep on `device` outside of PyTorch's allocator."""
    mm = sys.modules.get("comfy.model_management")
    if cuda is None or mm is None:
        return None
    import torch

    models = (loaded.model for loaded in mm.current_loaded_models)
    # One network may be loaded by several patchers; its pages are there once.
    held = {id(m.model): paged_bytes(m) for m in models if m is not None and _is_on(torch, m.load_device, device)}
    return sum(held.values())


def _is_on(torch: Any, place: Any, device: Any) -> bool:
    """Whether both are one GPU; `cuda` without a number is the current one."""
    a, b = torch.device(place), torch.device(device)
    if a.type != b.type:
        return False
    current = torch.cuda.current_device()
    return bool((current if a.index is None else a.index) == (current if b.index is None else b.index))


def paged_bytes(patcher: Any) -> int:
    """Of the weights that a patcher has loaded those in pages of ComfyUI's own; none where its patchers have no pages.

    Its `loaded_size` also holds what lies in PyTorch's memory, which the network itself tells.
    """
    is_dynamic = getattr(patcher, "is_dynamic", None)
    if is_dynamic is None or not is_dynamic():
        return 0
    counted = getattr(patcher.model, "model_loaded_weight_memory", 0)
    return max(int(patcher.loaded_size()) - int(counted), 0)


def rss_bytes() -> int | None:
    """Resident set of this process now."""
    value = _status_field("VmRSS")
    if value is not None:
        return value
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def rss_peak_bytes() -> int | None:
    """Largest resident set since the last reset (Linux), else since the process started."""
    value = _status_field("VmHWM")
    if value is not None:
        return value
    try:
        import psutil

        info = psutil.Process().memory_info()
    except ImportError:
        return None
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def rss_to_grow_from() -> int | None:
    """Resident set now, for a peak to be held against; None where the peak cannot be reset, so that it says nothing."""
    return rss_bytes() if _reset_rss_peak() else None


def _reset_rss_peak() -> bool:
    """Linux keeps a high-water mark that a process may reset for itself; elsewhere boundaries have to do."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_field(name: str) -> int | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _cuda_for(device: Any) -> Any | None:
    if getattr(device, "type", str(device)) != "cuda":
        return None
    import torch

    return torch.cuda


def _device_used(cuda: Any | None, device: Any) -> int | None:
    if cuda is None:
        return None
    free, total = cuda.mem_get_info(device)
    return int(total - free)


def _largest(a: int | None, b: int | None) -> int | None:
    known = [value for value in (a, b) if value is not None]
    return max(known) if known else None


RSS, GROWTH = "peak_rss_gb", "rss_growth_gb"
Memory = Mapping[str, Mapping[str, Any]]


def growth_gb(start: int | None, peaks: Sequence[MemoryPeak], sampling: Mapping[str, Any]) -> float | None:
    """How far the resident set rose over `start` bytes in the blocks of one run; None where no peak can be measured.

    Less than the run needs where it reuses what an earlier one gave back and the process kept.
    """
    if start is None:
        return None
    known = [peak.rss / 1e9 for peak in peaks if peak.rss is not None]
    known += [float(sampling[RSS])] if sampling.get(RSS) is not None else []
    return round(max(max(known) - start / 1e9, 0.0), 4) if known else None


def with_growth(memory: Memory, growths: Sequence[float | None]) -> dict[str, Mapping[str, Any]]:
    """A cell's memory with its largest growth in place of the process's peak, which stays with each phase."""
    known = [growth for growth in growths if growth is not None]
    overall = {**memory.get("overall", {}), RSS: None, GROWTH: max(known, default=None)}
    return {**memory, "overall": overall}

"""Clocks for one run: CUDA event pairs read after one synchronisation, or the host's monotonic clock.

Un-synchronised host timers on a GPU measure how fast kernels are queued, not how fast they run. Events cost
microseconds and never stall the queue.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Mark:
    """A moment: host nanoseconds, and a recorded device event where the device has a queue of its own."""

    host_ns: int
    event: Any = None


class Clock(Protocol):
    """Marks moments during a run and tells distances in milliseconds after `settle`."""

    has_device_time: bool
    is_synchronised: bool
    """Whether marks and `settle` wait for the device, so that times are of work done and not of work queued."""

    def mark(self) -> Mark: ...

    def settle(self) -> None: ...

    def device_ms(self, start: Mark, end: Mark) -> float | None: ...


def host_ms(start: Mark, end: Mark) -> float:
    """Host time between two marks, in milliseconds."""
    return (end.host_ns - start.host_ns) / 1e6


class HostClock:
    """perf_counter; on a device with a queue but without timing events it drains the queue at every mark."""

    has_device_time = False

    def __init__(self, device: Any) -> None:
        self._device = device
        self.is_synchronised = can_synchronize(device)

    def mark(self) -> Mark:
        synchronize(self._device)
        return Mark(time.perf_counter_ns())

    def settle(self) -> None:
        synchronize(self._device)

    def device_ms(self, start: Mark, end: Mark) -> float | None:
        return None


class CudaClock:
    """CUDA (and ROCm) events on the current stream; nothing waits until `settle`."""

    has_device_time = True
    is_synchronised = True

    def __init__(self, device: Any) -> None:
        self._device = device

    def mark(self) -> Mark:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return Mark(time.perf_counter_ns(), event)

    def settle(self) -> None:
        synchronize(self._device)

    def device_ms(self, start: Mark, end: Mark) -> float | None:
        return float(start.event.elapsed_time(end.event))


def clock_for(device: Any) -> Clock:
    """The best clock for a torch device."""
    return CudaClock(device) if getattr(device, "type", str(device)) == "cuda" else HostClock(device)


def can_synchronize(device: Any) -> bool:
    """Whether `synchronize` waits for what this device was given. A CPU has done it when a call returns."""
    kind = getattr(device, "type", str(device))
    if kind == "cpu":
        return True
    import torch

    return hasattr(getattr(torch, kind, None), "synchronize")


def synchronize(device: Any) -> None:
    """Wait until the device's queue is empty; returns at once on a CPU, and where nothing can wait for the device."""
    kind = getattr(device, "type", str(device))
    if kind == "cpu" or not can_synchronize(device):
        return
    import torch

    backend = getattr(torch, kind)
    if kind == "mps":
        backend.synchronize()
    else:
        backend.synchronize(device)

"""How much of what the device can do a run used: operations a second against a measured peak."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.dtypes import short_name
from .clock import synchronize
from .environment import speed_flags
from .flops import FlopCount
from .trace import Evaluation

_SIDE = {"cpu": 1024}
_SIDE_ELSEWHERE = 4096
_SECONDS = 0.25
_FEWEST, _MOST = 3, 100
_AT_ONCE = 8
_peaks: dict[tuple[Any, ...], Peak] = {}


@dataclass(frozen=True)
class Peak:
    """The fastest matrix product that was seen here; `tflops` are 10^12 operations a second."""

    name: str
    tflops: float


def measured_peak(device: Any, dtype: Any, side: int | None = None) -> Peak:
    """A large square matrix product on `device` in `dtype`, timed for a quarter of a second; once per process.

    Flags that change its speed (TF32, fp16 accumulation) are those of this moment and part of what is remembered.
    `side` of the matrices: None for one that is large enough and fits any GPU.
    """
    import torch

    side = _SIDE.get(device.type, _SIDE_ELSEWHERE) if side is None else side
    flags = speed_flags()
    key = (str(device), side, dtype, *flags.values())
    if key not in _peaks:
        tf32 = bool(flags["tf32_matmul"]) and device.type == "cuda" and dtype == torch.float32
        _peaks[key] = _measure(device, dtype, side, tf32)
    return _peaks[key]


def share_of_peak(tflops: float, peak_tflops: float) -> float | None:
    """Percent of a peak; None where it would be over 100, since then the peak is none."""
    share = 100.0 * tflops / peak_tflops if peak_tflops > 0 else None
    return share if share is not None and share <= 100.0 else None


def _measure(device: Any, dtype: Any, side: int, tf32: bool) -> Peak:
    import comfy.model_management as mm
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    # One product takes a fast GPU less than a millisecond, of which the start and the waiting would be a part.
    at_once = 1 if device.type == "cpu" else _AT_ONCE
    best, spent, rounds = float("inf"), 0.0, -1
    while rounds < _FEWEST or (spent < _SECONDS and rounds < _MOST):
        mm.throw_exception_if_processing_interrupted()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(at_once):
            torch.mm(a, b, out=out)
        synchronize(device)
        seconds = (time.perf_counter() - start) / at_once
        rounds += 1
        if rounds > 0:  # the first one also sets the library up
            best, spent = min(best, seconds), spent + at_once * seconds
    name = "tf32" if tf32 else short_name(dtype)
    return Peak(f"measured: {name} matrix product {side}x{side}", 2.0 * side**3 / best / 1e12)


def roofline(
    count: FlopCount, evaluations: Sequence[Evaluation], steps: int, timed_ms: float, peak: Peak | None
) -> dict[str, Any] | None:
    """The record's `roofline` of the steps that `evaluations` belong to, with their time in the timed run.

    A forward is that of the first evaluation which ran the whole network. None where nothing could be counted.
    """
    total = count.total(evaluations)
    if total <= 0 or not steps:
        return None
    whole = next((e for e in evaluations if e.forwards and not e.cached), None)
    rate = total / timed_ms / 1e9 if timed_ms > 0 else None
    share = share_of_peak(rate, peak.tflops) if rate is not None and peak is not None else None
    return {
        "flop_per_forward": None if whole is None else count.total([whole]) // whole.forwards,
        "rows_per_forward": None if whole is None else (whole.cond_rows + whole.uncond_rows) / whole.forwards,
        "flop_per_step": total / steps,
        "tflops": rate,
        "peak": None if peak is None else {"name": peak.name, "tflops": peak.tflops},
        "peak_share": share,
    }

"""Pictures of several arms, in turns with stock, so that drift of the card hits them alike."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from speedlab.measure.roofline import share_of_peak

from .bench import Bench
from .models import release
from .plan import STOCK, Arm, Block
from .run import Ready, Shot, shoot

log = logging.getLogger(__name__)

# With so many pictures a row is worth keeping where time ends before all of them.
_ENOUGH = 3


@dataclass
class Lane:
    """One arm of a block and the pictures made of it."""

    arm: Arm
    ready: Ready | None = None
    first: Shot | None = None
    shots: list[Shot] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether nothing has gone wrong with it."""
        return self.first is not None

    def median(self, phase: str) -> float:
        """Median seconds of a phase."""
        return statistics.median(getattr(shot, phase) for shot in self.shots)


def run(bench: Bench, block: Block) -> None:
    """A row for each arm that has none: first picture, median of the others, memory, ratio to stock of these rounds."""
    pending = bench.pending(block)
    stock = [arm for arm in block.arms if arm.stack == STOCK and arm not in pending]
    lanes = [Lane(arm) for arm in (*stock, *pending)]
    bench.models.parts(block.model, block.dtype)  # before the card is made smaller
    with _card_of(block.cap_gb, bench.device):
        if block.apart:
            for lane in lanes:
                release()
                take_turns(bench, block, [lane])
                _write(bench, block, lane, _stock_of(lanes))
            release()
            return
        try:
            take_turns(bench, block, lanes)
        except BaseException:
            # Time is over, the device lost, or somebody stopped it: what has enough pictures counts.
            lanes = [lane for lane in lanes if len(lane.shots) >= _ENOUGH]
            raise
        finally:
            for lane in lanes:
                _write(bench, block, lane, _stock_of(lanes))


def take_turns(bench: Bench, block: Block, lanes: Sequence[Lane]) -> None:
    """The first picture of each lane, then rounds over those that run, forth and back."""
    scene = bench.scene(block)
    for lane in lanes:
        bench.check_time()
        with bench.into_row(block, lane.arm):
            lane.ready = bench.ready(block, lane.arm)
            lane.first = shoot(lane.ready, scene)
    # A failure takes weights off the device; the picture after it brings them back and must not count.
    failed = not all(lane.runs for lane in lanes)
    for number in range(bench.settings.repeats):
        for lane in lanes if number % 2 == 0 else reversed(lanes):
            bench.check_time()
            if lane.ready is None or not lane.runs:
                continue
            shot = None
            with bench.into_row(block, lane.arm):
                if failed:
                    shoot(lane.ready, scene)
                shot = shoot(lane.ready, scene)
            failed = shot is None
            if shot is None:
                lane.first = None
            else:
                lane.shots.append(shot)


def timed(lane: Lane, batch: int = 1) -> dict[str, Any]:
    """The fields of a row that its pictures give."""
    assert lane.first is not None
    totals = [shot.total_s for shot in lane.shots]
    picture = statistics.median(totals)
    peak = lane.shots[0].peak
    for shot in lane.shots[1:]:
        peak = peak.merged(shot.peak)
    bad = not all(shot.finite for shot in (lane.first, *lane.shots))
    return {
        "n": len(lane.shots),
        "first_s": _round(lane.first.total_s),
        "picture_s": _round(picture),
        "picture_min_s": _round(min(totals)),
        "picture_max_s": _round(max(totals)),
        "sampling_s": _round(lane.median("sampling_s")),
        "encode_s": _round(lane.median("encode_s")),
        "decode_s": _round(lane.median("decode_s")),
        "images_per_min": _round(60.0 * batch / picture, 2),
        "peak_allocated_gb": _gb(peak.allocated),
        "peak_reserved_gb": _gb(peak.reserved),
        "peak_rss_gb": _gb(peak.rss),
        "samples": [{name: round(getattr(shot, f"{name}_s"), 5) for name in _PHASES} for shot in lane.shots],
        "note": " ".join(dict.fromkeys(shot.note for shot in lane.shots if shot.note)),
        **({"status": "error", "error": "NaN or Inf in latents or pictures: the times mean nothing"} if bad else {}),
    }


_PHASES = ("encode", "sampling", "decode", "total")


def _stock_of(lanes: Sequence[Lane]) -> Lane | None:
    return next((lane for lane in lanes if lane.arm.stack == STOCK and lane.runs and lane.shots), None)


def _write(bench: Bench, block: Block, lane: Lane, stock: Lane | None) -> None:
    if not lane.runs or not lane.shots or block.row(lane.arm) in bench.journal.rows:
        return
    fields = {**timed(lane, bench.scene(block).batch), **_rates(bench, block, lane)}
    if stock is not None:
        fields |= {
            "ratio": _round(stock.median("total_s") / lane.median("total_s")),
            "sampling_ratio": _round(stock.median("sampling_s") / lane.median("sampling_s")),
            "relative_error": _relative_error(lane.shots[0].latent, stock.shots[0].latent),
        }
    bench.write(block, lane.arm, **fields)


def _rates(bench: Bench, block: Block, lane: Lane) -> dict[str, Any]:
    """Operations a second and their share of the measured peak, where each step is a whole forward."""
    flop = bench.journal.value(f"work-{block.model}/step", "flop_per_step")
    if flop is None or not lane.arm.whole:
        return {}
    rate = flop * bench.scene(block).steps / lane.median("sampling_s") / 1e12
    peak = bench.journal.value(f"peak/{block.dtype}", "tflops")
    share = share_of_peak(rate, peak) if peak else None
    if peak and share is None:
        log.warning("SpeedLab: %s ran above the measured peak, so no share of it is written.", block.row(lane.arm))
    return {"tflops": _round(rate, 3), "peak_share": None if share is None else _round(share, 2)}


def _relative_error(latent: Any, reference: Any) -> float | None:
    if latent.shape != reference.shape:
        return None
    return float(f"{float((latent - reference).norm() / reference.norm()):.3g}")


def _round(value: float, digits: int = 4) -> float:
    return round(value, digits)


def _gb(size: int | None) -> float | None:
    return None if size is None else round(size / 1e9, 3)


@contextmanager
def _card_of(gb: float | None, device: Any) -> Iterator[None]:
    """Make the card look as if it had `gb`: what `--reserve-vram` does, and an allocator that gives no more."""
    if gb is None:
        yield
        return
    import comfy.model_management as mm
    import torch

    on_cuda = device.type == "cuda"
    total = float(torch.cuda.mem_get_info(device)[1]) if on_cuda else 0.0
    before = mm.EXTRA_RESERVED_VRAM
    release()
    try:
        if on_cuda and total > gb * 1e9:
            mm.EXTRA_RESERVED_VRAM = total - gb * 1e9
            torch.cuda.set_per_process_memory_fraction(gb * 1e9 / total, device)
        yield
    finally:
        mm.EXTRA_RESERVED_VRAM = before
        if on_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

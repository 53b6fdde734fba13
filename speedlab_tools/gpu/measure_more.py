"""Batches until the card is full, and base and refiner together."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

from speedlab.common.core import core_nodes
from speedlab.measure.clock import synchronize
from speedlab.measure.context import NodeContext
from speedlab.measure.peaks import MemoryPeak, measure_peak
from speedlab.models import text as conditioning
from speedlab.plans.techniques import Parts
from speedlab.sampling.ensemble import EnsembleRequest, Expert, sample_ensemble
from speedlab.sampling.profiled import ProfileOptions

from .bench import Bench
from .measure_images import Lane, timed
from .models import release
from .plan import Arm, Block, Scene
from .run import shoot

_LARGEST, _LARGEST_SMALL = 64, 2
# A doubled batch that brings less than this is past saturation.
_GAIN = 1.03
_HANDOFF = 0.8


def batches(bench: Bench, block: Block) -> None:
    """Double the batch until throughput no longer grows or memory ends: a row each, and one that names the best."""
    for arm in bench.pending(block):
        size, best = 1, 0.0
        while size <= (_LARGEST_SMALL if bench.settings.small else _LARGEST):
            bench.check_time()
            at_size = replace(arm, name=f"{arm.name}-{size}")
            known = bench.journal.rows.get(block.row(at_size))
            if known is None:
                with bench.into_row(block, at_size):
                    _one_batch(bench, block, arm, at_size, size)
                known = bench.journal.rows[block.row(at_size)]
            rate = bench.journal.value(block.row(at_size), "images_per_min")
            if rate is None or rate < _GAIN * best:
                best = max(best, rate or 0.0)
                break
            best, size = rate, 2 * size
        _conclude(bench, block, arm)
        release()


def _one_batch(bench: Bench, block: Block, arm: Arm, at_size: Arm, size: int) -> None:
    scene = replace(bench.scene(block), batch=size)
    lane = Lane(at_size, bench.ready(block, arm))
    assert lane.ready is not None
    lane.first = shoot(lane.ready, scene)
    for _ in range(bench.settings.repeats):
        bench.check_time()
        lane.shots.append(shoot(lane.ready, scene))
    bench.write(block, at_size, **{"batch": size, **timed(lane, size)})


def _conclude(bench: Bench, block: Block, arm: Arm) -> None:
    prefix = f"{block.row(arm)}-"
    mine = [row for name, row in bench.journal.rows.items() if name.startswith(prefix)]
    good = [row for row in mine if row["status"] == "ok"]
    if not good:
        bench.write(block, arm, status="error", error=str(mine[-1].get("error")) if mine else "nothing was measured")
        return
    best = max(good, key=lambda row: float(row["images_per_min"]))
    told = ("batch", "images_per_min", "picture_s", "n", "peak_allocated_gb")
    note = "; ".join(f"batch {row['batch']}: {row.get('images_per_min', row['status'])}" for row in mine)
    bench.write(block, arm, **{name: best[name] for name in told}, note=note)


def ensemble(bench: Bench, block: Block) -> None:
    """Base and refiner on one schedule, both kept in memory: sampling of both parts, and the peak."""
    for arm in bench.pending(block):
        with bench.into_row(block, arm):
            base, refiner = bench.models.together([("sdxl", block.dtype), ("refiner", block.dtype)])
            scene = bench.scene(block)
            experts = (_expert(base, scene), _expert(refiner, scene))
            seconds: list[float] = []
            peak = MemoryPeak()
            for _ in range(bench.settings.repeats + 1):
                bench.check_time()
                # One run each: profiling inside of it begins a reading of its own.
                with measure_peak(bench.device) as memory:
                    seconds.append(_sample_both(bench, experts, scene))
                peak = peak.merged(memory.peak)
            bench.write(
                block, arm, plan=f"ensemble({_HANDOFF:g})", n=len(seconds) - 1, first_s=round(seconds[0], 4),
                sampling_s=round(statistics.median(seconds[1:]), 4), samples=seconds[1:],
                peak_allocated_gb=None if peak.allocated is None else round(peak.allocated / 1e9, 3),
                peak_reserved_gb=None if peak.reserved is None else round(peak.reserved / 1e9, 3),
            )  # fmt: skip


def _expert(parts: Parts, scene: Scene) -> Expert:
    positive, negative = (conditioning.encode(parts.clip, text) for text in (scene.prompt, scene.negative))
    return Expert(parts.model, positive, negative)


def _sample_both(bench: Bench, experts: tuple[Expert, Expert], scene: Scene) -> float:
    asked = EnsembleRequest(scene.seed, scene.steps, scene.cfg, scene.sampler, scene.scheduler, _HANDOFF)
    latent: dict[str, Any] = core_nodes().EmptyLatentImage().generate(scene.width, scene.height, scene.batch)[0]
    synchronize(bench.device)
    began = time.perf_counter()
    sample_ensemble(*experts, latent, asked, ProfileOptions(part=True), NodeContext())
    synchronize(bench.device)
    return time.perf_counter() - began

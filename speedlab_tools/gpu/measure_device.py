"""The two ceilings of the device, what a step computes, where its time goes, and what measuring costs.

Batches until the card is full, and base and refiner together.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from speedlab.common.core import core_nodes, output_directory
from speedlab.common.dtypes import torch_dtype
from speedlab.measure.clock import synchronize
from speedlab.measure.context import NodeContext
from speedlab.measure.peaks import MemoryPeak, measure_peak
from speedlab.measure.record import RunRecord
from speedlab.measure.roofline import measured_peak
from speedlab.models import text as conditioning
from speedlab.plans.techniques import Parts
from speedlab.sampling.ensemble import EnsembleRequest, Expert, sample_ensemble
from speedlab.sampling.profiled import ProfileOptions, SamplingRequest, profile_sampling

from .bench import Bench, Ready, sample, shoot
from .measure_models import Lane, timed
from .models import release
from .plan import Arm, Block, Scene

_SIDE, _SIDE_ON_CPU = 8192, 512
_COPIED_BYTES, _COPIED_ON_CPU = 1 << 32, 1 << 26
_COPIES = 10
# Steps that tell what every step computes.
_FEW_STEPS = 4
_KERNELS_KEPT = 40
_FAMILIES_TOLD = 6


def peak(bench: Bench, block: Block) -> None:
    """The fastest large matrix product in each dtype on random numbers, and a large copy on the device."""
    on_cpu = bench.device.type == "cpu"
    for arm in bench.pending(block):
        bench.check_time()
        with bench.into_row(block, arm):
            if arm.name == "copy":
                rate = _copy_gb_per_s(bench.device, on_cpu)
                bench.write(block, arm, gb_per_s=round(rate, 1), note="read and written")
            else:
                found = measured_peak(bench.device, torch_dtype(arm.name), side=_SIDE_ON_CPU if on_cpu else _SIDE)
                bench.write(block, arm, dtype=arm.name, tflops=round(found.tflops, 3), note=found.name)


def _copy_gb_per_s(device: Any, on_cpu: bool) -> float:
    import torch

    size = _COPIED_ON_CPU if on_cpu else _COPIED_BYTES
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_COPIES + 1):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2.0 * size / statistics.median(seconds[1:]) / 1e9


def work(bench: Bench, block: Block) -> None:
    """Operations of one step with cond and uncond, counted while stock runs a few steps."""
    for arm in bench.pending(block):
        bench.check_time()
        with bench.into_row(block, arm):
            record = _profiled(bench.ready(block, arm), bench.scene(block), "kernels", _FEW_STEPS)
            found = record.roofline or {}
            if not found:
                raise RuntimeError("; ".join(record.warnings) or "the operations could not be counted")
            bench.write(block, arm, flop_per_step=found["flop_per_step"], flop_per_forward=found["flop_per_forward"])


def kernels(bench: Bench, block: Block) -> None:
    """The kernels of some steps of each arm, a trace of the last arm, and how far step times add up to the wall."""
    last = block.arms[-1]
    for arm in bench.pending(block):
        bench.check_time()
        with bench.into_row(block, arm):
            one, scene = bench.ready(block, arm), bench.scene(block)
            shoot(one, scene)  # compiles, and brings every weight to the device
            wall, steps = _wall_and_steps(one, scene)
            record = _profiled(one, scene, "trace" if arm is last else "kernels", scene.steps)
            profile = record.kernel_profile or {}
            told = [f"{f['family']} {f['share']:.1f}%" for f in profile.get("families", ())[:_FAMILIES_TOLD]]
            trace = _keep_trace(record, bench.journal.path)
            bench.write(
                block, arm, n=1, sampling_s=round(wall, 4), steps_over_wall=round(steps / wall, 4),
                note=", ".join(told) + (f"; trace {trace}" if trace else ""),
                kernels=list(record.kernels[:_KERNELS_KEPT]), kernel_profile=profile, roofline=record.roofline,
                warnings=list(record.warnings),
            )  # fmt: skip


def overhead(bench: Bench, block: Block) -> None:
    """KSampler and Profile Sampler in turns on one seed: the median of paired ratios, record on disk included."""
    for arm in bench.pending(block):
        with bench.into_row(block, arm):
            one, scene = bench.ready(block, arm), bench.scene(block)
            settings = {**_ksampler(scene), **_conditions(one, scene), "model": one.parts.model}
            plain = core_nodes().KSampler()
            ours = bench.nodes["SpeedLabProfileSampler"]()
            # A prompt in which nobody takes the chart: drawing is no measuring.
            hidden = {"prompt": {"1": {"class_type": "SpeedLabProfileSampler", "inputs": {}}}, "unique_id": "1"}
            pairs: list[tuple[float, float]] = []
            for number in range(2 * bench.settings.repeats + 1):
                bench.check_time()
                both = {}
                for name in ("plain", "ours") if number % 2 else ("ours", "plain"):
                    node, more = (plain, {}) if name == "plain" else (ours, hidden)
                    synchronize(bench.device)
                    began = time.perf_counter()
                    node.sample(**settings, **more)
                    synchronize(bench.device)
                    both[name] = time.perf_counter() - began
                pairs.append((both["plain"], both["ours"]))
            ratios = [ours / plain for plain, ours in pairs[1:]]  # the first pair warms up
            bench.write(
                block, arm, n=len(ratios), sampling_s=round(statistics.median(p for p, _ in pairs[1:]), 4),
                overhead_percent=round(100.0 * (statistics.median(ratios) - 1.0), 3),
                samples=[[round(value, 5) for value in pair] for pair in pairs[1:]],
            )  # fmt: skip


def _ksampler(scene: Scene) -> dict[str, Any]:
    return {
        "seed": scene.seed, "steps": scene.steps, "cfg": scene.cfg, "sampler_name": scene.sampler,
        "scheduler": scene.scheduler,
    }  # fmt: skip


def _conditions(one: Ready, scene: Scene) -> dict[str, Any]:
    encoded = {
        "positive": conditioning.encode(one.parts.clip, scene.prompt),
        "negative": conditioning.encode(one.parts.clip, scene.negative),
    }
    latent = core_nodes().EmptyLatentImage().generate(scene.width, scene.height, scene.batch)[0]
    return {**encoded, "latent_image": latent}


def _profiled(one: Ready, scene: Scene, detail: str, steps: int) -> RunRecord:
    asked = SamplingRequest(**{**_ksampler(scene), "steps": min(steps, scene.steps)})
    given = _conditions(one, scene)
    return profile_sampling(
        one.parts.model, asked, given["positive"], given["negative"], given["latent_image"],
        ProfileOptions(detail, warmup=1), NodeContext(),
    ).record  # fmt: skip


def _wall_and_steps(one: Ready, scene: Scene) -> tuple[float, float]:
    """Seconds of a sampling by the host's clock, synchronised, and the sum of its step events."""
    given = _conditions(one, scene)
    device = one.parts.model.load_device
    sample(one.parts.model, scene, given["positive"], given["negative"], given["latent_image"])
    synchronize(device)
    began = time.perf_counter()
    record = profile_sampling(
        one.parts.model, SamplingRequest(**_ksampler(scene)), given["positive"], given["negative"],
        given["latent_image"], ProfileOptions(part=True), NodeContext(),
    ).record  # fmt: skip
    synchronize(device)
    wall = time.perf_counter() - began
    steps = sum(step["cpu_ms"] if step["gpu_ms"] is None else step["gpu_ms"] for step in record.steps)
    return wall, steps / 1000.0


def _keep_trace(record: RunRecord, beside: Path) -> str:
    """Copy the trace beside the results; its name there, "" without one."""
    found = record.artifacts.get("trace")
    if not found:
        return ""
    source = output_directory() / found
    target = beside.with_name(beside.name.removesuffix(".json") + "-trace.json.gz")
    shutil.copyfile(source, target)
    return target.name


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

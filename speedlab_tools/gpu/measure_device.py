"""The two ceilings of the device, what a step computes, where its time goes, and what measuring costs.

Batches until the GPU is full, and base and refiner together.
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

from .bench import Bench, Ready, run_image, sample
from .measure_models import Lane, timed
from .models import release
from .plan import Block, Variant, Workload

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
    for variant in bench.pending(block):
        bench.check_time()
        with bench.into_row(block, variant):
            if variant.name == "copy":
                rate = _copy_gb_per_s(bench.device, on_cpu)
                bench.write(block, variant, gb_per_s=round(rate, 1), note="read and written")
            else:
                found = measured_peak(bench.device, torch_dtype(variant.name), side=_SIDE_ON_CPU if on_cpu else _SIDE)
                bench.write(block, variant, dtype=variant.name, tflops=round(found.tflops, 3), note=found.name)


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
    for variant in bench.pending(block):
        bench.check_time()
        with bench.into_row(block, variant):
            record = _profiled(bench.ready(block, variant), bench.workload(block), "kernels", _FEW_STEPS)
            found = record.roofline or {}
            if not found:
                raise RuntimeError("; ".join(record.warnings) or "the operations could not be counted")
            bench.write(
                block, variant, flop_per_step=found["flop_per_step"], flop_per_forward=found["flop_per_forward"]
            )


def kernels(bench: Bench, block: Block) -> None:
    """The kernels of some steps of each variant, a trace of the last one, and how far step times add up to the wall."""
    last = block.variants[-1]
    for variant in bench.pending(block):
        bench.check_time()
        with bench.into_row(block, variant):
            one, workload = bench.ready(block, variant), bench.workload(block)
            run_image(one, workload)  # compiles, and brings every weight to the device
            wall, steps = _wall_and_steps(one, workload)
            record = _profiled(one, workload, "trace" if variant is last else "kernels", workload.steps)
            profile = record.kernel_profile or {}
            told = [f"{f['family']} {f['share']:.1f}%" for f in profile.get("families", ())[:_FAMILIES_TOLD]]
            trace = _keep_trace(record, bench.journal.path)
            bench.write(
                block, variant, n=1, sampling_s=round(wall, 4), steps_over_wall=round(steps / wall, 4),
                note=", ".join(told) + (f"; trace {trace}" if trace else ""),
                kernels=list(record.kernels[:_KERNELS_KEPT]), kernel_profile=profile, roofline=record.roofline,
                warnings=list(record.warnings),
            )  # fmt: skip


def overhead(bench: Bench, block: Block) -> None:
    """KSampler and Profile Sampler in turns on one seed: the median of paired ratios, record on disk included."""
    for variant in bench.pending(block):
        with bench.into_row(block, variant):
            one, workload = bench.ready(block, variant), bench.workload(block)
            settings = {**_ksampler(workload), **_conditions(one, workload), "model": one.parts.model}
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
                block, variant, n=len(ratios), sampling_s=round(statistics.median(p for p, _ in pairs[1:]), 4),
                overhead_percent=round(100.0 * (statistics.median(ratios) - 1.0), 3),
                samples=[[round(value, 5) for value in pair] for pair in pairs[1:]],
            )  # fmt: skip


def _ksampler(workload: Workload) -> dict[str, Any]:
    return {
        "seed": workload.seed, "steps": workload.steps, "cfg": workload.cfg, "sampler_name": workload.sampler,
        "scheduler": workload.scheduler,
    }  # fmt: skip


def _conditions(one: Ready, workload: Workload) -> dict[str, Any]:
    encoded = {
        "positive": conditioning.encode(one.parts.clip, workload.prompt),
        "negative": conditioning.encode(one.parts.clip, workload.negative),
    }
    latent = core_nodes().EmptyLatentImage().generate(workload.width, workload.height, workload.batch)[0]
    return {**encoded, "latent_image": latent}


def _profiled(one: Ready, workload: Workload, detail: str, steps: int) -> RunRecord:
    asked = SamplingRequest(**{**_ksampler(workload), "steps": min(steps, workload.steps)})
    given = _conditions(one, workload)
    return profile_sampling(
        one.parts.model, asked, given["positive"], given["negative"], given["latent_image"],
        ProfileOptions(detail, warmup=1), NodeContext(),
    ).record  # fmt: skip


def _wall_and_steps(one: Ready, workload: Workload) -> tuple[float, float]:
    """Seconds of a sampling by the host's clock, synchronised, and the sum of its step events."""
    given = _conditions(one, workload)
    device = one.parts.model.load_device
    sample(one.parts.model, workload, given["positive"], given["negative"], given["latent_image"])
    synchronize(device)
    began = time.perf_counter()
    record = profile_sampling(
        one.parts.model, SamplingRequest(**_ksampler(workload)), given["positive"], given["negative"],
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
    for variant in bench.pending(block):
        size, best = 1, 0.0
        while size <= (_LARGEST_SMALL if bench.settings.small else _LARGEST):
            bench.check_time()
            at_size = replace(variant, name=f"{variant.name}-{size}")
            known = bench.journal.rows.get(block.row(at_size))
            if known is None:
                with bench.into_row(block, at_size):
                    _one_batch(bench, block, variant, at_size, size)
                known = bench.journal.rows[block.row(at_size)]
            rate = bench.journal.value(block.row(at_size), "images_per_min")
            if rate is None or rate < _GAIN * best:
                best = max(best, rate or 0.0)
                break
            best, size = rate, 2 * size
        _conclude(bench, block, variant)
        release()


def _one_batch(bench: Bench, block: Block, variant: Variant, at_size: Variant, size: int) -> None:
    workload = replace(bench.workload(block), batch=size)
    lane = Lane(at_size, bench.ready(block, variant))
    assert lane.ready is not None
    lane.first = run_image(lane.ready, workload)
    for _ in range(bench.settings.repeats):
        bench.check_time()
        lane.image_runs.append(run_image(lane.ready, workload))
    bench.write(block, at_size, **{"batch": size, **timed(lane, size)})


def _conclude(bench: Bench, block: Block, variant: Variant) -> None:
    prefix = f"{block.row(variant)}-"
    mine = [row for name, row in bench.journal.rows.items() if name.startswith(prefix)]
    good = [row for row in mine if row["status"] == "ok"]
    if not good:
        bench.write(
            block, variant, status="error", error=str(mine[-1].get("error")) if mine else "nothing was measured"
        )
        return
    best = max(good, key=lambda row: float(row["images_per_min"]))
    told = ("batch", "images_per_min", "picture_s", "n", "peak_allocated_gb")
    note = "; ".join(f"batch {row['batch']}: {row.get('images_per_min', row['status'])}" for row in mine)
    bench.write(block, variant, **{name: best[name] for name in told}, note=note)


def ensemble(bench: Bench, block: Block) -> None:
    """Base and refiner on one schedule, both kept in memory: sampling of both parts, and the peak."""
    for variant in bench.pending(block):
        with bench.into_row(block, variant):
            base, refiner = bench.models.together([("sdxl", block.dtype), ("refiner", block.dtype)])
            workload = bench.workload(block)
            experts = (_expert(base, workload), _expert(refiner, workload))
            seconds: list[float] = []
            peak = MemoryPeak()
            for _ in range(bench.settings.repeats + 1):
                bench.check_time()
                # One run each: profiling inside of it begins a reading of its own.
                with measure_peak(bench.device) as memory:
                    seconds.append(_sample_both(bench, experts, workload))
                peak = peak.merged(memory.peak)
            bench.write(
                block, variant, plan=f"ensemble({_HANDOFF:g})", n=len(seconds) - 1, first_s=round(seconds[0], 4),
                sampling_s=round(statistics.median(seconds[1:]), 4), samples=seconds[1:],
                peak_allocated_gb=None if peak.allocated is None else round(peak.allocated / 1e9, 3),
                peak_reserved_gb=None if peak.reserved is None else round(peak.reserved / 1e9, 3),
            )  # fmt: skip


def _expert(parts: Parts, workload: Workload) -> Expert:
    positive, negative = (conditioning.encode(parts.clip, text) for text in (workload.prompt, workload.negative))
    return Expert(parts.model, positive, negative)


def _sample_both(bench: Bench, experts: tuple[Expert, Expert], workload: Workload) -> float:
    asked = EnsembleRequest(workload.seed, workload.steps, workload.cfg, workload.sampler, workload.scheduler, _HANDOFF)
    latent: dict[str, Any] = (
        core_nodes().EmptyLatentImage().generate(workload.width, workload.height, workload.batch)[0]
    )
    synchronize(bench.device)
    began = time.perf_counter()
    sample_ensemble(*experts, latent, asked, ProfileOptions(part=True), NodeContext())
    synchronize(bench.device)
    return time.perf_counter() - began

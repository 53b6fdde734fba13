"""The two ceilings of the device, what a step computes, where its time goes, and what measuring costs.

Batches until the GPU is full.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from speedlab.common.core import core_nodes, output_directory
from speedlab.common.dtypes import torch_dtype
from speedlab.measure.clock import synchronize
from speedlab.measure.context import NodeContext
from speedlab.measure.record import RunRecord
from speedlab.measure.roofline import measured_peak
from speedlab.plans.cell import Prepared, encode, sample
from speedlab.plans.in_turn import Series, turns
from speedlab.sampling.profiled import ProfileOptions

from . import measure_models
from .bench import PROMPT, Bench
from .models import release
from .plan import Block, Variant

T = TypeVar("T")
_SIDE, _SIDE_ON_CPU = 8192, 512
_COPIED_BYTES, _COPIED_ON_CPU = 1 << 32, 1 << 26
_COPIES = 10
# Steps that tell what every step computes.
_FEW_STEPS = 4
_KERNELS_KEPT = 40
_FAMILIES_SHOWN = 6


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
    seconds = [_wall(device, lambda: target.copy_(source))[0] for _ in range(_COPIES + 1)]
    return 2.0 * size / statistics.median(seconds[1:]) / 1e9


def work(bench: Bench, block: Block) -> None:
    """Operations of one step with cond and uncond, counted while stock runs a few steps."""
    for variant in bench.pending(block):
        bench.check_time()
        with bench.into_row(block, variant):
            record = _profiled(bench.ready(block, variant), "kernels", _FEW_STEPS)
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
            one = bench.ready(block, variant)
            bench.image(one)  # compiles, and brings every weight to the device
            wall, steps = _wall_and_steps(one)
            record = _profiled(one, "trace" if variant is last else "kernels", one.settings.steps)
            profile = record.kernel_profile or {}
            shares = [f"{f['family']} {f['share']:.1f}%" for f in profile.get("families", ())[:_FAMILIES_SHOWN]]
            trace = _keep_trace(record, bench.journal.path)
            bench.write(
                block, variant, n=1, sampling_s=round(wall, 4), steps_over_wall=round(steps / wall, 4),
                note=", ".join(shares) + (f"; trace {trace}" if trace else ""),
                kernels=list(record.kernels[:_KERNELS_KEPT]), kernel_profile=profile, roofline=record.roofline,
                warnings=list(record.warnings),
                **({"plan": record.request["plan"]} if "asked" in record.request else {}),
            )  # fmt: skip


@dataclass(eq=False)
class _NodeRuns(Series[float]):
    """A sampling node and how long it took, in seconds."""

    sample: Callable[..., Any]


def overhead(bench: Bench, block: Block) -> None:
    """KSampler and Profile Sampler in turns on one seed: the median of paired ratios, record on disk included."""
    for variant in bench.pending(block):
        with bench.into_row(block, variant):
            one = bench.ready(block, variant)
            asked, (base, _) = one.settings, encode(one, PROMPT)
            settings = {
                "model": base.model, "seed": PROMPT.seed, "steps": asked.steps, "cfg": asked.cfg,
                "sampler_name": asked.sampler, "scheduler": asked.scheduler, "positive": base.positive,
                "negative": base.negative,
                "latent_image": core_nodes().EmptyLatentImage().generate(asked.width, asked.height, asked.batch)[0],
            }  # fmt: skip
            # A prompt in which no node uses the chart: drawing is no measuring.
            hidden = {"prompt": {"1": {"class_type": "SpeedLabProfileSampler", "inputs": {}}}, "unique_id": "1"}
            plain = _NodeRuns(core_nodes().KSampler().sample)
            ours = _NodeRuns(partial(bench.nodes["SpeedLabProfileSampler"]().sample, **hidden))
            for turn in turns((ours, plain), 2 * bench.settings.repeats, warmup=1):
                bench.check_time()
                turn.keep(_wall(bench.device, partial(turn.series.sample, **settings))[0])
            ratios = [mine / theirs for mine, theirs in zip(ours.repeats, plain.repeats, strict=True)]
            bench.write(
                block, variant, n=len(ratios), sampling_s=round(statistics.median(plain.repeats), 4),
                overhead_percent=round(100.0 * (statistics.median(ratios) - 1.0), 3),
                samples=[[round(a, 5), round(b, 5)] for a, b in zip(plain.repeats, ours.repeats, strict=True)],
            )  # fmt: skip


def _wall(device: Any, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds by the host's clock, synchronised, and what the work gives."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - began, result


def _profiled(one: Prepared, detail: str, steps: int) -> RunRecord:
    few = replace(one, settings=replace(one.settings, steps=min(steps, one.settings.steps)))
    return sample(few, encode(few, PROMPT), PROMPT.seed, ProfileOptions(detail, warmup=1), NodeContext()).record


def _wall_and_steps(one: Prepared) -> tuple[float, float]:
    """Seconds of a warm sampling by the host's clock, and the sum of its step events."""
    experts, options = encode(one, PROMPT), ProfileOptions(part=True)
    work = partial(sample, one, experts, PROMPT.seed, options, NodeContext())
    work()
    wall, sampled = _wall(one.parts.model.load_device, work)
    steps = sum(step["cpu_ms"] if step["gpu_ms"] is None else step["gpu_ms"] for step in sampled.record.steps)
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


def batches(bench: Bench, block: Block) -> None:
    """Double the batch until throughput no longer grows or memory ends: a row each, and one that names the best."""
    for variant in bench.pending(block):
        size, best = 1, 0.0
        while size <= (_LARGEST_SMALL if bench.settings.small else _LARGEST):
            at_size = replace(variant, name=f"{variant.name}-{size}", batch=size)
            measure_models.run(bench, replace(block, variants=(at_size,)))
            rate = bench.journal.value(block.row(at_size), "images_per_min")
            if rate is None or rate < _GAIN * best:
                break
            best, size = rate, 2 * size
        _conclude(bench, block, variant)
        release()


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
    fields = ("plan", "batch", "images_per_min", "picture_s", "n", "peak_allocated_gb")
    note = "; ".join(f"batch {row['batch']}: {row.get('images_per_min', row['status'])}" for row in mine)
    bench.write(block, variant, **{name: best[name] for name in fields}, note=note)

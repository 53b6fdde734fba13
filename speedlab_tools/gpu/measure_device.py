"""The two ceilings of the device, what a step computes, where its time goes, and what measuring costs."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from speedlab.common.core import core_nodes, output_directory
from speedlab.common.dtypes import torch_dtype
from speedlab.measure.clock import synchronize
from speedlab.measure.context import NodeContext
from speedlab.measure.record import RunRecord
from speedlab.measure.roofline import measured_peak
from speedlab.models import text as conditioning
from speedlab.sampling.profiled import ProfileOptions, SamplingRequest, profile_sampling

from .bench import Bench
from .plan import Block, Scene
from .run import Ready, sample, shoot

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

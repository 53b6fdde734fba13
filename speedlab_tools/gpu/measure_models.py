"""Images of several variants, in turns with stock, so that drift of the GPU hits them alike.

What compiling costs and what it keeps: cold, found again on disk, warm, and graphs over LoRAs and sizes.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speedlab.common.torch_private import clear_inductor
from speedlab.measure.roofline import share_of_peak
from speedlab.measure.summary import speed
from speedlab.patching.compiled import compile_counts, counts_between
from speedlab.plans.techniques import Parts

from .. import synthetic
from .bench import Bench, ImageRun, Ready, ready, run_image
from .models import release
from .plan import STOCK, Block, Variant, Workload

log = logging.getLogger(__name__)

# With so many images a row is worth keeping where time ends before all of them.
_ENOUGH = 3


@dataclass
class Lane:
    """One variant of a block and the images made of it."""

    variant: Variant
    ready: Ready | None = None
    first: ImageRun | None = None
    image_runs: list[ImageRun] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether nothing has gone wrong with it."""
        return self.first is not None

    def median(self, phase: str) -> float:
        """Median seconds of a phase."""
        return statistics.median(getattr(image_run, phase) for image_run in self.image_runs)


def run(bench: Bench, block: Block) -> None:
    """A row for each variant that has none: first image, median of the others, memory, ratio to stock here."""
    pending = bench.pending(block)
    stock = [variant for variant in block.variants if variant.stack == STOCK and variant not in pending]
    lanes = [Lane(variant) for variant in (*stock, *pending)]
    bench.models.parts(block.model, block.dtype)  # before the GPU is made smaller
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
            # Time is over, the device lost, or somebody stopped it: what has enough images counts.
            lanes = [lane for lane in lanes if len(lane.image_runs) >= _ENOUGH]
            raise
        finally:
            for lane in lanes:
                _write(bench, block, lane, _stock_of(lanes))


def take_turns(bench: Bench, block: Block, lanes: Sequence[Lane]) -> None:
    """The first image of each lane, then rounds over those that run, forth and back."""
    workload = bench.workload(block)
    for lane in lanes:
        bench.check_time()
        with bench.into_row(block, lane.variant):
            lane.ready = bench.ready(block, lane.variant)
            lane.first = run_image(lane.ready, workload)
    # A failure takes weights off the device; the image after it brings them back and must not count.
    failed = not all(lane.runs for lane in lanes)
    for number in range(bench.settings.repeats):
        for lane in lanes if number % 2 == 0 else reversed(lanes):
            bench.check_time()
            if lane.ready is None or not lane.runs:
                continue
            image_run = None
            with bench.into_row(block, lane.variant):
                if failed:
                    run_image(lane.ready, workload)
                image_run = run_image(lane.ready, workload)
            failed = image_run is None
            if image_run is None:
                lane.first = None
            else:
                lane.image_runs.append(image_run)


def timed(lane: Lane, batch: int = 1) -> dict[str, Any]:
    """The fields of a row that its images give."""
    assert lane.first is not None
    totals = [image_run.total_s for image_run in lane.image_runs]
    picture = statistics.median(totals)
    peak = lane.image_runs[0].peak
    for image_run in lane.image_runs[1:]:
        peak = peak.merged(image_run.peak)
    bad = not all(image_run.finite for image_run in (lane.first, *lane.image_runs))
    return {
        "n": len(lane.image_runs),
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
        "samples": [
            {name: round(getattr(image_run, f"{name}_s"), 5) for name in _PHASES} for image_run in lane.image_runs
        ],
        "note": " ".join(dict.fromkeys(image_run.note for image_run in lane.image_runs if image_run.note)),
        **({"status": "error", "error": "NaN or Inf in latents or images: the times mean nothing"} if bad else {}),
    }


_PHASES = ("encode", "sampling", "decode", "total")


def _stock_of(lanes: Sequence[Lane]) -> Lane | None:
    return next((lane for lane in lanes if lane.variant.stack == STOCK and lane.runs and lane.image_runs), None)


def _write(bench: Bench, block: Block, lane: Lane, stock: Lane | None) -> None:
    if not lane.runs or not lane.image_runs or block.row(lane.variant) in bench.journal.rows:
        return
    workload = bench.workload(block)
    fields = {**timed(lane, workload.batch), **_step_time(lane, workload.steps), **_rates(bench, block, lane)}
    if stock is not None:
        fields |= {
            "ratio": _round(stock.median("total_s") / lane.median("total_s")),
            "sampling_ratio": _round(stock.median("sampling_s") / lane.median("sampling_s")),
            "relative_error": _relative_error(lane.image_runs[0].latent, stock.image_runs[0].latent),
        }
    bench.write(block, lane.variant, **fields)


def _step_time(lane: Lane, steps: int) -> dict[str, Any]:
    """Step time and rate as every record has them: sampling time over steps."""
    told = speed(lane.median("sampling_s") * 1000.0, steps)
    step_ms = told["step_time_ms"]
    return {"step_time_s": None if step_ms is None else step_ms / 1000.0, "it_per_s": told["it_per_s"]}


def _rates(bench: Bench, block: Block, lane: Lane) -> dict[str, Any]:
    """Operations a second and their share of the measured peak, where each step is a whole forward."""
    flop = bench.journal.value(f"work-{block.model}/step", "flop_per_step")
    if flop is None or not lane.variant.whole:
        return {}
    rate = flop * bench.workload(block).steps / lane.median("sampling_s") / 1e12
    peak = bench.journal.value(f"peak/{block.dtype}", "tflops")
    share = share_of_peak(rate, peak) if peak else None
    if peak and share is None:
        log.warning("SpeedLab: %s ran above the measured peak, so no share of it is written.", block.row(lane.variant))
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
    """Make the GPU look as if it had `gb`: what `--reserve-vram` does, and an allocator that gives no more."""
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


_LORA_RANK = 16
# Strengths of two LoRAs, stage by stage.
_LORA_STAGES = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 0.0))
# Sizes as shares of the model's own sides: square, tall, wide, smaller, and the first again.
_SIZES = ((1.0, 1.0), (0.875, 1.125), (1.125, 0.875), (0.75, 0.75), (1.0, 1.0))


def cold(bench: Bench, block: Block) -> None:
    """The first image with empty caches, the first one of a process that finds them full, then rounds with stock."""
    for variant in bench.pending(block):
        bench.check_time()
        with _forgetting(), bench.into_row(block, variant), _fresh_folder():
            workload = bench.workload(block)
            one = bench.ready(block, variant)
            clear_inductor()
            before = compile_counts()
            first = run_image(one, workload)
            counts = counts_between(before, compile_counts())
            clear_inductor()
            again = run_image(bench.ready(block, variant), workload)
            lanes = [Lane(Variant(STOCK)), Lane(variant)]
            take_turns(bench, block, lanes)
            if not lanes[1].runs:
                continue
            fields = {**timed(lanes[1], workload.batch), "first_s": round(first.total_s, 3), **_counted(counts)}
            if lanes[0].runs:
                stock, mine = lanes[0].median("total_s"), lanes[1].median("total_s")
                fields["ratio"] = round(stock / mine, 4)
            fields["note"] = f"{again.total_s:.1f} s where compiled code was found on disk. {fields['note']}".strip()
            bench.write(block, variant, **fields)


def lora_tour(bench: Bench, block: Block) -> None:
    """One compiled model under two LoRAs at several strengths: graphs and first image of each stage."""
    spec = bench.models.spec(block.model, block.dtype)

    def stages(parts: Parts) -> Iterator[tuple[str, Parts, Workload]]:
        loras = [synthetic.lora_state_dict(spec, _LORA_RANK, seed, device=bench.device) for seed in (1, 2)]
        for strengths in _LORA_STAGES:
            changed = parts
            for weights, strength in zip(loras, strengths, strict=True):
                changed = _with_lora(changed, weights, strength)
            yield "+".join(f"{s:g}" for s in strengths), changed, bench.workload(block)

    _tour(bench, block, stages)


def size_tour(bench: Bench, block: Block) -> None:
    """One compiled model at several sizes: graphs and first image of each."""

    def stages(parts: Parts) -> Iterator[tuple[str, Parts, Workload]]:
        workload = bench.workload(block)
        for wide, high in _SIZES:
            # Whole steps of 64 pixels, so that every level of the network has even sides.
            width, height = (max(64, round(side * share / 64) * 64) for side, share in
                             ((workload.width, wide), (workload.height, high)))  # fmt: skip
            yield f"{width}x{height}", parts, replace(workload, width=width, height=height)

    _tour(bench, block, stages)


def _tour(bench: Bench, block: Block, stages: Callable[[Parts], Iterable[tuple[str, Parts, Workload]]]) -> None:
    for variant in bench.pending(block):
        with _forgetting(), bench.into_row(block, variant), _fresh_folder():
            clear_inductor()
            seen: list[dict[str, Any]] = []
            start = compile_counts()
            for name, parts, workload in stages(bench.models.parts(block.model, block.dtype)):
                bench.check_time()
                before = compile_counts()
                one = ready(variant, parts, bench.nodes)
                first = run_image(one, workload)
                counts = counts_between(before, compile_counts())
                warm = run_image(one, workload)
                seen.append({"stage": name, "first_s": round(first.total_s, 3), "warm_s": round(warm.total_s, 3),
                             "finite": first.finite and warm.finite, **counts})  # fmt: skip
            total = counts_between(start, compile_counts())
            note = "; ".join(f"{s['stage']}: {s['graphs']} graphs, {s['first_s']:g} s, {s['warm_s']:g} s" for s in seen)
            bad = not all(stage["finite"] for stage in seen)
            bench.write(
                block, variant, first_s=seen[0]["first_s"], n=len(seen), note=note, stages=seen, **_counted(total),
                **({"status": "error", "error": "NaN or Inf in latents or images"} if bad else {}),
            )  # fmt: skip


def _with_lora(parts: Parts, weights: dict[str, Any], strength: float) -> Parts:
    import comfy.sd

    if not strength:
        return parts
    model, clip = comfy.sd.load_lora_for_models(parts.model, parts.clip, dict(weights), strength, strength)
    return replace(parts, model=model, clip=clip)


def _counted(counts: dict[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in ("graphs", "graph_breaks", "recompiles")}


@contextmanager
def _forgetting() -> Iterator[None]:
    """Leave neither compiled code nor weights behind, whatever happens."""
    try:
        yield
    finally:
        clear_inductor()
        release()


@contextmanager
def _fresh_folder() -> Iterator[None]:
    """An empty place for compiled code."""
    import folder_paths

    before = folder_paths.get_user_directory()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder_paths.set_user_directory(str(Path(folder)))
        try:
            yield
        finally:
            folder_paths.set_user_directory(before)

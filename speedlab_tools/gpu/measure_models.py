"""Images of several variants in turn with stock, so that drift of the GPU hits them alike.

What compiling costs and what it keeps: cold, found again on disk, warm, and graphs over LoRAs and sizes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from speedlab.common.errors import UnavailableError
from speedlab.common.torch_private import clear_inductor
from speedlab.measure.environment import dynamic_vram
from speedlab.measure.record import RunRecord
from speedlab.measure.roofline import share_of_peak
from speedlab.patching.compiled import compile_counts, counts_between
from speedlab.plans.cell import OneRun
from speedlab.plans.cell_record import SweepFacts, measured_record
from speedlab.plans.in_turn import turns
from speedlab.plans.techniques import Parts

from .. import synthetic
from .bench import PROMPT, Bench, VariantRuns
from .models import release
from .plan import STOCK, Block, Variant

log = logging.getLogger(__name__)

# With so many images a row is worth keeping where time ends before all of them.
_ENOUGH = 3
_STOCK = Variant(STOCK)
_NO_SMALLER_GPU = (
    "ComfyUI's dynamic VRAM holds weights outside of PyTorch's allocator, so this suite cannot make the GPU look "
    "smaller. It can with a ComfyUI that has no dynamic VRAM (before 0.33)."
)


def run(bench: Bench, block: Block) -> None:
    """A row for each variant that has none: first image, median of the others, memory, ratio to stock here."""
    pending = bench.pending(block)
    if not pending:
        return
    if block.cap_gb is not None and dynamic_vram():
        for variant in pending:
            with bench.into_row(block, variant):
                raise UnavailableError(_NO_SMALLER_GPU)
        return
    stock = [variant for variant in block.variants if variant.is_stock and variant not in pending]
    variants = [bench.series(block, variant) for variant in (*stock, *pending)]
    bench.parts(block, block.variants[0])  # before the GPU is made smaller
    with _gpu_of(block.cap_gb, bench.device):
        if not block.apart:
            _measure(bench, block, variants)
            return
        for number, one in enumerate(variants):
            release()
            _measure(bench, block, [one], variants[:number])
        release()


def _measure(bench: Bench, block: Block, variants: Sequence[VariantRuns], beside: Sequence[VariantRuns] = ()) -> None:
    """Measure these in turn and write their rows; stock is among them, or among those `beside` them."""
    enough = 1
    try:
        take_turns(bench, block, variants)
    except BaseException:
        # Time is over, the device lost, or the user stopped it: what has enough images counts.
        enough = _ENOUGH
        raise
    finally:
        sound = [one for one in variants if one.status == "ok" and len(one.repeats) >= enough]
        stock = next((one for one in (*sound, *beside) if one.variant.is_stock and one.status == "ok"), None)
        for one in sound:
            if block.row(one.variant) not in bench.journal.rows:
                bench.write(block, one.variant, **fields_of(bench, block, one, stock))


def take_turns(bench: Bench, block: Block, variants: Sequence[VariantRuns]) -> None:
    """The first image of each variant, then rounds over those that run."""
    failed = False
    for turn in turns(variants, bench.settings.repeats, warmup=1):
        one = turn.series
        bench.check_time()
        with bench.into_row(block, one.variant, one):
            one.prepared = one.prepared or bench.ready(block, one.variant)
            if failed and turn.counts:
                # A failure takes weights off the device; the image after it brings them back and must not count.
                bench.image(one.prepared, one.variant.prefetch)
            turn.keep((bench.image(one.prepared, one.variant.prefetch),))
        failed = one.status != "ok"


def fields_of(bench: Bench, block: Block, one: VariantRuns, stock: VariantRuns | None = None) -> dict[str, Any]:
    """The fields of a row: the figures of the record that Benchmark would write of these runs."""
    record, samples = _record(bench, block, one), [_sample(run) for (run,) in one.repeats]
    fields = {**_fields_of(record), **_rates(bench, block, one.variant, record), "samples": samples}
    if stock is not None:
        theirs = _record(bench, block, stock)
        fields |= {
            "ratio": _ratio(theirs, record, "total"),
            "sampling_ratio": _ratio(theirs, record, "sample"),
            "relative_error": _relative_error(_latent(one), _latent(stock)),
        }
    return fields


def _record(bench: Bench, block: Block, one: VariantRuns) -> RunRecord:
    return measured_record(one, SweepFacts(one.run_id, None, (PROMPT,), bench.parts(block, one.variant)))


def _fields_of(record: RunRecord) -> dict[str, Any]:
    """What a record says, in the columns of the suite."""
    summary, phases, request, totals = record.summary, record.phases_ms, record.request, record.summary["totals_ms"]
    # The process's peak is given by each phase: `overall` is what a cell adds to it.
    resident = [float(gb) for phase in record.memory.values() if (gb := phase.get("peak_rss_gb")) is not None]
    return {
        **{name: request[name] for name in ("plan", "width", "height", "batch")},
        "n": len(totals),
        "first_s": _seconds(summary["first_run_ms"]),
        "picture_s": _seconds(phases["total"]),
        "picture_min_s": _seconds(min(totals)),
        "picture_max_s": _seconds(max(totals)),
        "sampling_s": _seconds(phases["sample"]),
        "step_time_s": _seconds(summary["step_time_ms"], 8),
        "it_per_s": summary["it_per_s"],
        "encode_s": _seconds(phases["text_encode"]),
        "decode_s": _seconds(phases["decode"]),
        "images_per_min": round(summary["images_per_min"], 2),
        "peak_allocated_gb": record.memory["overall"]["peak_allocated_gb"],
        "peak_reserved_gb": record.memory["overall"]["peak_reserved_gb"],
        "peak_rss_gb": max(resident, default=None),
        "note": " ".join(record.warnings),
    }


def _sample(run: OneRun) -> dict[str, float]:
    ms_of = {"encode": run.encode_ms, "sampling": run.sample_ms, "decode": run.decode_ms, "total": run.total_ms}
    return {name: round(ms / 1000.0, 5) for name, ms in ms_of.items()}


def _ratio(stock: RunRecord, mine: RunRecord, phase: str) -> float:
    return round(float(stock.phases_ms[phase] or 0.0) / float(mine.phases_ms[phase] or 1.0), 4)


def _rates(bench: Bench, block: Block, variant: Variant, record: RunRecord) -> dict[str, Any]:
    """Operations a second and their share of the measured peak, where each step is a whole forward."""
    flop = bench.journal.value(f"work-{block.model}/step", "flop_per_step")
    step_ms = record.summary["step_time_ms"]
    if flop is None or not step_ms or not variant.whole:
        return {}
    rate = flop / step_ms / 1e9
    peak = bench.journal.value(f"peak/{block.dtype}", "tflops")
    share = share_of_peak(rate, peak) if peak else None
    if peak and share is None:
        log.warning("SpeedLab: %s ran above the measured peak, so no share of it is written.", block.row(variant))
    return {"tflops": round(rate, 3), "peak_share": None if share is None else round(share, 2)}


def _latent(one: VariantRuns) -> Any:
    return one.repeats[0][0].latent


def _relative_error(latent: Any, reference: Any) -> float | None:
    if latent.shape != reference.shape:
        return None
    return float(f"{float((latent - reference).norm() / reference.norm()):.3g}")


def _seconds(ms: Any, digits: int = 4) -> float | None:
    return None if ms is None else round(float(ms) / 1000.0, digits)


@contextmanager
def _gpu_of(gb: float | None, device: Any) -> Iterator[None]:
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
            prepared = bench.ready(block, variant)
            clear_inductor()
            before = compile_counts()
            first = bench.image(prepared)
            counts = counts_between(before, compile_counts())
            clear_inductor()
            again = bench.image(bench.ready(block, variant))
            stock, mine = both = [bench.series(block, one) for one in (_STOCK, variant)]
            take_turns(bench, block, both)
            if mine.status != "ok":
                continue
            fields = fields_of(bench, block, mine, stock if stock.status == "ok" else None)
            found = f"{again.total_ms / 1000.0:.1f} s where compiled code was found on disk."
            fields |= {"first_s": _seconds(first.total_ms), "note": f"{found} {fields['note']}".strip()}
            bench.write(block, variant, **fields, **_counted(counts))


# What a tour goes through: the name of each stage, the model and what is made with it.
Stages = Callable[[Parts, Variant], Iterable[tuple[str, Parts, Variant]]]


def lora_tour(bench: Bench, block: Block) -> None:
    """One compiled model under two LoRAs at several strengths: graphs and first image of each stage."""
    spec = bench.models.spec(block.model, block.dtype)

    def stages(parts: Parts, variant: Variant) -> Iterator[tuple[str, Parts, Variant]]:
        loras = [synthetic.lora_state_dict(spec, _LORA_RANK, seed, device=bench.device) for seed in (1, 2)]
        for strengths in _LORA_STAGES:
            changed = parts
            for weights, strength in zip(loras, strengths, strict=True):
                changed = _with_lora(changed, weights, strength)
            yield "+".join(f"{s:g}" for s in strengths), changed, variant

    _tour(bench, block, stages)


def size_tour(bench: Bench, block: Block) -> None:
    """One compiled model at several sizes: graphs and first image of each."""

    def stages(parts: Parts, variant: Variant) -> Iterator[tuple[str, Parts, Variant]]:
        workload = bench.workload(block, variant)
        for wide, high in _SIZES:
            # Whole steps of 64 pixels, so that every level of the network has even sides.
            width, height = (max(64, round(side * share / 64) * 64) for side, share in
                             ((workload.width, wide), (workload.height, high)))  # fmt: skip
            sized = f"{variant.stack}+settings(width={width},height={height})"
            yield f"{width}x{height}", parts, replace(variant, stack=sized)

    _tour(bench, block, stages)


def _tour(bench: Bench, block: Block, stages: Stages) -> None:
    for variant in bench.pending(block):
        with _forgetting(), bench.into_row(block, variant), _fresh_folder():
            clear_inductor()
            seen: list[dict[str, Any]] = []
            start = compile_counts()
            for name, parts, stage in stages(bench.parts(block, variant), variant):
                bench.check_time()
                before = compile_counts()
                one = bench.ready(block, stage, parts)
                first = bench.image(one)
                counts = counts_between(before, compile_counts())
                times = {"first_s": _seconds(first.total_ms, 3), "warm_s": _seconds(bench.image(one).total_ms, 3)}
                seen.append({"stage": name, **times, **counts})
            total = counts_between(start, compile_counts())
            note = "; ".join(f"{s['stage']}: {s['graphs']} graphs, {s['first_s']:g} s, {s['warm_s']:g} s" for s in seen)
            bench.write(
                block, variant, first_s=seen[0]["first_s"], n=len(seen), note=note, stages=seen, **_counted(total)
            )


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

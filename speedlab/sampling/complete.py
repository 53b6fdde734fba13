"""After a good run: add decode, images and quality to the record, write it, append its CSV row."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.core import compute_device, output_directory
from ..measure import node_times, timeline
from ..measure.charts import OF_REPORT, STEPS, chart_or_blank
from ..measure.context import NodeContext, of_item
from ..measure.peaks import MemoryPeak, measure_peak
from ..measure.plan_names import plan_of
from ..measure.record import RunRecord, memory_dict, total_ms
from ..measure.store import RunStore, new_run_id, write_image
from .run_record import with_others, with_rates

_MEMORY_FIELDS = ("peak_allocated_gb", "peak_reserved_gb", "peak_rss_gb", "device_used_gb", "outside_torch_gb")


@dataclass(frozen=True)
class Completed:
    """The whole record as it lies on disk, and its charts as an IMAGE [images, H, W, 3], the step chart first."""

    record: RunRecord
    chart: Any


def complete(record: RunRecord, images: Any | None, context: NodeContext, all_charts: bool = True) -> Completed:
    """Add everything that happened since sampling and write it all; the step chart is saved with it.

    Without `all_charts` it is the only one that is drawn. Raises ResultsError naming the path.
    """
    reached_ns = time.perf_counter_ns()
    store = RunStore(output_directory())
    store.check_writable()
    with measure_peak(compute_device()) as reading:
        timeline.note_between(reading.before)
    if store.was_reported(record.run_id):
        # A second report on one profile, of another decoder say, is a result of its own.
        record = record.changed(run_id=new_run_id())
    record = _with_decode(record, images is not None, reached_ns, context)
    if images is not None:
        record = _with_images(record, images, context, store)
    record = with_rates(record.changed(phases_ms={**record.phases_ms, "total": _total(record)}))
    chart = chart_or_blank(record, OF_REPORT if all_charts else (STEPS,))
    record = store.keep(_with_chart(record, chart, store))
    timeline.note_report()
    return Completed(record, chart)


def _with_decode(record: RunRecord, has_images: bool, reached_ns: int, context: NodeContext) -> RunRecord:
    now = timeline.executing()
    entries = timeline.entries(now.prompt_id)
    source = record.request.get("sampled_as", record.run_id)
    decodes = _decodes_of(source, context, entries, now.list_index) if has_images else []
    infos = [{key: value for key, value in e.info.items() if key != "run_id"} for e in decodes]
    tiny = dict.fromkeys(str(info["decoder"]) for info in infos if info.get("decoder") not in (None, "vae"))
    compiled = dict.fromkeys(str(info["compiled"]) for info in infos if info.get("compiled"))
    techniques = [*record.request.get("accelerators", ()), *compiled, *(f"tiny_vae({name})" for name in tiny)]
    request = {**record.request, "accelerators": techniques, "decode": infos, "precision": _precision(record, infos)}
    if not record.request.get("plan_named"):
        request["plan"] = plan_of(techniques)
    peak, since = MemoryPeak(), MemoryPeak()
    for entry in decodes:
        peak = peak.merged(entry.peak)
    for entry in entries:
        since = since.merged(entry.peak)
    memory = merge_memory(record.memory, "decode", memory_dict(peak)) if decodes else dict(record.memory)
    phases = dict(record.phases_ms)
    phases["decode"] = round(sum(e.ms for e in decodes), 3) if decodes else None
    sampler_ms, apart_ms = phases.get("compile"), sum(e.apart_ms for e in decodes)
    if apart_ms:
        phases["compile"] = round(apart_ms + (sampler_ms if isinstance(sampler_ms, (int, float)) else 0.0), 3)
    warnings = [info["warning"] for info in infos if "warning" in info]
    completed = record.changed(
        request=request,
        phases_ms=phases,
        memory=merge_memory(memory, None, memory_dict(since)),
        warnings=(*record.warnings, *warnings),
    )
    return _with_rest(completed, source, context, entries, reached_ns) if has_images else completed


def _with_rest(
    record: RunRecord, run_id: str, context: NodeContext, entries: Sequence[timeline.PhaseEntry], reached_ns: int
) -> RunRecord:
    """The record with what else made the images: the span that a core decoder took, or that it was not measured."""
    if context.node_id not in context.graph:
        return record
    now, sampled = timeline.executing(), _sampling_of(run_id, entries)
    if sampled is None or sampled.node_id is None:
        # Samplers of this pack always run; a node that made one while the prompt ran may be answered from the cache.
        return with_others(
            record, context, (),
            "This profile is of an earlier prompt: ComfyUI had it in its cache, so the time from text to image is "
            "not known. Change the seed to have it measured.",
        )  # fmt: skip
    sampler = sampled.node_id
    upstream = context.upstream(context.node_id, ("images",))
    if sampler not in upstream:
        return with_others(
            record, context, (),
            f"The images do not come from the sampler of this profile, {context.names([sampler])}, so the time from "
            "text to image is not known.",
        )  # fmt: skip
    behind = upstream - context.upstream(sampler)
    decoders = context.decoding(behind)
    others = {*context.samplers(upstream), *context.working(upstream)} - {sampler}
    if record.phases_ms.get("decode") is None:
        others -= set(decoders) & behind
    record = with_others(record, context, others)
    if record.phases_ms.get("core_text_encode") is not None and _is_of_list(sampled, entries):
        return with_others(
            record, context, (),
            "A core node encoded the texts of a list at once, so the time from text to image is not known. Encode with "
            "Text Encode or Prompt Queue (SpeedLab) to have it.",
        )  # fmt: skip
    if record.phases_ms.get("decode") is not None:
        return _with_freed(record, behind, upstream, entries, now.list_index)
    if others:
        return record
    between = _between(sampled, context, upstream, entries)
    seen = node_times.seen_ms(decoders) if between and decoders and not _is_of_list(sampled, entries) else None
    if isinstance(seen, float):
        return record.changed(
            phases_ms={**record.phases_ms, "after_sampling": seen},
            warnings=(
                *record.warnings,
                f"{context.names(decoders)} decoded: its {seen:.0f} ms are what ComfyUI's progress tells of it, an "
                "estimate that is part of the time from text to image. VAE Decode (SpeedLab) measures it.",
            ),
        )
    if between:
        return with_others(
            record, context, (),
            f"{context.names(decoders) or 'Another node'} decoded, and {between} may have run between sampling and "
            "this report, so the time from text to image is not known. Decode with VAE Decode (SpeedLab) to have it.",
        )  # fmt: skip
    after = round((reached_ns - sampled.end_ns) / 1e6, 3)
    return record.changed(phases_ms={**record.phases_ms, "after_sampling": after})


def _with_freed(
    record: RunRecord,
    behind: Collection[str],
    upstream: Collection[str],
    entries: Sequence[timeline.PhaseEntry],
    list_index: int | None,
) -> RunRecord:
    """The record with the time of Free Memory between sampling and images; a span to the report holds it already."""
    freed = [e for e in entries if e.phase == "free" and e.node_id in upstream]
    mine = of_item([e for e in freed if e.node_id in behind], list_index)
    if not mine:
        return record
    before, peak = record.phases_ms.get("free"), MemoryPeak()
    for entry in freed:
        peak = peak.merged(entry.peak)
    ms = sum(e.ms for e in mine) + (before if isinstance(before, (int, float)) else 0.0)
    memory = merge_memory(record.memory, "free", memory_dict(peak))
    return record.changed(phases_ms={**record.phases_ms, "free": round(ms, 3)}, memory=memory)


def _between(
    sampled: timeline.PhaseEntry, context: NodeContext, upstream: frozenset[str], entries: Sequence[timeline.PhaseEntry]
) -> str:
    """What else may have run since sampling, in words: another item of a list, or a node of another branch."""
    others = {e.node_id for e in entries if e.phase != "between" and e.end_ns > sampled.end_ns} - {sampled.node_id}
    if _is_of_list(sampled, entries):
        return "other items of the list"
    branches = set(context.graph) - upstream - {context.node_id}
    unseen = {*context.working(branches), *context.encoding(branches), *(n for n in others - upstream if n is not None)}
    return context.names(unseen)


def _is_of_list(sampled: timeline.PhaseEntry, entries: Sequence[timeline.PhaseEntry]) -> bool:
    return any(e.phase == "sample" and e.node_id == sampled.node_id and e is not sampled for e in entries)


def _decodes_of(
    run_id: str, context: NodeContext, entries: Sequence[timeline.PhaseEntry], list_index: int | None
) -> list[timeline.PhaseEntry]:
    """The decodes upstream of the images for this item of a list, except those of other runs' latents.

    One is of this run where it decoded the run's own latent. One of a latent that no run made, or that was changed
    since, may be of this run too.
    """
    upstream = context.upstream(context.node_id, ("images",))
    ours: list[timeline.PhaseEntry] = []
    unknown: list[timeline.PhaseEntry] = []
    for entry in context.concerning(entries, upstream):
        if entry.phase == "decode" and entry.info.get("run_id") in (run_id, None):
            (ours if entry.info.get("run_id") == run_id else unknown).append(entry)
    return [*ours, *of_item(unknown, list_index)]


def _sampling_of(run_id: str, entries: Sequence[timeline.PhaseEntry]) -> timeline.PhaseEntry | None:
    """The sampling of a run in the executing prompt."""
    return next((e for e in reversed(entries) if e.phase == "sample" and e.info.get("run_id") == run_id), None)


def _precision(record: RunRecord, infos: Sequence[Mapping[str, Any]]) -> Any:
    """The record's precision with the VAE that really decoded in place of the checkpoint's own."""
    precision = record.request.get("precision")
    used = [info["precision"] for info in infos if info.get("precision")]
    if not isinstance(precision, Mapping) or not used:
        return precision
    return {**precision, "vae": {"weight": used[-1], "compute": used[-1]}}


def merge_memory(
    memory: Mapping[str, Mapping[str, float | None]], phase: str | None, peak: Mapping[str, float | None]
) -> dict[str, Mapping[str, float | None]]:
    """The record's memory with one phase added (None: none) and the overall peaks raised to it."""
    overall = memory.get("overall", {})
    raised = {
        name: max((v for v in (overall.get(name), peak.get(name)) if v is not None), default=None)
        for name in _MEMORY_FIELDS
    }
    return {**memory, **({} if phase is None else {phase: peak}), "overall": raised}


def _with_images(record: RunRecord, images: Any, context: NodeContext, store: RunStore) -> RunRecord:
    """Save the images beside the records, with the workflow in them, and time it: text to saved image ends here."""
    started = time.perf_counter_ns()
    paths = save_pngs(images, record.run_id, context, store)
    ms = (time.perf_counter_ns() - started) / 1e6
    relative = [path.relative_to(store.root.parent).as_posix() for path in paths]
    return record.changed(
        phases_ms={**record.phases_ms, "save": round(ms, 3)},
        artifacts={**record.artifacts, "images": relative},
        request={
            **record.request,
            "width": int(images.shape[2]),
            "height": int(images.shape[1]),
            "pictures": int(images.shape[0]),
        },
    )


def _with_chart(record: RunRecord, chart: Any, store: RunStore) -> RunRecord:
    from PIL import Image

    path = store.folder("charts") / f"{record.run_id}.png"
    write_image(path, Image.fromarray(to_bytes(chart)[0]))
    relative = path.relative_to(store.root.parent).as_posix()
    return record.changed(artifacts={**record.artifacts, "chart": relative})


def save_pngs(images: Any, run_id: str, context: NodeContext, store: RunStore, first: int = 0) -> list[Path]:
    """Save IMAGEs [B, H, W, 3] as `<run id>_<number>.png`, numbered from `first`. Raises ResultsError."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    paths, folder = [], store.folder("images")
    for index, pixels in enumerate(to_bytes(images), start=first):
        path = folder / f"{run_id}_{index:03d}.png"
        write_image(path, Image.fromarray(pixels), pnginfo=_metadata(PngInfo(), context), compress_level=4)
        paths.append(path)
    return paths


def to_bytes(images: Any) -> Any:
    """IMAGEs in 0..1 as 8-bit pixels (numpy [B, H, W, 3]); NaN is black."""
    import torch

    finite = torch.nan_to_num(images.float(), nan=0.0, posinf=1.0, neginf=0.0)
    return (finite[..., :3].clamp(0, 1) * 255.0).to(torch.uint8).cpu().numpy()


def _metadata(info: Any, context: NodeContext) -> Any | None:
    """The same texts as core's Save Image writes, so that an image can be dragged back onto the canvas."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return None
    if context.prompt:
        info.add_text("prompt", json.dumps(context.prompt))
    for key, value in context.extra.items():
        info.add_text(str(key), json.dumps(value))
    return info


def _total(record: RunRecord) -> float | None:
    sample = record.phases_ms.get("sample")
    return total_ms(record.phases_ms, sample if isinstance(sample, (int, float)) else None)

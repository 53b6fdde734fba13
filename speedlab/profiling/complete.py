"""After a good run: add decode, pictures and quality to the record, write it, append its CSV row."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import compute_device, output_directory
from . import timeline
from .charts import OF_REPORT, STEPS, chart_or_blank
from .context import NodeContext
from .memory import MemoryPeak, measure_peak
from .record import RunRecord, memory_dict, total_ms
from .runner import plan_of, with_rates
from .store import RunStore, new_run_id, write_picture

_MEMORY_FIELDS = ("peak_allocated_gb", "peak_reserved_gb", "peak_rss_gb", "device_used_gb", "outside_torch_gb")


@dataclass(frozen=True)
class Completed:
    """The whole record as it lies on disk, and its charts as an IMAGE [pictures, H, W, 3], the step chart first."""

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
    record = _with_chart(record, chart, store)
    return Completed(store.keep(record), chart)


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
    if has_images and not decodes:
        phases["after_sampling"] = _since_sampling_ms(source, entries, reached_ns)
    warnings = [info["warning"] for info in infos if "warning" in info]
    return record.changed(
        request=request,
        phases_ms=phases,
        memory=merge_memory(memory, None, memory_dict(since)),
        warnings=(*record.warnings, *warnings),
    )


def _decodes_of(
    run_id: str, context: NodeContext, entries: Sequence[timeline.PhaseEntry], list_index: int | None
) -> list[timeline.PhaseEntry]:
    """The decodes upstream that decoded this run's latent, for this item of a list."""
    upstream = [e for e in context.concerning(entries) if e.phase == "decode"]
    mine = [e for e in upstream if e.info.get("run_id") == run_id]
    # A node between sampler and decoder may have dropped the mark; then every unmarked decode upstream counts.
    return mine or [e for e in upstream if e.info.get("run_id") is None and e.list_index in (None, list_index, 0)]


def _since_sampling_ms(run_id: str, entries: Sequence[timeline.PhaseEntry], reached_ns: int) -> float | None:
    """From the end of sampling to the report: where a core node decodes, this is all that is known of it."""
    ends = [e.end_ns for e in entries if e.phase == "sample" and e.info.get("run_id") == run_id]
    return round((reached_ns - ends[-1]) / 1e6, 3) if ends else None


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
    """Save the pictures beside the records, with the workflow in them, and time it: text to saved picture ends here."""
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
    write_picture(path, Image.fromarray(to_bytes(chart)[0]))
    relative = path.relative_to(store.root.parent).as_posix()
    return record.changed(artifacts={**record.artifacts, "chart": relative})


def save_pngs(images: Any, run_id: str, context: NodeContext, store: RunStore, first: int = 0) -> list[Path]:
    """Save IMAGEs [B, H, W, 3] as `<run id>_<number>.png`, numbered from `first`. Raises ResultsError."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    paths, folder = [], store.folder("images")
    for index, pixels in enumerate(to_bytes(images), start=first):
        path = folder / f"{run_id}_{index:03d}.png"
        write_picture(path, Image.fromarray(pixels), pnginfo=_metadata(PngInfo(), context), compress_level=4)
        paths.append(path)
    return paths


def to_bytes(images: Any) -> Any:
    """IMAGEs in 0..1 as 8-bit pixels (numpy [B, H, W, 3]); NaN is black."""
    import torch

    finite = torch.nan_to_num(images.float(), nan=0.0, posinf=1.0, neginf=0.0)
    return (finite[..., :3].clamp(0, 1) * 255.0).to(torch.uint8).cpu().numpy()


def _metadata(info: Any, context: NodeContext) -> Any | None:
    """The same texts as core's Save Image writes, so that a picture can be dragged back onto the canvas."""
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

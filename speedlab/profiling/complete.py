"""After a good run: add decode, pictures and quality to the record, write it, append its CSV row."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import compute_device, output_directory
from ..errors import ResultsError, first_line
from . import timeline
from .charts import chart_or_blank
from .context import NodeContext
from .memory import MemoryPeak, measure_peak
from .record import RunRecord, memory_dict, total_ms
from .runner import with_rates
from .store import RunStore

_MEMORY_FIELDS = ("peak_allocated_gb", "peak_reserved_gb", "peak_rss_gb", "device_used_gb")


@dataclass(frozen=True)
class Completed:
    """The whole record as it lies on disk, and its chart as an IMAGE [1, H, W, 3]."""

    record: RunRecord
    chart: Any


def complete(record: RunRecord, images: Any | None, context: NodeContext) -> Completed:
    """Add everything that happened since sampling and write it all. Raises ResultsError naming the path."""
    store = RunStore(output_directory())
    store.check_writable()
    with measure_peak(compute_device()) as reading:
        timeline.note_between(reading.before)
    record = _with_decode(record, context)
    if images is not None:
        record = _with_images(record, images, context, store)
    record = with_rates(record.changed(phases_ms={**record.phases_ms, "total": _total(record)}))
    chart = chart_or_blank(record)
    record = _with_chart(record, chart, store)
    store.write(record)
    store.append_csv(record)
    return Completed(record, chart)


def _with_decode(record: RunRecord, context: NodeContext) -> RunRecord:
    entries = timeline.entries(timeline.executing().prompt_id)
    decodes = [e for e in context.concerning(entries) if e.phase == "decode"]
    decoders = [str(e.info["decoder"]) for e in decodes if e.info.get("decoder") not in (None, "vae")]
    techniques = [*record.request.get("accelerators", ()), *(f"tiny_vae({name})" for name in dict.fromkeys(decoders))]
    request = {**record.request, "accelerators": techniques, "decode": [dict(e.info) for e in decodes]}
    if not record.request.get("plan_named"):
        request["plan"] = "+".join(techniques) or "stock"
    peak, since = MemoryPeak(), MemoryPeak()
    for entry in decodes:
        peak = peak.merged(entry.peak)
    for entry in entries:
        since = since.merged(entry.peak)
    memory = merge_memory(record.memory, "decode", memory_dict(peak)) if decodes else dict(record.memory)
    warnings = [e.info["warning"] for e in decodes if "warning" in e.info]
    return record.changed(
        request=request,
        phases_ms={**record.phases_ms, "decode": context.phase_ms("decode", entries)},
        memory=merge_memory(memory, None, memory_dict(since)),
        warnings=(*record.warnings, *warnings),
    )


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
    paths = _save_pngs(images, record.run_id, context, store.root / "images")
    ms = (time.perf_counter_ns() - started) / 1e6
    relative = [path.relative_to(store.root.parent).as_posix() for path in paths]
    return record.changed(
        phases_ms={**record.phases_ms, "save": round(ms, 3)},
        artifacts={**record.artifacts, "images": relative},
        request={**record.request, "width": int(images.shape[2]), "height": int(images.shape[1])},
    )


def _with_chart(record: RunRecord, chart: Any, store: RunStore) -> RunRecord:
    from PIL import Image

    path = store.root / "charts" / f"{record.run_id}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_to_bytes(chart)[0]).save(path)
    except OSError as error:
        raise ResultsError(f"The chart could not be saved to {path}: {first_line(error)}") from error
    relative = path.relative_to(store.root.parent).as_posix()
    return record.changed(artifacts={**record.artifacts, "chart": relative})


def _save_pngs(images: Any, run_id: str, context: NodeContext, folder: Path) -> list[Path]:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, pixels in enumerate(_to_bytes(images)):
            path = folder / f"{run_id}_{index:03d}.png"
            Image.fromarray(pixels).save(path, pnginfo=_metadata(PngInfo(), context), compress_level=4)
            paths.append(path)
    except OSError as error:
        raise ResultsError(f"The pictures could not be saved to {folder}: {first_line(error)}") from error
    return paths


def _to_bytes(images: Any) -> Any:
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

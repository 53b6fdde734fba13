"""Run core's KSampler under the profiler: warm-up, repeats, and a record that is written whatever happens."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..accelerate.patching import accelerators
from ..core import core_nodes, output_directory
from ..errors import ResultsError, SpeedLabError, UnavailableError, first_line
from ..loading import SOURCE, CheckpointSource, file_hash
from ..lora import LORAS
from ..precision import unet_dtypes
from ..tiny_vae import LATENT_MARK, latent_mark
from . import live, nvtx, timeline
from .clock import Mark, clock_for, host_ms
from .context import NodeContext
from .environment import environment, environment_hash
from .memory import MemoryPeak, PeakReading, measure_peak
from .record import RunRecord, memory_dict, step_dict, summarise, total_ms
from .store import RunStore, new_run_id
from .trace import SamplingTrace, StepRow, first_eval_ms, sampling_ms, step_rows, traced

log = logging.getLogger(__name__)

DETAILS = ("timing", "kernels", "trace")
_PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class SamplingRequest:
    """KSampler's settings."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure: `warmup` runs that do not count, `repeats` that do, and whether NVTX ranges are emitted."""

    detail: str = "timing"
    warmup: int = 0
    repeats: int = 1
    nvtx: bool = True


@dataclass(frozen=True)
class ProfiledLatent:
    """The first measured run's LATENT, and the record."""

    latent: dict[str, Any]
    record: RunRecord


@dataclass
class _Session:
    """What one call gathers until its record is written."""

    run_id: str
    traces: list[SamplingTrace] = field(default_factory=list)
    measured: list[SamplingTrace] = field(default_factory=list)
    peak: MemoryPeak = field(default_factory=MemoryPeak)
    status: str = "ok"
    error: str | None = None
    feed: live.LiveFeed | None = None


def profile_sampling(
    model: Any,
    request: SamplingRequest,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    options: ProfileOptions,
    context: NodeContext,
) -> ProfiledLatent:
    """Sample as core's KSampler does and measure it. The model given is not changed.

    Writes the run's JSON however it ends, and the CSV row itself when it did not end well. Raises ResultsError before
    sampling when results cannot be written, UnavailableError for a detail that cannot run here, and whatever the
    sampler raises.
    """
    _check(options, latent)
    store = RunStore(output_directory())
    store.check_writable()
    session = _Session(new_run_id())
    session.feed = live.open_feed(context, session.run_id, options.warmup, options.repeats)
    reading = PeakReading()
    try:
        with measure_peak(model.load_device) as reading:
            timeline.note_between(reading.before)
            out = _run_all(model, request, positive, negative, latent, options, session)
    except BaseException as error:
        session.status, session.error = _classify(error), _message(error)
        session.peak = reading.peak
        _keep_failed(store, model, request, latent, session, context)
        raise
    finally:
        if session.feed is not None:
            session.feed.close(session.status)
    session.peak = reading.peak
    record = _record(model, request, latent, session, context)
    try:
        store.write(record)
    except ResultsError as error:
        # The picture is worth more than its record: say what happened and let the graph go on.
        log.error("SpeedLab: %s", error)
        record = record.changed(warnings=(*record.warnings, str(error)))
    _note_sampling(session)
    return ProfiledLatent({**out, LATENT_MARK: {**latent_mark(model), "run_id": session.run_id}}, record)


def _note_sampling(session: _Session) -> None:
    """Note when sampling and its record were done: what follows, a core decoder say, is timed from here."""
    now = timeline.executing()
    told = {"run_id": session.run_id}
    timeline.note(
        timeline.PhaseEntry("sample", now.node_id, 0.0, session.peak, told, now.list_index, time.perf_counter_ns())
    )


def _run_all(
    model: Any,
    request: SamplingRequest,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    options: ProfileOptions,
    session: _Session,
) -> dict[str, Any]:
    emitter = nvtx.emitter(options.nvtx)
    first: dict[str, Any] | None = None
    with nvtx.nvtx_range(emitter, nvtx.RUN, options.repeats):
        for index in range(options.warmup + options.repeats):
            trace = SamplingTrace(clock_for(model.load_device), emitter)
            session.traces.append(trace)
            trace.observer = None if session.feed is None else session.feed.run(index)
            trace.called = Mark(time.perf_counter_ns())
            try:
                (result,) = core_nodes().common_ksampler(
                    traced(model, trace), request.seed, request.steps, request.cfg, request.sampler_name,
                    request.scheduler, positive, negative, latent, denoise=request.denoise,
                )  # fmt: skip
            except BaseException:
                # Events of a cancelled run cannot be read either before the device has come to them. A device that
                # failed refuses to be waited for; why the run failed is the error to show.
                with contextlib.suppress(RuntimeError):
                    trace.clock.settle()
                raise
            trace.clock.settle()
            if index >= options.warmup:
                session.measured.append(trace)
                first = result if first is None else first
    assert first is not None
    return first


def _check(options: ProfileOptions, latent: Mapping[str, Any]) -> None:
    if options.detail != "timing":
        raise UnavailableError(
            f"Profile Sampler cannot measure the detail '{options.detail}' in this version. Choose 'timing'."
        )
    samples = latent["samples"]
    if not getattr(samples, "is_nested", False) and samples.shape[0] == 0:
        raise SpeedLabError("The latent batch is empty: set batch_size to 1 or more.")


def _record(
    model: Any, request: SamplingRequest, latent: Mapping[str, Any], session: _Session, context: NodeContext
) -> RunRecord:
    rows = _rows(session.measured)
    runs = [ms for ms in (sampling_ms(t) for t in session.measured) if ms is not None]
    first_eval = first_eval_ms(session.traces[0]) if session.traces else None
    first_rows = step_rows(session.traces[0]) if session.traces else ()
    summary = summarise(runs, rows, first_eval, first_rows[0].ms if first_rows else None)
    now = timeline.executing()
    entries = timeline.entries(now.prompt_id)
    run = summary["run"]
    phases: dict[str, float | str | None] = {
        "load": context.phase_ms("load", entries, now.list_index),
        "text_encode": context.phase_ms("text_encode", entries, now.list_index),
        "to_device": _to_device_ms(session),
        "prepare": _prepare_ms(session),
        "first_eval": summary["first_eval_ms"],
        "sample": run and run["median"],
        "decode": None,
        "save": None,
    }
    phases["total"] = total_ms(phases, run and run["median"])
    env = environment(model.load_device)
    described = _request(model, request, latent, context, session)
    return with_rates(
        RunRecord(
            run_id=session.run_id,
            timestamp=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            status=session.status,
            error=session.error,
            env=env,
            env_hash=environment_hash(env),
            request=described,
            phases_ms=phases,
            steps=tuple(step_dict(row) for row in rows[0]) if rows else (),
            summary=summary,
            warnings=_warnings(model, session, phases),
            memory=_memory(entries, context.concerning(entries), session.peak),
        )
    )


def _warnings(model: Any, session: _Session, phases: Mapping[str, float | str | None]) -> tuple[str, ...]:
    notes = [note for trace in session.traces for note in trace.notes]
    notes += [match.warning() for match in model.get_attachment(LORAS) or () if match.matched < match.total]
    if phases["text_encode"] is None:
        notes.append("A core node encoded the text, so the time from text to picture is not known.")
    elif phases["text_encode"] == "cached":
        notes.append("ComfyUI had the encoded text in its cache; text encoding is not in the total.")
    return tuple(dict.fromkeys(notes))


def with_rates(record: RunRecord) -> RunRecord:
    """The record with images a minute from its present total."""
    total = record.phases_ms.get("total")
    batch = record.request.get("pictures", record.request.get("batch"))
    rate = 60000.0 * batch / total if isinstance(total, (int, float)) and total > 0 and batch else None
    return record.changed(summary={**record.summary, "images_per_min": rate and round(rate, 4)})


def _rows(traces: list[SamplingTrace]) -> list[tuple[StepRow, ...]]:
    return [rows for rows in (step_rows(trace) for trace in traces) if rows]


def _to_device_ms(session: _Session) -> float | None:
    """Moving weights to the device and patching LoRAs into them, of the first run: later ones find all in place."""
    return round(session.traces[0].to_device_ms, 3) if session.traces else None


def _prepare_ms(session: _Session) -> float | None:
    """Noise and conditioning, of the first measured run."""
    trace = session.measured[0] if session.measured else None
    if trace is None or trace.called is None or trace.start is None:
        return None
    return round(host_ms(trace.called, trace.start) - trace.to_device_ms, 3)


def _request(
    model: Any, request: SamplingRequest, latent: Mapping[str, Any], context: NodeContext, session: _Session
) -> dict[str, Any]:
    samples = latent["samples"]
    shape = tuple(samples.shape) if not getattr(samples, "is_nested", False) else tuple(samples.unbind()[0].shape)
    techniques = [accelerator.describe() for accelerator in accelerators(model)]
    named = context.scenario()
    source: CheckpointSource | None = model.get_attachment(SOURCE)
    return {
        "sampled_as": session.run_id,
        "scenario": named.get("scenario"),
        "plan": named.get("plan") or "+".join(techniques) or "stock",
        "plan_named": "plan" in named,
        "checkpoint": _checkpoint(source, context, with_hash=session.status == "ok"),
        "model": type(model.model).__name__,
        "sampler": request.sampler_name,
        "scheduler": request.scheduler,
        "steps": request.steps,
        "cfg": request.cfg,
        "denoise": request.denoise,
        "width": shape[-1] * _PIXELS_PER_LATENT,
        "height": shape[-2] * _PIXELS_PER_LATENT,
        "batch": shape[0],
        "seed": request.seed,
        "precision": {**(source.parts if source else {}), "unet": unet_dtypes(model)},
        "accelerators": techniques,
        "loras": [match.describe() for match in model.get_attachment(LORAS) or ()],
    }


def _checkpoint(source: CheckpointSource | None, context: NodeContext, with_hash: bool) -> dict[str, Any] | None:
    if source is None:
        name = context.checkpoint_name()
        return {"name": name, "sha256": None} if name else None
    digest = None
    if with_hash:
        try:
            digest = file_hash(source.path, output_directory() / "speedlab" / "hashes.json")
        except OSError as error:
            log.warning("SpeedLab: %s could not be read again for its hash: %s", source.path, first_line(error))
    return {"name": source.name, "sha256": digest, "family": source.family, "size_bytes": source.size_bytes}


def _memory(
    entries: Sequence[timeline.PhaseEntry], upstream: Sequence[timeline.PhaseEntry], sampling: MemoryPeak
) -> dict[str, dict[str, float | None]]:
    """Peaks of the phases upstream and of this sampling, and overall since the prompt's first measured block."""
    by_phase: dict[str, MemoryPeak] = {}
    for entry in upstream:
        if entry.phase not in ("between", "sample"):
            by_phase[entry.phase] = by_phase.get(entry.phase, MemoryPeak()).merged(entry.peak)
    by_phase["sample"] = overall = sampling
    for entry in entries:
        overall = overall.merged(entry.peak)
    return {**{name: memory_dict(peak) for name, peak in by_phase.items()}, "overall": memory_dict(overall)}


def _classify(error: BaseException) -> str:
    import comfy.model_management as mm

    if isinstance(error, (mm.InterruptProcessingException, KeyboardInterrupt)):
        return "cancelled"
    if isinstance(error, (mm.OOM_EXCEPTION, MemoryError)) and mm.OOM_EXCEPTION is not Exception:
        return "oom"
    text = str(error).lower()
    return "oom" if "out of memory" in text or "defaultcpuallocator" in text else "error"


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _keep_failed(
    store: RunStore,
    model: Any,
    request: SamplingRequest,
    latent: Mapping[str, Any],
    session: _Session,
    context: NodeContext,
) -> None:
    """Record a run that did not end well; its own error matters more than any of writing it down."""
    try:
        record = _record(model, request, latent, session, context)
        store.write(record)
        store.append_csv(record)
    except Exception as error:  # a device that failed may refuse anything, and the first error is the one to show
        log.error("SpeedLab: the failed run %s could not be recorded: %s", session.run_id, first_line(error))

"""Run core's KSampler under the profiler: warm-up, repeats, and a record that is written whatever happens."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from ..common.core import core_nodes, is_out_of_memory, output_directory
from ..common.dtypes import unet_dtypes
from ..common.errors import ResultsError, SpeedLabError, UnavailableError, first_line
from ..common.timing import tells_of_dynamo, watching
from ..measure import nvtx, timeline
from ..measure.clock import clock_for
from ..measure.context import NodeContext
from ..measure.environment import environment, environment_hash
from ..measure.kernel_profile import DETAILS, TIMING, KernelProfile, measure_kernel_profile
from ..measure.peaks import MemoryPeak, PeakReading, measure_peak
from ..measure.plan_names import plan_of
from ..measure.record import OTHERS, UNKNOWN, RunRecord, memory_dict, step_dict, total_ms
from ..measure.store import RunStore, new_run_id
from ..measure.summary import summarise
from ..measure.torch_trace import require_profiler
from ..measure.trace import (
    Observer,
    SamplingTrace,
    StepRow,
    around_ms,
    compile_ms,
    first_eval_ms,
    part_rows,
    sampling_ms,
    step_rows,
    to_device_ms,
    traced,
)
from ..models.latent_mark import marked
from ..models.loading import HASHED, SOURCE, CheckpointSource, sampled_hash
from ..models.lora import LORAS
from ..patching.compiled import CompileCounts, compile_counts, counts_between
from ..patching.wrappers import Accelerator, accelerators

log = logging.getLogger(__name__)

_PIXELS_PER_LATENT = 8
_NOTABLE_SHARE = 0.01
_NOTABLE_EXCESS, _NOTABLE_EXCESS_MS = 0.1, 50.0
# For each network the patches that it sampled with last; a network that is gone is forgotten.
_sampled_with: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@dataclass(frozen=True)
class SamplingRequest:
    """KSampler's settings. `more` goes into the record as it is: what a sampler of another kind has beside them.

    `others` are further models of the run by their role, whose techniques count too.
    """

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure: `warmup` runs that do not count, `repeats` that do, and whether NVTX ranges are emitted.

    `detail` is one of DETAILS; the others than `timing` profile some steps again, after the measured runs.
    `part`: one part of a larger measurement, whose owner writes the record; nothing is written or noted here.
    `on_step` is called with the number of each finished step in place of ComfyUI's own progress bar and preview.
    """

    detail: str = TIMING
    warmup: int = 0
    repeats: int = 1
    nvtx: bool = True
    part: bool = False
    on_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class ProfiledLatent:
    """The first measured run's LATENT, and the record."""

    latent: dict[str, Any]
    record: RunRecord


class Feed(Protocol):
    """Shows the runs of one call while they go on."""

    def run(self, index: int) -> Observer:
        """The observer of run `index`, counted from the first warm-up."""

    def close(self, state: str) -> None:
        """The call ended; `state` is its record's status."""


# Gets the node's context, run id, warm-up runs and repeats; None where nobody watches.
OpenFeed = Callable[[NodeContext, str, int, int], Feed | None]


@dataclass
class _Feeds:
    """Who shows runs while they go on: nobody, until a server registers its live feed."""

    open: OpenFeed = lambda *_: None


_feeds = _Feeds()


def show_runs_through(open_feed: OpenFeed) -> None:
    """Have every run from now on shown by the feed that `open_feed` opens for it."""
    _feeds.open = open_feed


# One whole run under a fresh trace; gives the LATENT.
Sampling = Callable[[SamplingTrace], dict[str, Any]]


@dataclass
class _Session:
    """What one call gathers until its record is written."""

    run_id: str
    traces: list[SamplingTrace] = field(default_factory=list)
    measured: list[SamplingTrace] = field(default_factory=list)
    peak: MemoryPeak = field(default_factory=MemoryPeak)
    kernel_profile: KernelProfile = field(default_factory=KernelProfile)
    status: str = "ok"
    error: str | None = None
    feed: Feed | None = None
    first_use: bool = False
    compiled_unseen: bool = False


def profile_sampling(
    model: Any,
    request: SamplingRequest,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    options: ProfileOptions,
    context: NodeContext,
) -> ProfiledLatent:
    """Sample as core's KSampler does and measure it; see `profile_run`. The model given is not changed."""

    def observe(observed: Any) -> dict[str, Any]:
        (result,) = core_nodes().common_ksampler(
            observed, request.seed, request.steps, request.cfg, request.sampler_name, request.scheduler, positive,
            negative, latent, denoise=request.denoise,
        )  # fmt: skip
        return dict(result)

    def sample(trace: SamplingTrace) -> dict[str, Any]:
        return observe(traced(model, trace))

    return profile_run(model, request, latent, options, context, sample, observe=observe)


def profile_run(
    model: Any,
    request: SamplingRequest,
    latent: Mapping[str, Any],
    options: ProfileOptions,
    context: NodeContext,
    sample: Sampling,
    *,
    observe: Callable[[Any], dict[str, Any]] | None = None,
) -> ProfiledLatent:
    """Measure the runs that `sample` makes; `model` is the one that the record describes.

    `observe(model)` makes one more run, or of several models' run the first one's part, on the observed view of `model`
    that it is given; without it no detail but `timing` can be had.

    Writes the run's JSON however it ends, and the CSV row itself when it did not end well. Raises ResultsError before
    sampling when results cannot be written, UnavailableError for a detail that cannot run here, and whatever the
    sampler raises.
    """
    _check(options, latent)
    store = RunStore(output_directory())
    store.check_writable()
    session = _Session(new_run_id(), first_use=_is_first_use(model))
    if not options.part:
        session.feed = _feeds.open(context, session.run_id, options.warmup, options.repeats)
    reading = PeakReading()
    try:
        with measure_peak(model.load_device) as reading:
            if not options.part:
                timeline.note_between(reading.before)
            compiled = compile_counts()
            out = _run_all(model, options, session, sample)
            compilations = counts_between(compiled, compile_counts())["compilations"]
            session.compiled_unseen = bool(compilations) and not tells_of_dynamo()
        if observe is not None and options.detail != TIMING:
            session.kernel_profile = _look_closer(model, observe, options, session, store, compiled)
    except BaseException as error:
        session.status, session.error = failure_status(error), failure_message(error)
        session.peak = reading.peak
        if options.part:
            raise
        _keep_failed(store, model, request, latent, session, context)
        raise
    finally:
        if session.feed is not None:
            session.feed.close(session.status)
    session.peak = reading.peak
    record = _record(model, request, latent, session, context)
    out = marked(out, model, session.run_id)
    if options.part:
        return ProfiledLatent(out, record)
    upstream = context.ancestors()
    record = with_others(record, context, {*context.samplers(upstream), *context.working(upstream)})
    try:
        store.write(record)
    except ResultsError as error:
        # The image is worth more than its record: say what happened and let the graph go on.
        log.error("SpeedLab: %s", error)
        record = record.changed(warnings=(*record.warnings, str(error)))
    _note_sampling(session)
    return ProfiledLatent(out, record)


def _is_first_use(model: Any) -> bool:
    """Whether nothing was sampled yet with this network and these patches, so that its weights have still to come."""
    before = _sampled_with.get(model.model)
    _sampled_with[model.model] = model.patches_uuid
    return bool(before != model.patches_uuid)


def _note_sampling(session: _Session) -> None:
    """Note when sampling and its record were done: what follows, a core decoder say, is timed from here."""
    now = timeline.executing()
    told = {"run_id": session.run_id}
    timeline.note(
        timeline.PhaseEntry("sample", now.node_id, 0.0, session.peak, told, now.list_index, time.perf_counter_ns())
    )


def _run_all(model: Any, options: ProfileOptions, session: _Session, sample: Sampling) -> dict[str, Any]:
    emitter = nvtx.emitter(options.nvtx)
    first: dict[str, Any] | None = None
    with nvtx.nvtx_range(emitter, nvtx.RUN, options.repeats):
        for index in range(options.warmup + options.repeats):
            trace = SamplingTrace(clock_for(model.load_device), emitter, on_step=options.on_step)
            session.traces.append(trace)
            trace.observer = None if session.feed is None else session.feed.run(index)
            trace.called = trace.clock.mark()
            try:
                with watching(trace.clock.mark, trace.apart):
                    result = sample(trace)
            except BaseException:
                # Events of a cancelled run cannot be read either before the device has come to them. A device that
                # failed refuses to be waited for; why the run failed is the error to show.
                with contextlib.suppress(RuntimeError):
                    trace.clock.settle()
                raise
            trace.returned = trace.clock.mark()
            trace.clock.settle()
            if index >= options.warmup:
                session.measured.append(trace)
                first = result if first is None else first
    assert first is not None
    return first


def _look_closer(
    model: Any,
    observe: Callable[[Any], dict[str, Any]],
    options: ProfileOptions,
    session: _Session,
    store: RunStore,
    compiled: CompileCounts,
) -> KernelProfile:
    """Kernels and operations of some steps; `compiled` was read before the measured runs."""
    timed = session.measured[0]
    return measure_kernel_profile(
        options.detail, observe, model, timed, part_rows(timed), compiled, store, session.run_id
    )


def _check(options: ProfileOptions, latent: Mapping[str, Any]) -> None:
    if options.detail not in DETAILS:
        raise UnavailableError(f"Profile Sampler has no detail '{options.detail}'. Choose one of {', '.join(DETAILS)}.")
    if options.detail != TIMING:
        require_profiler(options.detail)
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
        "compile": _compile_ms(session),
        "text_encode": context.phase_ms("text_encode", entries, now.list_index),
        "free": context.phase_ms("free", entries, now.list_index),
        "to_device": _to_device_ms(session),
        "prepare": _prepare_ms(session),
        "first_eval": summary["first_eval_ms"],
        "sample": run and run["median"],
        "decode": None,
        "save": None,
    }
    phases["total"] = total_ms(phases, run and run["median"])
    outside = environment(model.load_device)
    conditions = next((trace.conditions for trace in session.traces if trace.conditions is not None), None)
    env = outside if conditions is None else {**outside, "flags": conditions.flags}
    described = _request(model, request, latent, context, session)
    return with_rates(
        RunRecord(
            run_id=session.run_id,
            timestamp=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            status=session.status,
            error=session.error,
            env=env,
            env_hash=environment_hash(outside),
            request=described,
            phases_ms=phases,
            steps=tuple(step_dict(row) for row in rows[0]) if rows else (),
            summary=summary,
            warnings=_warnings(model, session, phases, summary["first_step_excess_ms"]),
            memory=_memory(entries, context.concerning(entries), session.peak),
            kernels=session.kernel_profile.kernels,
            kernel_profile=session.kernel_profile.profile,
            roofline=session.kernel_profile.roofline,
            artifacts=dict(session.kernel_profile.artifacts),
        )
    )


def _warnings(
    model: Any, session: _Session, phases: Mapping[str, float | str | None], excess_ms: float | None
) -> tuple[str, ...]:
    notes = [note for trace in session.traces for part in trace.parts() for note in part.notes]
    notes += session.kernel_profile.notes
    if any(not trace.clock.is_synchronised for trace in session.traces):
        notes.append(
            f"PyTorch cannot wait for the device {model.load_device.type} here (its backend has no synchronize): the "
            "times tell when work was queued, not when it was done, so steps and phases cannot be told apart for sure."
        )
    notes += [warning for match in model.get_attachment(LORAS) or () for warning in match.warnings()]
    if phases["text_encode"] is None:
        notes.append("A core node encoded the text, so the time from text to image is not known.")
    elif phases["text_encode"] == "cached":
        notes.append(
            "ComfyUI had the encoded text, or a part of it, in its cache, so the time from text to image is not "
            "known. Change the texts to have it measured."
        )
    if session.compiled_unseen:
        notes.append(
            "torch.compile compiled in this run, and PyTorch here does not tell how long that took: it is "
            "part of the sampling time and of the time from text to image. Set warmup to 1, or queue the prompt again."
        )
    notes += [*_first_move(session, phases), *_first_step(session, phases, excess_ms)]
    return tuple(dict.fromkeys(notes))


def _first_move(session: _Session, phases: Mapping[str, float | str | None]) -> list[str]:
    """What to say where the move of weights may be one that no repeat pays again."""
    moved, sampled = phases.get("to_device"), phases.get("sample")
    if not session.first_use or not isinstance(moved, float) or not isinstance(sampled, (int, float)):
        return []
    if moved < _NOTABLE_SHARE * (moved + sampled):
        return []
    return [
        f"This prompt is the first that sampled with this model and its LoRAs: {moved:.0f} ms of the time from text to "
        "image moved its weights to the device. Queue the prompt again, with other texts, for the time of a repeat."
    ]


def _first_step(session: _Session, phases: Mapping[str, float | str | None], excess_ms: float | None) -> list[str]:
    """What to say where the first step did more than compile that no repeat does again."""
    sampled, is_first = phases.get("sample"), session.first_use or phases.get("compile")
    if not is_first or len(session.traces) > 1 or excess_ms is None or not isinstance(sampled, (int, float)):
        return []
    if excess_ms < max(_NOTABLE_EXCESS * sampled, _NOTABLE_EXCESS_MS):
        return []
    return [
        f"This prompt is the first that sampled with this model as it is set up: its first step took {excess_ms:.0f} "
        "ms longer than later ones, which is part of the sampling time. Set warmup to 1, or queue the prompt again "
        "with other texts, for the time of a repeat."
    ]


def with_others(record: RunRecord, context: NodeContext, nodes: Collection[str], why: str = "") -> RunRecord:
    """The record without a total, where these nodes worked on the same image too; `why` replaces the warning."""
    if not nodes and not why:
        return record
    why = why or (
        f"The image is also the work of {context.names(nodes)}, which is not measured here, so the time from text to "
        "image is not known."
    )
    phases = {**record.phases_ms, OTHERS: UNKNOWN, "total": None}
    return record.changed(phases_ms=phases, warnings=tuple(dict.fromkeys((*record.warnings, why))))


def with_rates(record: RunRecord) -> RunRecord:
    """The record with images a minute from its present total."""
    total = record.phases_ms.get("total")
    batch = record.request.get("pictures", record.request.get("batch"))
    rate = 60000.0 * batch / total if isinstance(total, (int, float)) and total > 0 and batch else None
    return record.changed(summary={**record.summary, "images_per_min": rate and round(rate, 4)})


def _rows(traces: list[SamplingTrace]) -> list[tuple[StepRow, ...]]:
    return [rows for rows in (step_rows(trace) for trace in traces) if rows]


def _to_device_ms(session: _Session) -> float | None:
    """Moving weights to the device and patching LoRAs into them, of the first run, warm-up included.

    It alone follows the prompt's text encoding, so it pays what a repeat of the prompt pays; later ones find all in
    place.
    """
    return round(to_device_ms(session.traces[0]), 3) if session.traces else None


def _compile_ms(session: _Session) -> float | None:
    """Compiling and timing of alternatives in all runs, warm-up included; None where there was none."""
    return round(sum(compile_ms(trace) for trace in session.traces), 3) or None


def _prepare_ms(session: _Session) -> float | None:
    """Noise, conditioning and cleaning up, of the first measured run."""
    around = around_ms(session.measured[0]) if session.measured else None
    return None if around is None else round(around, 3)


def _request(
    model: Any, request: SamplingRequest, latent: Mapping[str, Any], context: NodeContext, session: _Session
) -> dict[str, Any]:
    samples = latent["samples"]
    shape = tuple(samples.shape) if not getattr(samples, "is_nested", False) else tuple(samples.unbind()[0].shape)
    models = {"": model, **request.others}
    asked = [text for role, one in models.items() for text in _described(role, accelerators(one))]
    techniques = [text for role, one in models.items() for text in _described(role, _what_ran(one, role, session))]
    named, ran = context.scenario(), plan_of(techniques)
    # A graph may have been changed since it was named, and a technique may have done nothing: what ran wins.
    is_named = "plan" in named and techniques == asked and context.is_plan_as_named()
    source: CheckpointSource | None = model.get_attachment(SOURCE)
    return {
        "sampled_as": session.run_id,
        "scenario": named.get("scenario"),
        "plan": named["plan"] if is_named else ran,
        "plan_named": is_named,
        **({"label": named["plan"]} if "plan" in named and not is_named else {}),
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
        **({} if techniques == asked else {"asked": asked}),
        "loras": [match.describe() for match in model.get_attachment(LORAS) or ()],
        **request.more,
    }


def _described(role: str, techniques: Iterable[Accelerator]) -> list[str]:
    """Techniques as text; those of a further model with its role before them."""
    return [f"{role}:{one.describe()}" if role else one.describe() for one in techniques]


def _what_ran(model: Any, role: str, session: _Session) -> list[Accelerator]:
    """The techniques of a model as the first measured run used them; one that did nothing is none.

    `role` is that of a further model of the run, "" of the one that the record describes.
    """
    trace = next(iter(session.measured or session.traces[-1:]), None)
    if trace is not None and role:
        trace = next((part for part in trace.parts() if part.model_role == role), None)
    instead = {} if trace is None else trace.ran
    return [
        Accelerator(known.name, instead.get(known.name) or known.options)
        for known in accelerators(model)
        if known.name not in instead or instead[known.name] is not None
    ]


def _checkpoint(source: CheckpointSource | None, context: NodeContext, with_hash: bool) -> dict[str, Any] | None:
    if source is None:
        name = context.checkpoint_name()
        return {"name": name, "sampled_sha256": None} if name else None
    digest = None
    if with_hash:
        try:
            digest = sampled_hash(source.path)
        except OSError as error:
            log.warning("SpeedLab: %s could not be read again for its hash: %s", source.path, first_line(error))
    told = {"sampled_sha256": digest, "hashed": HASHED if digest else None}
    return {"name": source.name, **told, "family": source.family, "size_bytes": source.size_bytes}


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


def failure_status(error: BaseException) -> str:
    """The record's status for what ended a run: cancelled, oom or error."""
    import comfy.model_management as mm

    if isinstance(error, (mm.InterruptProcessingException, KeyboardInterrupt)):
        return "cancelled"
    return "oom" if is_out_of_memory(error) else "error"


def failure_message(error: BaseException) -> str:
    """The record's error text: type and first line."""
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
        store.keep(_record(model, request, latent, session, context))
    except Exception as error:  # a device that failed may refuse anything, and the first error is the one to show
        log.error("SpeedLab: the failed run %s could not be recorded: %s", session.run_id, first_line(error))

"""Run core's KSampler under the profiler: warm-up, repeats, and a record that is written whatever happens."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ..common.core import core_nodes, is_out_of_memory, output_directory
from ..common.errors import ResultsError, SpeedLabError, UnavailableError, first_line
from ..common.timing import tells_of_dynamo, watching
from ..measure import nvtx, timeline
from ..measure.clock import clock_for
from ..measure.context import NodeContext
from ..measure.kernel_profile import DETAILS, TIMING, KernelProfile, measure_kernel_profile
from ..measure.peaks import MemoryPeak, PeakReading, measure_peak
from ..measure.record import RunRecord
from ..measure.store import RunStore, new_run_id
from ..measure.torch_trace import require_profiler
from ..measure.trace import SamplingTrace, part_rows, traced
from ..models.latent_mark import marked
from ..patching.compiled import CompileCounts, compile_counts, counts_between
from ..patching.wrappers import has_work_units
from .run_record import Feed, SamplingRequest, Session, record_of, with_others

log = logging.getLogger(__name__)

# For each network the patches that it sampled with last; a network that is gone is forgotten.
_sampled_with: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


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


# Gets the node's context, run id, warm-up runs and repeats; None where no browser shows it.
OpenFeed = Callable[[NodeContext, str, int, int], Feed | None]


@dataclass
class _Feeds:
    """Who shows runs while they go on: none, until a server registers its live feed."""

    open: OpenFeed = lambda *_: None


_feeds = _Feeds()


def show_runs_through(open_feed: OpenFeed) -> None:
    """Have every run from now on shown by the feed that `open_feed` opens for it."""
    _feeds.open = open_feed


# One whole run under a fresh trace; gives the LATENT.
Sampling = Callable[[SamplingTrace], dict[str, Any]]


def profile_sampling(
    model: Any,
    request: SamplingRequest,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    options: ProfileOptions,
    context: NodeContext,
) -> ProfiledLatent:
    """Sample as core's KSampler does, or as SamplerCustom on sigmas, and measure it; see `profile_run`.

    The model given is not changed.
    """

    def observe(observed: Any) -> dict[str, Any]:
        if request.sigmas is not None:
            return _on_sigmas(observed, request, positive, negative, latent)
        (result,) = core_nodes().common_ksampler(
            observed, request.seed, request.steps, request.cfg, request.sampler_name, request.scheduler, positive,
            negative, latent, denoise=request.denoise,
        )  # fmt: skip
        return dict(result)

    def sample(trace: SamplingTrace) -> dict[str, Any]:
        return observe(traced(model, trace))

    return profile_run(model, request, latent, options, context, sample, observe=observe)


def _on_sigmas(
    model: Any, request: SamplingRequest, positive: Any, negative: Any, latent: Mapping[str, Any]
) -> dict[str, Any]:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    made = getattr(SamplerCustom(), SamplerCustom.FUNCTION)(
        model=model, add_noise=True, noise_seed=request.seed, cfg=request.cfg, positive=positive, negative=negative,
        sampler=comfy.samplers.sampler_object(request.sampler_name), sigmas=request.sigmas, latent_image=latent,
    )  # fmt: skip
    return dict(getattr(made, "result", made)[0])


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
    _check(model, options, latent)
    store = RunStore(output_directory())
    store.check_writable()
    session = Session(new_run_id(), first_use=_is_first_use(model))
    if not options.part:
        session.feed = _feeds.open(context, session.run_id, options.warmup, options.repeats)
    reading = PeakReading()
    try:
        with measure_peak(model.load_device) as reading:
            if not options.part:
                timeline.note_between(reading.before)
            compiled = compile_counts()
            out = _run_all(model, options, session, sample, reading.part)
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
    record = record_of(model, request, latent, session, context)
    out = marked(out, model, session.run_id)
    if options.part:
        return ProfiledLatent(out, record)
    upstream = context.ancestors()
    record = with_others(record, context, {*context.samplers(upstream), *context.working(upstream)})
    try:
        store.write(record)
    except ResultsError as error:
        # A missing record is no reason to lose the image: report it and let the graph go on.
        log.error("SpeedLab: %s", error)
        record = record.changed(warnings=(*record.warnings, str(error)))
    _note_sampling(session)
    return ProfiledLatent(out, record)


def _is_first_use(model: Any) -> bool:
    """Whether nothing was sampled yet with this network and these patches, so that its weights have still to come."""
    before = _sampled_with.get(model.model)
    _sampled_with[model.model] = model.patches_uuid
    return bool(before != model.patches_uuid)


def _note_sampling(session: Session) -> None:
    """Note when sampling and its record were done: what follows, a core decoder say, is timed from here."""
    now = timeline.executing()
    facts = {"run_id": session.run_id}
    timeline.note(
        timeline.PhaseEntry("sample", now.node_id, 0.0, session.peak, facts, now.list_index, time.perf_counter_ns())
    )


def _run_all(
    model: Any, options: ProfileOptions, session: Session, sample: Sampling, memory: Callable[[], MemoryPeak]
) -> dict[str, Any]:
    emitter = nvtx.emitter(options.nvtx)
    first: dict[str, Any] | None = None
    with nvtx.nvtx_range(emitter, nvtx.RUN, options.repeats):
        for index in range(options.warmup + options.repeats):
            trace = SamplingTrace(clock_for(model.load_device), emitter, on_step=options.on_step, memory=memory)
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
    session: Session,
    store: RunStore,
    compiled: CompileCounts,
) -> KernelProfile:
    """Kernels and operations of some steps; `compiled` was read before the measured runs."""
    timed = session.measured[0]
    return measure_kernel_profile(
        options.detail, observe, model, timed, part_rows(timed), compiled, store, session.run_id
    )


def _check(model: Any, options: ProfileOptions, latent: Mapping[str, Any]) -> None:
    if options.detail not in DETAILS:
        raise UnavailableError(f"Profile Sampler has no detail '{options.detail}'. Choose one of {', '.join(DETAILS)}.")
    if options.detail != TIMING:
        if has_work_units(model):
            raise UnavailableError(
                f"Profile Sampler's detail {options.detail} and MultiGPU Work Units cannot work on one model: those "
                "evaluate it on several GPUs at once, and kernels and operations are recorded on one. Set detail to "
                f"{TIMING}, or take MultiGPU Work Units out of the graph."
            )
        require_profiler(options.detail)
    samples = latent["samples"]
    if not getattr(samples, "is_nested", False) and samples.shape[0] == 0:
        raise SpeedLabError("The latent batch is empty: set batch_size to 1 or more.")


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
    session: Session,
    context: NodeContext,
) -> None:
    """Record a run that did not end well; its own error matters more than any of writing it down."""
    try:
        store.keep(record_of(model, request, latent, session, context))
    except Exception as error:  # a device that failed may refuse anything, and the first error is the one to show
        log.error("SpeedLab: the failed run %s could not be recorded: %s", session.run_id, first_line(error))

"""The details `kernels` and `trace`: what the steps of a run that was timed before were made of.

Everything here happens after the timed run, in passes of its own, so no timed number and no latent changes. A pass that
fails costs the detail and says so in the record: the image is kept without its profile.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import first_line
from ..patching.compiled import CompileCounts, compile_counts, counts_between, is_compiled
from ..patching.wrappers import Site, attach
from .flops import Sampling, can_count_compiled, count_flops, run_pass
from .kernels import OPERATORS, KernelReport, analyse
from .peaks import measure_peak
from .profile_window import Recorder, Window, choose_window
from .roofline import Peak, measured_peak, roofline
from .store import RunStore
from .torch_trace import spans_of, write_trace
from .trace import SamplingTrace, StepRow, evaluation_steps

log = logging.getLogger(__name__)

_PEAK_KEY = "speedlab.peak"
TIMING, KERNELS, TRACE = "timing", "kernels", "trace"
DETAILS = (TIMING, KERNELS, TRACE)


@dataclass(frozen=True)
class KernelProfile:
    """Fields of the record that a detail fills. `profile` is its `kernel_profile`."""

    kernels: tuple[dict[str, Any], ...] = ()
    profile: dict[str, Any] | None = None
    roofline: dict[str, Any] | None = None
    artifacts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure_kernel_profile(
    detail: str,
    sample: Sampling,
    model: Any,
    timed: SamplingTrace,
    rows: Sequence[StepRow],
    compiled_before: CompileCounts,
    store: RunStore,
    run_id: str,
) -> KernelProfile:
    """Profile and count the steps of the run `timed`, whose rows are `rows`. The clock must have settled.

    `sample(model)` repeats that run. Raises what a cancel raises; any other failure becomes a note.
    """
    if detail == TIMING:
        return KernelProfile()
    compiled = compile_counts()
    owners = evaluation_steps(timed) if rows else []
    window = choose_window(rows, owners)
    if window is None:
        return KernelProfile(notes=("Nothing was evaluated, so there is nothing to profile.",))
    with _unseen_by_memory_peaks(model.load_device):
        kernel_profile = _profiled(detail, sample, model, window, owners, rows, store, run_id)
        kernel_profile = _with_compile_counts(kernel_profile, model, compiled_before, compiled)
        return _with_roofline(kernel_profile, sample, model, window, timed, rows)


@contextmanager
def _unseen_by_memory_peaks(device: Any) -> Iterator[None]:
    """Peaks of the phases that follow must not hold what the profiler and the counting took."""
    try:
        yield
    finally:
        with measure_peak(device):
            pass


def _profiled(
    detail: str,
    sample: Sampling,
    model: Any,
    window: Window,
    owners: Sequence[int],
    rows: Sequence[StepRow],
    store: RunStore,
    run_id: str,
) -> KernelProfile:
    notes = list(window.notes)
    report: KernelReport | None = None
    artifacts: dict[str, str] = {}
    with _reported("The steps could not be profiled", notes):
        recorder = Recorder(window, owners, model.load_device)
        run_pass(sample, model, recorder)
        if not recorder.complete:
            notes.append("The profiled pass ended before its last step, so the table is not whole.")
        with recorder.trace() as trace:
            report = analyse(spans_of(trace))
            if detail == TRACE:
                artifacts["trace"] = write_trace(trace, run_id, window.steps, store)
    if report is None:
        return KernelProfile(notes=tuple(notes))
    if report.unit == OPERATORS and model.load_device.type == "cuda":
        notes.append(
            "The driver let the profiler see no kernel, so the table shows operators of the host. Another profiler, or "
            "a container without performance counters, does that."
        )
    return KernelProfile(report.rows, _profile(report, window, rows), None, artifacts, tuple(notes))


def _profile(report: KernelReport, window: Window, rows: Sequence[StepRow]) -> dict[str, Any]:
    names = (part.name for part in dataclasses.fields(report) if part.name != "rows")
    chosen = [row for row in rows if row.index in window.steps]
    return {
        **{name: getattr(report, name) for name in names},
        "steps": list(window.steps),
        "evaluations": window.end - window.first,
        "cached_steps": sum(1 for row in chosen if row.cached),
    }


def _with_compile_counts(
    kernel_profile: KernelProfile, model: Any, before: CompileCounts, after: CompileCounts
) -> KernelProfile:
    if kernel_profile.profile is None:
        return kernel_profile
    counts = counts_between(before, after)
    counted = counts if any(counts.values()) or is_compiled(model) else None
    return dataclasses.replace(kernel_profile, profile={**kernel_profile.profile, "compile": counted})


def _with_roofline(
    kernel_profile: KernelProfile,
    sample: Sampling,
    model: Any,
    window: Window,
    timed: SamplingTrace,
    rows: Sequence[StepRow],
) -> KernelProfile:
    notes = list(kernel_profile.notes)
    if is_compiled(model) and not can_count_compiled():
        notes.append("This torch cannot run a compiled model eagerly, so its operations were not counted.")
        return dataclasses.replace(kernel_profile, notes=tuple(notes))
    found: dict[str, Any] | None = None
    evaluations = [timed.evaluations[n] for n in window.evaluations]
    timed_ms = sum(row.ms for row in rows if row.index in window.steps)
    with _reported("The operations of a forward could not be counted", notes):
        peaks: list[Peak] = []

        def observed(counted: Any) -> object:
            return sample(_with_peak(counted, _compute_dtype(model, timed), peaks, notes))

        count = count_flops(observed, model, timed.evaluations, window.evaluations)
        found = roofline(count, evaluations, len(window.steps), timed_ms, peaks[0] if peaks else None)
        if found is None:
            notes.append("This model runs outside of PyTorch, where its operations cannot be counted.")
        elif peaks and found["tflops"] is not None and found["peak_share"] is None:
            notes.append(
                f"The steps ran at {found['tflops']:.3g} TFLOP/s, above the {peaks[0].tflops:.3g} TFLOP/s of the peak "
                f"({peaks[0].name}), so no share of it is given: other work slowed its measurement, or the model "
                "computes in a faster way than this product. Profile again on a quiet machine."
            )
    return dataclasses.replace(kernel_profile, roofline=found, notes=tuple(notes))


def _compute_dtype(model: Any, timed: SamplingTrace) -> Any:
    """What the timed run multiplied in: autocast's dtype where a technique had switched it on."""
    cast = None if timed.conditions is None else timed.conditions.autocast
    return cast or model.get_model_object("manual_cast_dtype") or model.model_dtype()


def _with_peak(model: Any, dtype: Any, peaks: list[Peak], notes: list[str]) -> Any:
    """A clone whose sampling measures the peak first: only there are the flags those that the timed run had."""

    def sampler_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with _reported("The peak of this device could not be measured", notes):
            peaks.append(measured_peak(model.load_device, dtype))
        return executor(*args, **kwargs)

    return attach(model, _PEAK_KEY, {Site.SAMPLER_SAMPLE: sampler_sample})


@contextmanager
def _reported(what: str, notes: list[str]) -> Iterator[None]:
    """A failure inside becomes a note of the record and a line in the log; a cancel goes on its way."""
    import comfy.model_management as mm

    try:
        yield
    except mm.InterruptProcessingException:
        raise
    except Exception as error:  # profiler, driver and model raise types of their own, and each must be reported
        note = f"{what}: {type(error).__name__}: {first_line(error)}"
        log.error("SpeedLab: %s", note, exc_info=True)
        notes.append(note)

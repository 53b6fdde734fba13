"""One sampling run seen through ComfyUI's wrappers: when each evaluation began and ended, and what it evaluated.

Time is attributed by evaluations, not by the sampler's callback, which fires before the latent is updated: the span
from one evaluation's start to the next one's belongs to the step of the first, so the steps add up to the whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from threading import Lock
from typing import Any, Protocol

from ..patching.notes import REPORT_CACHED, REPORT_NOTE, REPORT_RAN, REPORT_SAVED
from ..patching.schedule import StepTracker
from ..patching.wrappers import SharedState, Site, Wrapper, attach, has_work_units
from . import nvtx
from .clock import Clock, Mark, host_ms
from .environment import Conditions, conditions_now
from .peaks import MemoryPeak

KEY = "speedlab.profile"
_NO_PLACE = (
    "The sampler evaluates at sigmas that do not tell their step, because its schedule neither falls nor rises all "
    "the way; these evaluations count with the step that it had come to."
)


@dataclass
class Evaluation:
    """One model evaluation with guidance. `sigma` stays on the device until the run is over: reading it would wait.

    Rows are those of the batches that the network got: latents times conds, each area and each mask a cond of its own.
    """

    sigma: Any
    start: Mark
    end: Mark | None = None
    cond_rows: int = 0
    uncond_rows: int = 0
    forwards: int = 0
    cached: bool = False
    # Steps that the sampler's callback had reported before.
    done: int = 0
    # Of memory, from its start to the next evaluation's.
    peak: MemoryPeak = field(default_factory=MemoryPeak)


@dataclass(frozen=True)
class StepRow:
    """One step of the schedule, as the record has it. Times in milliseconds."""

    index: int
    sigma: float
    gpu_ms: float | None
    cpu_ms: float
    evals: int
    cond_rows: int
    uncond_rows: int
    cached: bool
    model: str = "base"

    @property
    def ms(self) -> float:
        """Device time where there is one, else host time."""
        return self.cpu_ms if self.gpu_ms is None else self.gpu_ms


class Observer(Protocol):
    """Sees a run while it goes on; called in the timed path, so it must return at once."""

    def began(self, steps: int, mark: Mark, apart: Sequence[tuple[Mark, Mark]]) -> None: ...

    def evaluating(self, evaluation: Evaluation) -> None: ...

    def step_done(self) -> None: ...

    def ended(self, mark: Mark) -> None: ...


@dataclass
class SamplingTrace(SharedState):
    """Marks and counts of one run of a sampler.

    Where a run goes on with another model, `then` is the trace of that part and `first_step` its place in the schedule.
    Forwards may run in several threads at once, everything else in one.
    """

    clock: Clock
    emitter: nvtx.Emitter
    model_role: str = "base"
    called: Mark | None = None
    returned: Mark | None = None
    moves: list[tuple[Mark, Mark]] = field(default_factory=list)
    # When something was compiled or timed that no repeat compiles or times again; of all parts of the run.
    apart: list[tuple[Mark, Mark]] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    start: Mark | None = None
    end: Mark | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conditions: Conditions | None = None
    # What techniques ran with where that is not what they declare; None: the technique did nothing.
    ran: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    # What techniques left out, by name: how much, of how much, and of what.
    saved: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    on_step: Callable[[int], None] | None = None
    first_step: int = 0
    then: SamplingTrace | None = None
    observer: Observer | None = None
    # Gives the peak of memory since its last call.
    memory: Callable[[], MemoryPeak] | None = None
    _current: Evaluation | None = None
    _open_step: bool = False
    _tracker: StepTracker | None = None
    _counting: Lock = field(default_factory=Lock)

    def parts(self) -> Iterator[SamplingTrace]:
        """This trace and those that follow it in the same run."""
        yield self
        if self.then is not None:
            yield from self.then.parts()

    def follow(self, model_role: str, first_step: int) -> SamplingTrace:
        """A trace for the part of the run that another model goes on with."""
        self.then = SamplingTrace(
            self.clock, self.emitter, model_role, apart=self.apart, on_step=self.on_step, first_step=first_step,
            observer=self.observer, memory=self.memory,
        )  # fmt: skip
        return self.then

    def begin(self, sigmas: Sequence[float]) -> None:
        self.sigmas = list(sigmas)
        self._tracker = StepTracker(tuple(self.sigmas)) if len(self.sigmas) > 1 else None
        self._read_memory()
        self.start = self.clock.mark()
        self.emitter.push(nvtx.SAMPLE, len(self.sigmas) - 1)
        self._push_step(0)
        if self.observer is not None:
            self.observer.began(len(self.sigmas) - 1, self.start, self.apart)

    def finish(self) -> None:
        if self._open_step:
            self.emitter.pop()
            self._open_step = False
        self.emitter.pop()
        self._read_memory()
        self.end = self.clock.mark()
        if self.observer is not None:
            self.observer.ended(self.end)

    def step_done(self, index: int) -> None:
        """The sampler's callback for step `index`: on a GPU this is the only step number known without waiting."""
        if self._open_step:
            self.emitter.pop()
            self._open_step = False
        if index + 1 < len(self.sigmas) - 1:
            self._push_step(index + 1)
        if self._tracker is not None:
            self._tracker.step_done(index)
        if self.observer is not None:
            self.observer.step_done()

    @contextmanager
    def evaluation(self, sigma: Any) -> Iterator[None]:
        outer = self._current
        if outer is None:
            self._read_memory()
        done = 0 if self._tracker is None else self._tracker.done
        current = self._current = Evaluation(sigma, self.clock.mark(), done=done)
        self.evaluations.append(current)
        if self.observer is not None and outer is None:
            self.observer.evaluating(current)
        self.emitter.push(nvtx.EVAL, len(self.evaluations) - 1)
        try:
            yield
        finally:
            self.emitter.pop()
            current.end = self.clock.mark()
            self._current = outer

    @contextmanager
    def forward(self, cond_or_uncond: Sequence[int], rows: int) -> Iterator[None]:
        """One forward of `rows` rows, which `cond_or_uncond` names in chunks of equal size."""
        current = self._current
        if current is not None:
            chunk = rows // max(len(cond_or_uncond), 1)
            uncond = chunk * sum(1 for which in cond_or_uncond if which == 1)
            with self._counting:
                current.forwards += 1
                current.uncond_rows += uncond
                current.cond_rows += rows - uncond
        with nvtx.nvtx_range(self.emitter, nvtx.FORWARD, rows):
            yield

    def mark_cached(self) -> None:
        """A technique answered the running evaluation from a cache, wholly or in part."""
        if self._current is not None:
            self._current.cached = True

    def add_note(self, text: str) -> None:
        """Something that a technique decided or gave up in this run; said once in the record."""
        if text not in self.notes:
            self.notes.append(text)

    def note_ran(self, name: str, options: Mapping[str, Any] | None) -> None:
        """A technique did something else than it declares."""
        self.ran[name] = options

    def note_saved(self, name: str, saved: int, of: int, unit: str) -> None:
        """What a technique left out in this run."""
        self.saved[name] = (saved, of, unit)

    def _read_memory(self) -> None:
        if self.memory is not None:
            peak = self.memory()
            # What is before the first evaluation belongs to no step.
            if self.evaluations:
                self.evaluations[-1].peak = self.evaluations[-1].peak.merged(peak)

    def _push_step(self, index: int) -> None:
        self.emitter.push(nvtx.STEP, index)
        self._open_step = True


def traced(model: Any, trace: SamplingTrace) -> Any:
    """A clone of `model` whose sampling is seen by `trace`: outermost for evaluations, innermost for forwards."""
    if has_work_units(model):
        trace.add_note(
            "MultiGPU Work Units evaluate conds on several GPUs at once: memory and device time in this record are "
            f"those of {model.load_device} alone."
        )
    return attach(
        model, KEY, _wrappers(trace), outermost=(Site.PREPARE_SAMPLING, Site.SAMPLER_SAMPLE, Site.PREDICT_NOISE)
    )


def _wrappers(trace: SamplingTrace) -> Mapping[Site, Wrapper]:
    def sampler_sample(
        executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, callback: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # ComfyUI makes these options again for every run, so what is added here ends with the run.
        options = extra_args["model_options"].setdefault("transformer_options", {})
        options[REPORT_CACHED] = trace.mark_cached
        options[REPORT_NOTE] = trace.add_note
        options[REPORT_RAN] = trace.note_ran
        options[REPORT_SAVED] = trace.note_saved
        trace.begin(sigmas.detach().float().cpu().tolist())
        try:
            return executor(model_wrap, sigmas, extra_args, _observed(callback, trace), *args, **kwargs)
        finally:
            trace.finish()
            options.pop(REPORT_CACHED, None)
            options.pop(REPORT_NOTE, None)
            options.pop(REPORT_RAN, None)
            options.pop(REPORT_SAVED, None)

    def prepare_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        start = trace.clock.mark()
        try:
            return executor(*args, **kwargs)
        finally:
            trace.moves.append((start, trace.clock.mark()))

    def predict_noise(executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        with trace.evaluation(timestep.detach().reshape(-1)[:1]):
            return executor(x, timestep, *args, **kwargs)

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or (args[5] if len(args) > 5 else {})
        if trace.conditions is None:
            # Here every technique has set what it sets for its run.
            trace.conditions = conditions_now(args[0].device.type)
        with trace.forward(options.get("cond_or_uncond", (0,)), int(args[0].shape[0])):
            return executor(*args, **kwargs)

    return {
        Site.PREPARE_SAMPLING: prepare_sampling,
        Site.SAMPLER_SAMPLE: sampler_sample,
        Site.PREDICT_NOISE: predict_noise,
        Site.APPLY_MODEL: apply_model,
    }


def _observed(callback: Callable[..., Any] | None, trace: SamplingTrace) -> Callable[..., Any]:
    def observed(step: int, *args: Any, **kwargs: Any) -> Any:
        if trace.on_step is not None:
            trace.on_step(trace.first_step + int(step) + 1)
            result = None
        else:
            result = callback(step, *args, **kwargs) if callback is not None else None
        trace.step_done(int(step))
        return result

    return observed


def sampling_ms(trace: SamplingTrace) -> float | None:
    """Milliseconds inside the sampler without what a repeat does not do again; None if it never started or never ended.
    Call after the clock settled."""
    spans = [(part.start, part.end) for part in trace.parts()]
    if any(start is None or end is None for start, end in spans):
        return None
    return sum(_net_ms(trace, start, end) for start, end in spans if start is not None and end is not None)


def to_device_ms(trace: SamplingTrace) -> float:
    """Milliseconds in which weights of all parts came to the device and LoRAs into them. Call after the clock settled.

    Device time where there is one: a copy that goes on after its call returned belongs to the move.
    """
    return sum(_net_ms(part, start, end) for part in trace.parts() for start, end in part.moves)


def compile_ms(trace: SamplingTrace) -> float:
    """Milliseconds of compiling and timing alternatives, which no repeat pays again. Call after the clock settled."""
    return sum(_span_ms(trace.clock, start, end) for start, end in trace.apart)


def around_ms(trace: SamplingTrace) -> float | None:
    """Milliseconds of a whole run that are neither a move of weights nor inside the sampler: noise, conditioning, and
    cleaning up. None for a run that did not end. Call after the clock settled."""
    sampling = sampling_ms(trace)
    if trace.called is None or trace.returned is None or sampling is None:
        return None
    return max(_net_ms(trace, trace.called, trace.returned) - sampling - to_device_ms(trace), 0.0)


def first_eval_ms(trace: SamplingTrace) -> float | None:
    """Milliseconds of the first evaluation, where compilation and warm-up show."""
    if not trace.evaluations or trace.evaluations[0].end is None:
        return None
    return _span_ms(trace.clock, trace.evaluations[0].start, trace.evaluations[0].end)


def step_rows(trace: SamplingTrace) -> tuple[StepRow, ...]:
    """One row a step of the schedule. Call after the clock settled: sigmas are read here, in one transfer."""
    return tuple(row for part in trace.parts() for row in part_rows(part))


def part_rows(trace: SamplingTrace) -> tuple[StepRow, ...]:
    """`step_rows` of one part of the run alone, without what a repeat does not do again."""
    if not _has_steps(trace):
        return ()
    assert trace.start is not None and trace.end is not None
    owners = evaluation_steps(trace)
    # The first span also holds what the sampler does before its first evaluation.
    starts = [trace.start, *(evaluation.start for evaluation in trace.evaluations[1:])]
    ends = [*starts[1:], trace.end]
    rows = []
    for index, sigma in enumerate(trace.sigmas[:-1]):
        mine = [n for n, owner in enumerate(owners) if owner == index]
        device = [_net_ms(trace, starts[n], ends[n]) for n in mine] if trace.clock.has_device_time else None
        evaluations = [trace.evaluations[n] for n in mine]
        rows.append(
            StepRow(
                index=trace.first_step + index,
                sigma=sigma,
                gpu_ms=None if device is None else sum(device),
                cpu_ms=sum(_net_ms(trace, starts[n], ends[n], host_ms) for n in mine),
                evals=len(mine),
                cond_rows=sum(e.cond_rows for e in evaluations),
                uncond_rows=sum(e.uncond_rows for e in evaluations),
                cached=any(e.cached or (e.end is not None and e.forwards == 0) for e in evaluations),
                model=trace.model_role,
            )
        )
    return tuple(rows)


def _has_steps(trace: SamplingTrace) -> bool:
    return trace.start is not None and trace.end is not None and len(trace.sigmas) > 1


def step_peaks(trace: SamplingTrace) -> tuple[MemoryPeak, ...]:
    """The peak of memory of each step, as `step_rows` has them. Call after the clock settled."""
    found = []
    for part in trace.parts():
        if not _has_steps(part):
            continue
        owners = evaluation_steps(part)
        for index in range(len(part.sigmas) - 1):
            mine = (e.peak for e, owner in zip(part.evaluations, owners, strict=True) if owner == index)
            found.append(reduce(MemoryPeak.merged, mine, MemoryPeak()))
    return tuple(found)


def evaluation_steps(trace: SamplingTrace) -> list[int]:
    """The step that each evaluation belongs to. Call after the clock settled: it waits for the device.

    One that no step leads through counts with the step that the sampler had come to, and the record says so.
    """
    tracker = StepTracker(tuple(trace.sigmas))
    owners = []
    for evaluation, sigma in zip(trace.evaluations, _host_sigmas(trace.evaluations), strict=True):
        tracker.reach(evaluation.done)
        reached, step = tracker.reached, tracker.locate(sigma)
        if step is None:
            trace.add_note(_NO_PLACE)
        owners.append(reached if step is None else step)
    return owners


def _host_sigmas(evaluations: Sequence[Evaluation]) -> list[float]:
    if not evaluations:
        return []
    import torch

    return [float(s) for s in torch.cat([e.sigma.float() for e in evaluations]).cpu().tolist()]


def _span_ms(clock: Clock, start: Mark, end: Mark) -> float:
    device = clock.device_ms(start, end)
    return host_ms(start, end) if device is None else device


def _net_ms(
    trace: SamplingTrace, start: Mark, end: Mark, distance: Callable[[Mark, Mark], float] | None = None
) -> float:
    """Milliseconds between two marks without what was done between them that no repeat does again."""
    between = distance or partial(_span_ms, trace.clock)
    inside = [(a, b) for a, b in trace.apart if a.host_ns >= start.host_ns and b.host_ns <= end.host_ns]
    return max(between(start, end) - sum(between(a, b) for a, b in inside), 0.0)

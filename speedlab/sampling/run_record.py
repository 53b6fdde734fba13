"""The record of what one call of a sampler gathered: request, phases, memory and warnings."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..common.dtypes import unet_dtypes
from ..common.errors import first_line
from ..measure import node_times, timeline
from ..measure.context import NodeContext
from ..measure.environment import environment, environment_hash
from ..measure.kernel_profile import KernelProfile
from ..measure.peaks import MemoryPeak
from ..measure.plan_names import plan_of
from ..measure.record import OTHERS, UNKNOWN, RunRecord, memory_dict, step_dict, step_memory, total_ms
from ..measure.summary import summarise
from ..measure.trace import (
    Observer,
    SamplingTrace,
    StepRow,
    around_ms,
    compile_ms,
    first_eval_ms,
    sampling_ms,
    step_peaks,
    step_rows,
    to_device_ms,
)
from ..models.loading import HASHED, SOURCE, CheckpointSource, sampled_hash
from ..models.lora import LORAS
from ..patching.wrappers import Accelerator, accelerators

log = logging.getLogger(__name__)

_PIXELS_PER_LATENT = 8
_NOTABLE_SHARE = 0.01
_NOTABLE_EXCESS, _NOTABLE_EXCESS_MS = 0.1, 50.0


@dataclass(frozen=True)
class SamplingRequest:
    """KSampler's settings; with `sigmas` those of SamplerCustom, and `scheduler` says what they are.

    `more` goes into the record as it is: what a sampler of another kind has beside them.

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
    sigmas: Any = field(default=None, compare=False)


class Feed(Protocol):
    """Shows the runs of one call while they go on."""

    def run(self, index: int) -> Observer:
        """The observer of run `index`, counted from the first warm-up."""

    def close(self, state: str) -> None:
        """The call ended; `state` is its record's status."""


@dataclass
class Session:
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


def record_of(
    model: Any, request: SamplingRequest, latent: Mapping[str, Any], session: Session, context: NodeContext
) -> RunRecord:
    rows = _rows(session.measured)
    runs = [ms for ms in (sampling_ms(t) for t in session.measured) if ms is not None]
    first_eval = first_eval_ms(session.traces[0]) if session.traces else None
    first_rows = step_rows(session.traces[0]) if session.traces else ()
    summary = summarise(runs, rows, first_eval, first_rows[0].ms if first_rows else None)
    summary["saved"] = _saved(session)
    now = timeline.executing()
    entries = timeline.entries(now.prompt_id)
    run = summary["run"]
    phases: dict[str, float | str | None] = {
        "load": context.phase_ms("load", entries, now.list_index),
        "compile": _compile_ms(session),
        "text_encode": context.phase_ms("text_encode", entries, now.list_index),
        **_core_text(context, entries, now.list_index),
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
            step_memory=step_memory(step_peaks(session.measured[0])) if session.measured else {},
            kernels=session.kernel_profile.kernels,
            kernel_profile=session.kernel_profile.profile,
            roofline=session.kernel_profile.roofline,
            artifacts=dict(session.kernel_profile.artifacts),
        )
    )


def _warnings(
    model: Any, session: Session, phases: Mapping[str, float | str | None], excess_ms: float | None
) -> tuple[str, ...]:
    notes = [note for trace in session.traces for part in trace.parts() for note in part.notes]
    notes += session.kernel_profile.notes
    if any(not trace.clock.is_synchronised for trace in session.traces):
        notes.append(
            f"PyTorch cannot wait for the device {model.load_device.type} here (its backend has no synchronize): the "
            "times tell when work was queued, not when it was done, so steps and phases cannot be separated reliably."
        )
    notes += [warning for match in model.get_attachment(LORAS) or () for warning in match.warnings()]
    text, seen = phases["text_encode"], phases.get("core_text_encode")
    if text is None and isinstance(seen, float):
        notes.append(
            f"A core node encoded the text: its {seen:.0f} ms are what ComfyUI's progress tells of it, an estimate "
            "that is part of the time from text to image. Text Encode (SpeedLab) measures it."
        )
    elif text is None and seen is None:
        notes.append("A core node encoded the text, so the time from text to image is not known.")
    elif "cached" in (text, seen):
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


def _first_move(session: Session, phases: Mapping[str, float | str | None]) -> list[str]:
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


def _first_step(session: Session, phases: Mapping[str, float | str | None], excess_ms: float | None) -> list[str]:
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


def _core_text(
    context: NodeContext, entries: Sequence[timeline.PhaseEntry], list_index: int | None
) -> dict[str, float | str | None]:
    """Text encoding where nodes of others did it or a part of it; nothing where they did none.

    What such a node did for a whole list is no single item's.
    """
    encoders = context.text_encoders()
    if not encoders:
        return {}
    seen = None if list_index else node_times.seen_ms(encoders)
    own = context.phase_ms("text_encode", entries, list_index, beside_others=True)
    if seen is None or "cached" in (seen, own):
        return {"core_text_encode": seen and "cached"}
    return {"core_text_encode": round(sum(ms for ms in (seen, own) if isinstance(ms, float)), 3)}


def _to_device_ms(session: Session) -> float | None:
    """Moving weights to the device and patching LoRAs into them, of the first run, warm-up included.

    It alone follows the prompt's text encoding, so it pays what a repeat of the prompt pays; later ones find all in
    place.
    """
    return round(to_device_ms(session.traces[0]), 3) if session.traces else None


def _compile_ms(session: Session) -> float | None:
    """Compiling and timing of alternatives in all runs, warm-up included; None where there was none."""
    return round(sum(compile_ms(trace) for trace in session.traces), 3) or None


def _prepare_ms(session: Session) -> float | None:
    """Noise, conditioning and cleaning up, of the first measured run."""
    around = around_ms(session.measured[0]) if session.measured else None
    return None if around is None else round(around, 3)


def _request(
    model: Any, request: SamplingRequest, latent: Mapping[str, Any], context: NodeContext, session: Session
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


def _saved(session: Session) -> list[dict[str, Any]]:
    """What each technique left out in the first measured run, 0 included, of each model of it."""
    trace = next(iter(session.measured or session.traces[-1:]), None)
    return [
        {"technique": name, "saved": saved, "of": of, "unit": unit, "share": round(saved / of, 4) if of else 0.0}
        for part in (() if trace is None else trace.parts())
        for name, (saved, of, unit) in part.saved.items()
    ]


def _described(role: str, techniques: Iterable[Accelerator]) -> list[str]:
    """Techniques as text; those of a further model with its role before them."""
    return [f"{role}:{one.describe()}" if role else one.describe() for one in techniques]


def _what_ran(model: Any, role: str, session: Session) -> list[Accelerator]:
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
    hashes = {"sampled_sha256": digest, "hashed": HASHED if digest else None}
    return {"name": source.name, **hashes, "family": source.family, "size_bytes": source.size_bytes}


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

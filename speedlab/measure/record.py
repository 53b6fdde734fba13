"""The record of one run (schema 2) and its row in the CSV.

Plain data: nothing here reads a clock, a file or a model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from ..common.errors import ResultsError
from .peaks import MemoryPeak
from .record_shape import shape_fault
from .summary import from_schema_1, spread
from .trace import StepRow

SCHEMA = 2
# The phase that stands for work on the image which is not measured; its value is UNKNOWN.
OTHERS, UNKNOWN = "others", "unknown"
RUN_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")

# The columns of results.csv and where their values stand in the record; `times` are seconds from text to image over the
# repeats, and a `_ms` is given in seconds. New columns come last, and a released one is never renamed.
_CELLS: Mapping[str, str] = {
    "plan": "request.plan", "max_vram_gb": "memory.overall.peak_allocated_gb", "time_s": "times.median",
    "time_mean_s": "times.mean", "step_time_s": "summary.step_time_ms", "batch": "request.batch",
    "width": "request.width", "height": "request.height", "steps": "steps_taken", "cfg": "request.cfg",
    "sampler": "request.sampler", "scheduler": "request.scheduler", "precision": "precision",
    "accelerators": "accelerators", "repeats": "summary.repeats", "time_min_s": "times.min",
    "time_max_s": "times.max", "time_std_s": "times.std", "first_eval_s": "summary.first_eval_ms",
    "it_per_s": "summary.it_per_s", "images_per_min": "summary.images_per_min",
    "peak_rss_gb": "memory.overall.peak_rss_gb", "psnr": "psnr", "ssim": "quality.ssim", "status": "status",
    "error": "error", "scenario": "request.scenario", "checkpoint": "request.checkpoint.name", "seed": "request.seed",
    "device": "env.device", "torch": "env.torch", "comfyui": "env.comfyui", "speedlab": "env.speedlab",
    "env_hash": "env_hash", "run_id": "run_id", "timestamp": "timestamp",
}  # fmt: skip
CSV_COLUMNS = tuple(_CELLS)


class _Precision(TypedDict, total=False):
    unet: Mapping[str, str | None] | None


class _Request(TypedDict, total=False):
    """What the row in the CSV is computed from; the keys of the settings are free."""

    accelerators: Sequence[str] | None
    checkpoint: Mapping[str, Any] | None
    precision: str | Annotated[Mapping[str, Any], _Precision] | None


class _Summary(TypedDict, total=False):
    runs_ms: Sequence[float | None] | None
    totals_ms: Sequence[float | None] | None
    step_time_ms: float | None
    it_per_s: float | None
    first_eval_ms: float | None


@dataclass(frozen=True)
class RunRecord:
    """One run of a sampler with all that is known about it; docs/measuring.md says what its fields mean.

    The types that are declared here are those that `from_json` asks of a file.
    """

    run_id: str
    timestamp: str
    status: str
    error: str | None
    env: Mapping[str, Any]
    env_hash: str
    request: Annotated[Mapping[str, Any], _Request]
    phases_ms: Mapping[str, float | str | None]
    steps: Sequence[Mapping[str, Any]]
    summary: Annotated[Mapping[str, Any], _Summary]
    memory: Mapping[str, Mapping[str, Any]]
    kernels: Sequence[Mapping[str, Any]] = ()
    kernel_profile: Mapping[str, Any] | None = None
    roofline: Mapping[str, Any] | None = None
    quality: Mapping[str, Any] | None = None
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    # Memory peaks of the steps in `steps`, by name a list in GB; empty where the platform tells none.
    step_memory: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Indented JSON; numbers that JSON does not have become null."""
        return json.dumps(_finite(dataclasses.asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    def changed(self, **changes: Any) -> RunRecord:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def from_json(text: str) -> RunRecord:
    """Read a record back. Raises ResultsError for anything that is not a whole record of a known schema.

    Every field has the type that the rest of this pack computes with. One of schema 1 comes back with the rate computed
    from its steps, and without its time from text to image, which left out the move of weights.
    """
    record = loosely_from_json(text)
    fault = shape_fault(vars(record), RunRecord)
    if fault is not None:
        raise ResultsError(f"not a record: {fault}")
    return record


def loosely_from_json(text: str) -> RunRecord:
    """Read a record to list, show or delete it: schema, names and run id are checked, the types of fields are not."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and nesting without end
        raise ResultsError(f"not a whole record: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in (1, SCHEMA):
        raise ResultsError(
            f"not a record of schema 1 or {SCHEMA}"
            + (f" but of schema {schema}: update SpeedLab to read it" if isinstance(schema, int) else "")
        )
    if schema != SCHEMA:
        data = from_schema_1(data)
    names = {f.name: f for f in dataclasses.fields(RunRecord)}
    missing = [n for n, f in names.items() if n not in data and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]  # fmt: skip
    if missing:
        raise ResultsError(f"not a whole record: {', '.join(missing)} missing")
    if not isinstance(data["run_id"], str) or not RUN_ID.fullmatch(data["run_id"]):
        raise ResultsError("not a record: its run id is malformed")
    return RunRecord(**{key: value for key, value in data.items() if key in names})


def shown_json(text: str) -> str:
    """A record's JSON in the present schema, the types of fields unchecked; one that has it is left as it is.

    Raises ResultsError as `loosely_from_json` does.
    """
    try:
        data = json.loads(text)
        return json.dumps(from_schema_1(data)) if data.get("schema") == 1 else text
    except (ValueError, RecursionError, AttributeError) as error:
        raise ResultsError(f"not a whole record: {error}") from error


def step_dict(row: StepRow) -> dict[str, Any]:
    """A step row as the record keeps it, times to the microsecond."""
    values = dataclasses.asdict(row)
    for name in ("gpu_ms", "cpu_ms"):
        values[name] = None if values[name] is None else round(values[name], 4)
    return values


def memory_dict(peak: MemoryPeak) -> dict[str, float | None]:
    """A peak in GB of 10^9 bytes."""
    return {
        "peak_allocated_gb": _gb(peak.allocated),
        "peak_reserved_gb": _gb(peak.reserved),
        "peak_rss_gb": _gb(peak.rss),
        "device_used_gb": _gb(peak.device_used),
        "outside_torch_gb": _gb(peak.outside),
    }


def step_memory(peaks: Sequence[MemoryPeak]) -> dict[str, list[float | None]]:
    """The peaks of a run's steps by name, a list each, in GB; of the names that the platform knows."""
    kept = {
        "peak_allocated_gb": [_gb(peak.allocated) for peak in peaks],
        "peak_rss_gb": [_gb(peak.rss) for peak in peaks],
    }
    return {name: values for name, values in kept.items() if any(value is not None for value in values)}


def total_ms(phases_ms: Mapping[str, float | str | None], sample_ms: float | None) -> float | None:
    """Text encoding to saved image with every move of weights, without load; None while a part of that is unknown.

    A phase that ComfyUI answered from its cache (`cached`) is a part that is unknown: it is not known what a repeat
    would have paid for it. Where a core node encoded the text, `core_text_encode` stands for it; where one decoded,
    `after_sampling` does, the span from sampling to the report.
    Work of other nodes on the same image that was not measured (`others`) leaves no total either. Freeing memory
    (`free`) counts where it took place: a Free Memory node that ComfyUI did not run again moved no weights.
    """
    if phases_ms.get(OTHERS) is not None or phases_ms.get("to_device") == UNKNOWN:
        return None
    decode = phases_ms.get("decode")
    after = phases_ms.get("after_sampling") if decode is None else decode
    text = phases_ms.get("text_encode")
    parts = (phases_ms.get("core_text_encode") if text is None else text, sample_ms, after)
    if not all(isinstance(part, (int, float)) for part in parts):
        return None
    extras = (phases_ms.get(name) for name in ("free", "to_device", "prepare", "save"))
    return sum(float(ms) for ms in (*parts, *extras) if isinstance(ms, (int, float)))


def csv_row(record: RunRecord) -> dict[str, str]:
    """The record's row in results.csv; an unknown value is an empty cell."""
    request, summary, phases = record.request, record.summary, record.phases_ms
    # A benchmark times every repeat from text to image; a sampler repeats only the sampling.
    runs = summary.get("totals_ms") or [total_ms(phases, ms) for ms in summary.get("runs_ms") or ()]
    times = spread([ms / 1000.0 for ms in runs if ms is not None])
    quality = record.quality or {}
    known = {
        **vars(record),
        "times": {} if times is None else vars(times),
        # Some schedulers take other than the steps asked for; the rate is that of the steps taken.
        "steps_taken": summary.get("steps") or request.get("steps"),
        "precision": precision_text(request.get("precision")),
        "accelerators": "+".join(request.get("accelerators") or ()),
        "psnr": math.inf if quality.get("identical") else quality.get("psnr"),
    }
    return {column: _cell(_at(known, place)) for column, place in _CELLS.items()}


def _at(known: Mapping[str, Any], place: str) -> Any:
    """The value at `a.b.c`, None where there is none; milliseconds as seconds."""
    value: Any = known
    for name in place.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value / 1000.0 if place.endswith("_ms") and value is not None else value


def precision_text(precision: Any) -> str | None:
    """`fp16`, or `fp16 computed in fp32` where weights and arithmetic differ."""
    if not isinstance(precision, Mapping):
        return precision
    unet = precision.get("unet") or {}
    weight, compute = unet.get("weight"), unet.get("compute")
    return weight if compute in (None, weight) else f"{weight} computed in {compute}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    # Python 3.10 reads no table with a NUL in it.
    text = _encodable(str(value)).replace("\r", " ").replace("\n", " ").replace("\0", " ")
    # A spreadsheet would run a text that begins like a formula.
    return f"'{text}" if isinstance(value, str) and text[:1] in ("=", "+", "-", "@", "\t") else text


def _encodable(text: str) -> str:
    """Without lone surrogates, which JSON can name and no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _gb(value: int | None) -> float | None:
    return None if value is None else round(value / 1e9, 4)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and value not in (float("inf"), float("-inf")) else None
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, Mapping):
        return {_encodable(str(key)): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

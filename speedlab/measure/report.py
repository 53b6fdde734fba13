"""A run in words: what took how long and how much memory, for the node's text output and the terminal.

Kernels, device activity and operations of a run in words and small tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..common.tables import aligned
from .record import OTHERS, RunRecord, precision_text
from .summary import KIND_NAMES, has_median

_PHASE_NAMES = {
    "load": "load checkpoint",
    "compile": "compiling",
    "text_encode": "text encoding",
    "core_text_encode": "text, core node",
    "free": "freeing memory",
    "to_device": "model to device",
    "prepare": "preparation",
    "first_eval": "first evaluation",
    "sample": "sampling",
    "decode": "decoding",
    "after_sampling": "sampling to report",
    "others": "other nodes",
    "save": "saving",
    "total": "text to image",
}


def summary_text(record: RunRecord) -> str:
    """A few lines: status, speed, spread, memory, and what the profiled steps were made of."""
    request, summary = record.request, record.summary
    if record.status != "ok":
        return f"{record.status}: {record.error or 'no message'} (run {record.run_id})"
    # Of a benchmark, whose phases are of one repeat, `run` is the spread of all samplings and no second time.
    run, sampling = summary.get("run") or {}, record.phases_ms.get("sample")
    if not record.steps:
        nothing = "nothing was sampled: denoise leaves no step to take"
        return "\n".join([*([nothing] if summary.get("steps") == 0 else []), *record.warnings])
    lines = [
        f"{request.get('plan')}: {summary.get('steps') or request.get('steps')} steps in {_s(sampling)}, "
        f"{_rate(summary.get('it_per_s'))}, a step {_ms(summary.get('step_time_ms'))}, "
        f"first evaluation {_ms(summary.get('first_eval_ms'))}"
    ]
    kinds = summary.get("step_kinds") or {}
    if kinds:
        by_kind = (
            f"{its['steps']} {KIND_NAMES[kind]}, {'median ' if has_median(its) else ''}{_ms(its['median_ms'])}"
            for kind, its in kinds.items()
        )
        lines.append(f"steps by kind: {'; '.join(by_kind)}")
    if summary.get("saved"):
        lines.append(f"left out: {'; '.join(_saved(its) for its in summary['saved'])}")
    if summary.get("repeats", 1) > 1:
        lines.append(
            f"{summary['repeats']} runs: sampling min {_s(run.get('min'))}, max {_s(run.get('max'))}, "
            f"standard deviation {_s(run.get('std'))}"
        )
    lines.append(_memory_line(record.memory.get("overall", {})))
    return "\n".join([*lines, *kernel_profile_lines(record), *record.warnings])


def _saved(its: Mapping[str, Any]) -> str:
    return f"{its['technique']} {its['saved']} of {its['of']} {its['unit']}, {100 * its['share']:.0f} %"


def report_text(record: RunRecord) -> str:
    """The whole run as a table that a person can read."""
    request = record.request
    head = [
        f"SpeedLab run {record.run_id} ({record.status})",
        f"{request.get('plan')} | {(request.get('checkpoint') or {}).get('name') or 'unknown checkpoint'} | "
        f"{request.get('width')}x{request.get('height')} batch {request.get('batch')} | {request.get('sampler')}/"
        f"{request.get('scheduler')} {_steps_taken(record)} cfg {request.get('cfg')} seed {request.get('seed')}",
        f"{record.env.get('device')} | torch {record.env.get('torch')} | ComfyUI {record.env.get('comfyui')} | "
        f"{precision_text(request.get('precision')) or 'unknown precision'} | attention {record.env.get('attention')}",
        "",
    ]
    body = [*aligned(phase_rows(record), numbers=True), "", *aligned(step_table(record), numbers=True, words=1), ""]
    deeper = kernel_table(record)
    body += [*deeper, "", summary_text(record)] if deeper else [summary_text(record)]
    trace = record.artifacts.get("trace")
    if trace:
        body.append(f"trace: {trace}, for https://ui.perfetto.dev or chrome://tracing")
    if record.quality:
        body.append(f"quality: {_pairs(record.quality)}")
    return "\n".join([*head, *body])


def _steps_taken(record: RunRecord) -> str:
    """Steps taken, and those asked for where the scheduler made others of them."""
    asked, taken = record.request.get("steps"), record.summary.get("steps")
    return f"{asked} steps" if taken in (None, asked) else f"{taken} steps ({asked} asked for)"


def phase_rows(record: RunRecord) -> list[tuple[str, ...]]:
    """The phases as a table, its head first."""
    total = record.phases_ms.get("total")
    rows: list[tuple[str, ...]] = [("phase", "ms", "share", "VRAM GB", "RSS GB")]
    for key, name in _PHASE_NAMES.items():
        value = record.phases_ms.get(key)
        if key in (OTHERS, "free", "compile", "core_text_encode") and value is None:
            continue
        memory: Mapping[str, Any] = record.memory.get("overall" if key == "total" else key, {})
        counted = isinstance(value, (int, float)) and isinstance(total, (int, float)) and total > 0
        share = f"{100 * value / total:.0f} %" if counted and key not in ("load", "compile", "first_eval") else ""  # type: ignore[operator]
        used = _gb(memory.get("peak_allocated_gb")), _gb(memory.get("peak_rss_gb"))
        rows.append((name, _phase_value(value), share, *used))
    return rows


def step_table(record: RunRecord) -> list[tuple[str, ...]]:
    """The steps as a table, its head first."""
    rows: list[tuple[str, ...]] = [("step", "sigma", "ms", "evals", "cond", "uncond", "note")]
    for step in record.steps:
        ms = step["cpu_ms"] if step["gpu_ms"] is None else step["gpu_ms"]
        notes = [n for n, there in (("cached", step["cached"]), (step["model"], step["model"] != "base")) if there]
        counts = (str(step[name]) for name in ("evals", "cond_rows", "uncond_rows"))
        rows.append((str(step["index"] + 1), f"{step['sigma']:.4f}", f"{ms:.2f}", *counts, " ".join(notes)))
    return rows


def _memory_line(memory: Mapping[str, Any]) -> str:
    vram, rss = memory.get("peak_allocated_gb"), memory.get("peak_rss_gb")
    parts = [f"VRAM peak {vram:.2f} GB"] if vram is not None else []
    outside = memory.get("outside_torch_gb")
    parts += [f"of which {outside:.2f} GB outside of PyTorch's allocator"] if vram is not None and outside else []
    parts += [f"RAM peak {rss:.2f} GB"] if rss is not None else []
    return ", ".join(parts) or "memory: not known on this platform"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _phase_value(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, (int, float)) else (value or "-")


def _gb(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rate(per_s: float | None) -> str:
    """Of a slow run too with three digits that count."""
    return "rate not known" if not per_s else f"{per_s:.2f} it/s" if per_s >= 1 else f"{per_s:.3g} it/s"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _s(ms: Any) -> str:
    return "-" if not isinstance(ms, (int, float)) else f"{ms / 1000.0:.3f} s"


_ROWS = 12
_NAME_WIDTH = 60
_RUNTIME_ROWS = 8


def kernel_profile_lines(record: RunRecord) -> list[str]:
    """One line for what the profiled steps spent their time in and one for the operations; none without a profile."""
    lines = []
    profile = record.kernel_profile
    if profile and record.kernels:
        shares = ", ".join(f"{f['family']} {f['share']:.0f} %" for f in profile["families"][:4])
        lines.append(f"{_steps(profile)}: {shares}")
    if record.roofline:
        lines.append(_operations(record.roofline))
    return lines


def kernel_table(record: RunRecord) -> list[str]:
    """Everything that is known of the profiled steps; empty without a profile."""
    profile = record.kernel_profile
    if not profile or not record.kernels:
        return []
    lines = [f"{_steps(profile)}, {profile['wall_ms']:.1f} ms under the profiler", *_families(profile)]
    lines += ["", *_kernels(record.kernels, profile["unit"])]
    if profile.get("device"):
        lines += ["", *_device(profile["device"])]
    elif profile.get("between_ms") is not None:
        lines.append(
            f"between the operators (Python, the sampler, the profiler itself): {profile['between_ms']:.1f} ms"
        )
    if profile.get("runtime"):
        lines += ["", *_runtime(profile["runtime"])]
    if profile.get("compile"):
        counts = profile["compile"]
        lines += [
            "",
            f"torch.compile: {counts['graphs']} graphs, {counts['graph_breaks']} graph breaks, "
            f"{counts['recompiles']} recompiles in this run",
        ]
    return lines


def _steps(profile: Mapping[str, Any]) -> str:
    steps = [index + 1 for index in profile["steps"]]
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    cached = f", {profile['cached_steps']} of them cached" if profile["cached_steps"] else ""
    return f"{profile['unit']} of {which}{cached}"


def _operations(roofline: Mapping[str, Any]) -> str:
    words = []
    if roofline.get("flop_per_forward"):
        words.append(f"{_flop(roofline['flop_per_forward'])} a forward")
    if roofline.get("tflops") is not None:
        words.append(f"{_flop(1e12 * roofline['tflops'])}/s")
    peak = roofline.get("peak")
    # Records of earlier versions can hold a share above 100 %: of a peak that was none.
    if peak and roofline.get("peak_share") is not None and roofline["peak_share"] <= 100.0:
        words.append(f"{roofline['peak_share']:.0f} % of {_flop(1e12 * peak['tflops'])}/s ({peak['name']})")
    return ", ".join(words)


def _flop(value: float) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= 0.1 * size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e6:.2f} MFLOP"


def _families(profile: Mapping[str, Any]) -> list[str]:
    rows = [("family", "calls", "ms", "share", "")]
    rows += [(family["family"], *_figures(family), family["meaning"]) for family in profile["families"]]
    return aligned(rows, numbers=True, words=1)


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row["calls"]), f"{row['ms']:.2f}", f"{row['share']:.1f} %"


def _kernels(kernels: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    shown, rest = kernels[:_ROWS], kernels[_ROWS:]
    rows = [(unit, "calls", "ms", "share"), *((_short(row["name"]), *_figures(row)) for row in shown)]
    if rest:
        sums = {name: sum(row[name] for row in rest) for name in ("calls", "ms", "share")}
        rows.append((f"{len(rest)} more", *_figures(sums)))
    lines = aligned(rows, numbers=True)
    for place in reversed(range(len(shown))):
        if shown[place].get("reading"):
            lines.insert(place + 2, f"  {shown[place]['reading']}")
    return lines


def _short(name: str) -> str:
    return name if len(name) < _NAME_WIDTH else name[: _NAME_WIDTH - 4] + "..."


def _device(device: Mapping[str, Any]) -> list[str]:
    copies = device["copies"]
    overlap = copies.get("overlap_share")
    hidden = "" if overlap is None else f", {overlap:.0f} % of it while kernels ran"
    kinds = ", ".join(f"{k['kind']} {k['calls']} ({k['bytes'] / 1e6:.1f} MB)" for k in copies["kinds"])
    return [
        f"GPU busy {_share(device.get('busy_share'))}; host waiting for the GPU "
        f"{_share(device.get('host_wait_share'))} ({device['host_wait_ms']:.1f} ms)",
        f"copies: {copies['ms']:.2f} ms{hidden}{f'; {kinds}' if kinds else ''}",
    ]


def _runtime(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("runtime call", "calls", "ms")]
    rows += [(_short(row["name"]), str(row["calls"]), f"{row['ms']:.2f}") for row in calls[:_RUNTIME_ROWS]]
    return aligned(rows, numbers=True)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"

"""Kernels, device activity and operations of a run in words and small tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .record import RunRecord

_ROWS = 12
_NAME_WIDTH = 60
_RUNTIME_ROWS = 8


def depth_lines(record: RunRecord) -> list[str]:
    """One line for what the profiled steps spent their time in and one for the operations; none without a profile."""
    lines = []
    profile = record.kernel_profile
    if profile and record.kernels:
        shares = ", ".join(f"{f['family']} {f['share']:.0f} %" for f in profile["families"][:4])
        lines.append(f"{_steps(profile)}: {shares}")
    if record.roofline:
        lines.append(_operations(record.roofline))
    return lines


def depth_table(record: RunRecord) -> list[str]:
    """Everything that the profiled steps told; empty without a profile."""
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
    lines = [f"{'family':<15}{'calls':>8}{'ms':>11}{'share':>9}"]
    for family in profile["families"]:
        lines.append(
            f"{family['family']:<15}{family['calls']:>8}{family['ms']:>11.2f}{family['share']:>7.1f} %  "
            f"{family['meaning']}"
        )
    return lines


def _kernels(kernels: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    lines = [f"{unit:<{_NAME_WIDTH}}{'calls':>8}{'ms':>11}{'share':>9}"]
    for row in kernels[:_ROWS]:
        name = row["name"] if len(row["name"]) < _NAME_WIDTH else row["name"][: _NAME_WIDTH - 4] + "..."
        lines.append(f"{name:<{_NAME_WIDTH}}{row['calls']:>8}{row['ms']:>11.2f}{row['share']:>7.1f} %")
        if row.get("reading"):
            lines.append(f"  {row['reading']}")
    rest = kernels[_ROWS:]
    if rest:
        lines.append(
            f"{f'{len(rest)} more':<{_NAME_WIDTH}}{sum(r['calls'] for r in rest):>8}{sum(r['ms'] for r in rest):>11.2f}"
            f"{sum(r['share'] for r in rest):>7.1f} %"
        )
    return lines


def _device(device: Mapping[str, Any]) -> list[str]:
    copies = device["copies"]
    overlap = copies.get("overlap_share")
    hidden = "" if overlap is None else f", {overlap:.0f} % of it while kernels ran"
    kinds = ", ".join(f"{k['kind']} {k['calls']} ({k['bytes'] / 1e6:.1f} MB)" for k in copies["kinds"])
    return [
        f"card busy {_share(device.get('busy_share'))}; host waiting for the card "
        f"{_share(device.get('host_wait_share'))} ({device['host_wait_ms']:.1f} ms)",
        f"copies: {copies['ms']:.2f} ms{hidden}{f'; {kinds}' if kinds else ''}",
    ]


def _runtime(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'runtime call':<{_NAME_WIDTH}}{'calls':>8}{'ms':>11}"]
    lines += [f"{row['name'][: _NAME_WIDTH - 1]:<{_NAME_WIDTH}}{row['calls']:>8}{row['ms']:>11.2f}"
              for row in calls[:_RUNTIME_ROWS]]  # fmt: skip
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"

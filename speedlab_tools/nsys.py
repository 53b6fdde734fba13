"""`run.py nsys`: a benchmark's ComfyUI under NVIDIA Nsight Systems, and the two summaries that tell most.

The tool watches the whole tree of processes; what it records is limited to the sampling by the NVTX range `sl/run` of
the domain `speedlab`, which Profile Sampler opens.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cli.arguments import UsageError, parse
from .host.base import Host, HostError, pack_root
from .host.child import run_child
from .host.progress import Reporter

REPORTS = ("nvtx_pushpop_sum", "cuda_gpu_kern_sum")
CAPTURE = "sl/run@speedlab"
SUFFIX = ".nsys-rep"
MISSING = (
    "Nsight Systems is not here: there is no 'nsys' on the PATH. Install it from "
    "https://developer.nvidia.com/nsight-systems (it also comes with the CUDA Toolkit, often in "
    "/opt/nvidia/nsight-systems or /usr/local/cuda/bin), put the folder of 'nsys' on the PATH and try again. Without "
    "it, Profile Sampler's details 'kernels' and 'trace' show kernels too."
)


@dataclass(frozen=True)
class NsysCall:
    """A command line taken apart: what the benchmark gets, where results go, and whether all of it is recorded."""

    benchmark: tuple[str, ...]
    out: Path
    whole: bool


def find_nsys() -> str:
    """The nsys executable. Raises HostError that says what to install."""
    found = shutil.which("nsys")
    if found is None:
        raise HostError(MISSING)
    return found


def take_apart(arguments: Sequence[str]) -> NsysCall:
    """Read the command line. Raises UsageError where no scenario is named."""
    options, rest = parse("nsys", arguments)
    if not rest or rest[0].startswith("-"):
        raise UsageError("nsys: name a scenario first, one that 'scenarios' lists")
    out = options.out.expanduser().absolute()
    return NsysCall((*rest, "--out", str(out)), out, options.whole)


def profile_command(nsys: str, report: Path, command: Sequence[str], *, whole: bool) -> list[str]:
    """`nsys profile ...` around a command, writing `report`."""
    capture = () if whole else ("--capture-range=nvtx", f"--nvtx-capture={CAPTURE}", "--capture-range-end=stop")
    return [
        nsys, "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", *capture,
        "--kill=none", f"--output={report.with_suffix('')}", "--force-overwrite=true", *command,
    ]  # fmt: skip


def stats_command(nsys: str, report: Path) -> list[str]:
    """`nsys stats` that prints the summaries of a report."""
    return [nsys, "stats", *(f"--report={name}" for name in REPORTS), "--force-export=true", str(report)]


def run(host: Host, arguments: Sequence[str], env: Mapping[str, str], reporter: Reporter) -> int:
    """Benchmark under nsys, then print the summaries. Returns the first exit code that is not 0; 1 without a report.

    Raises HostError without nsys or where the folder of the report cannot be made.
    """
    nsys = find_nsys()
    call = take_apart(arguments)
    report = _report_path(call)
    bench = [str(host.python), "-m", "speedlab_tools", "bench", *call.benchmark]
    # Otherwise nsys starts to record at registered names only, and tools differ in which names they register.
    watched = {**env, "NSYS_NVTX_PROFILER_REGISTER_ONLY": "0"}
    code = run_child(profile_command(nsys, report, bench, whole=call.whole), cwd=pack_root(), env=watched)
    if not report.is_file():
        reporter.line(
            f"Nsight Systems wrote no report to {report}: nothing was recorded. The scenario must sample with Profile "
            "Sampler and 'nvtx' on; --whole records everything."
        )
        return code or 1
    summary = run_child(stats_command(nsys, report), cwd=pack_root(), env=env)
    reporter.line(f"report: {report} (open it with nsys-ui)")
    return code or summary


def _report_path(call: NsysCall) -> Path:
    folder = call.out / "speedlab" / "nsys"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"--out: {folder} cannot be made: {error.strerror or error}.") from error
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}{SUFFIX}"

"""torch.profiler around a few steps, and its trace as a file for Perfetto and chrome://tracing."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.errors import ResultsError, UnavailableError
from .clock import synchronize
from .store import RunStore, cannot_write, write_atomically

# Variables that a tool sets for the processes it watches. All of these tools want CUPTI, which serves one at a time.
_WATCHING_VARIABLES = {
    "NSYS_PROFILING_SESSION_ID": "Nsight Systems (nsys)",
    "CUDA_INJECTION64_PATH": "a CUDA profiler (CUDA_INJECTION64_PATH)",
    "NV_NSIGHT_INJECTION_TRANSPORT_TYPE": "Nsight Compute (ncu)",
    "NVPROF_ID": "nvprof",
}


def require_profiler(detail: str) -> None:
    """Raises UnavailableError while another profiler watches this process: two at once spoil each other's numbers."""
    watcher = next((name for key, name in _WATCHING_VARIABLES.items() if os.environ.get(key)), None)
    if watcher is not None:
        raise UnavailableError(
            f"Profile Sampler cannot measure '{detail}' while {watcher} watches ComfyUI: both need the same interface "
            "of the driver. Choose detail 'timing', whose NVTX ranges that tool shows, or start ComfyUI without it."
        )
    if _torch_profiler_runs():
        raise UnavailableError(
            f"Profile Sampler cannot measure '{detail}' while torch.profiler is already running in ComfyUI. Stop it, "
            "or choose detail 'timing'."
        )


def _torch_profiler_runs() -> bool:
    import torch

    here = getattr(torch.autograd, "_profiler_enabled", None)
    anywhere = getattr(torch.autograd.profiler, "_is_profiler_enabled", False)
    return bool(anywhere) or (here is not None and bool(here()))


def new_profiler(device: Any) -> Any:
    """A torch.profiler for the host and, where it is supported, for `device`; not started yet.

    Stacks stay off: with them the named ranges go missing.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, supported_activities

    activities = [ProfilerActivity.CPU]
    accelerator = getattr(ProfilerActivity, str(getattr(device, "type", device)).upper(), None)
    if accelerator is not None and accelerator in supported_activities() and accelerator not in activities:
        activities.append(accelerator)
    options: dict[str, Any] = {"activities": activities, "with_stack": False}
    if "acc_events" in inspect.signature(profile.__init__).parameters:
        options["acc_events"] = True
    made = profile(**options)
    if len(activities) > 1:
        # The first start loads and initialises CUPTI, which must not count into the first profiled step.
        with profile(**options):
            torch.zeros(8, device=device).add_(1)
            synchronize(device)
    return made


@contextmanager
def exported(profiler: Any) -> Iterator[Mapping[str, Any]]:
    """The trace of a stopped profiler as read from its export; the export itself is a temporary file."""
    with tempfile.TemporaryDirectory(prefix="speedlab-trace-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        yield json.loads(path.read_text(encoding="utf-8", errors="replace"))


def write_trace(trace: Mapping[str, Any], run_id: str, steps: tuple[int, ...], store: RunStore) -> str:
    """Write the trace beside the run's record and return its path relative to the output folder.

    What tells of the machine or its folders is left out, so that a trace can be shared. Raises ResultsError.
    """
    path = store.trace_path(run_id)
    kept = {key: value for key, value in trace.items() if key not in ("host_name", "traceName", "ERROR", "WARNING")}
    kept["speedlab"] = {"run_id": run_id, "steps": list(steps)}
    try:
        store.folder("runs")
        write_atomically(path, gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), 6, mtime=0))
    except ResultsError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    return path.relative_to(store.root.parent).as_posix()

"""The suite's process: `run.py gpu` starts it with ComfyUI's folder in SPEEDLAB_COMFYUI."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedlab.common.errors import SpeedLabError

from ..cli.arguments import parse
from ..host import inprocess
from ..host.base import as_called, from_environment
from ..host.child import INTERRUPTED
from . import (
    ALLOCATOR_VARIABLE,
    COMPILED_FOLDER,
    LOST_DEVICE,
    NATIVE,
    OTHER_ALLOCATOR,
    RESULTS,
    WHEELS_VARIABLE,
)

log = logging.getLogger("speedlab_tools.gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one call. Returns 0 when it ended without a fault, LOST_DEVICE when a new process has to go on, and
    OTHER_ALLOCATOR when one with PyTorch's own memory allocator has to."""
    began = time.monotonic()
    options, _ = parse("gpu", sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # A compiler's folder that the user chose would make every cold figure a warm one.
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.pop(name, None)
    wheels = os.environ.get(WHEELS_VARIABLE)
    try:
        with tempfile.TemporaryDirectory(prefix="speedlab-gpu-", ignore_cleanup_errors=True) as base:
            native = os.environ.get(ALLOCATOR_VARIABLE) == NATIVE
            folder = Path(wheels) if wheels else None
            pack = inprocess.start(from_environment().comfyui, Path(base), folder, native)
            return _measure(pack, options, began, Path(base))
    except SpeedLabError as error:
        sys.stderr.write(f"run.py gpu: {error}\n")
        return 1


def _measure(pack: Any, options: argparse.Namespace, began: float, base: Path) -> int:
    # The engine as the pack holds it: one set of modules for nodes and suite.
    names = ("bench", "report", "suite", "plan")
    bench_module, report, suite, plan = (importlib.import_module(f"speedlab_tools.gpu.{name}") for name in names)
    environment = importlib.import_module("speedlab.measure.environment").environment
    import torch

    chosen = plan.blocks_of(options)
    chosen = plan.small(chosen) if options.small else chosen
    device = importlib.import_module("comfy.model_management").get_torch_device()
    if device.type == "cpu" and not options.small:
        raise SpeedLabError("PyTorch finds no GPU here. `--small` runs the whole suite on a CPU, to try it out.")
    out = as_called(options.out)
    settings = {"repeats": options.repeats, "small": options.small}
    is_part = bool(options.only or options.plans)
    try:
        journal = report.open_journal(
            out, [RESULTS, *map(as_called, options.resume)], environment(device), settings,
            small=options.small, again=options.again and not is_part,
        )  # fmt: skip
        if is_part and options.again:
            journal.drop(block.row(variant) for block in chosen for variant in block.variants)
        elif options.plans:
            journal.drop_others({block.row(variant): variant.stack for block in chosen for variant in block.variants})
        _write_tiny_decoders(base)
        native = os.environ.get(ALLOCATOR_VARIABLE) == NATIVE
        measured = bench_module.Settings(out, options.minutes, options.repeats, options.small, native)
        bench = bench_module.Bench(pack, journal, measured, began)
        _keep_compiled_code(options.small)
        _watch_the_clock(bench)
        with torch.inference_mode():
            done = suite.run(bench, chosen, lambda text: print(text, flush=True))
        journal.complete = journal.complete or (done and not is_part)
        journal.save()
        print(f"\n{report.text(journal, chosen)}", flush=True)
    except bench_module.OtherAllocatorError as error:
        log.info("%s; a new process goes on", error)
        return OTHER_ALLOCATOR
    except bench_module.LostDeviceError as error:
        log.warning("the device was lost (%s); a new process goes on", error)
        return LOST_DEVICE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _keep_compiled_code(is_small: bool) -> None:
    """A call that ran out of time while compiling must not start over in the next one."""
    if is_small:
        return
    try:
        COMPILED_FOLDER.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("%s cannot be made (%s): each call compiles again", COMPILED_FOLDER, error.strerror)
        return
    importlib.import_module("folder_paths").set_user_directory(str(COMPILED_FOLDER))


def _watch_the_clock(bench: Any) -> None:
    """End a call in time also in the middle of an image: at each step, and after each block that was compiled."""

    def progressed(*_args: Any, **_options: Any) -> None:
        bench.check_time()

    importlib.import_module("comfy.utils").set_progress_bar_global_hook(progressed)


def _write_tiny_decoders(base: Path) -> None:
    synthetic = importlib.import_module("speedlab_tools.synthetic")
    for name in ("taesd", "taesdxl"):
        synthetic.write_taesd(base / "models" / "vae_approx", name)


if __name__ == "__main__":
    sys.exit(main())

"""The options of `run.py gpu`, for the process that starts the suite and the one that is it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..host.base import pack_root

# Exit code of a process whose device no longer answers: another one goes on.
LOST_DEVICE = 75
# That of one which has done all that it can: what is left needs PyTorch's own memory allocator, chosen at the start.
OTHER_ALLOCATOR = 76
ALLOCATOR_VARIABLE = "SPEEDLAB_GPU_ALLOCATOR"
NATIVE = "native"
WHEELS_VARIABLE = "SPEEDLAB_GPU_WHEELS"
_ROOT = pack_root()
PACK_FOLDER = _ROOT / "build" / "gpu"
# Compiled code, for the calls to come.
COMPILED_FOLDER = _ROOT / "build" / "gpu-compiled"
RESULTS = _ROOT / "benchmarks" / "results"


def parser() -> argparse.ArgumentParser:
    """What `run.py gpu` takes."""
    result = argparse.ArgumentParser(
        prog="run.py gpu",
        allow_abbrev=False,
        description="Measure this pack on an NVIDIA GPU with full-size models of random weights: stock ComfyUI and "
        "each technique in turns. A call that was cut off, or ran out of time, is gone on with by the next one.",
    )
    result.add_argument("--minutes", type=_positive, default=8.0, help="time of this call (default: 8)")
    result.add_argument("--repeats", type=_count, default=5, help="images of each variant that count (default: 5)")
    result.add_argument("--only", nargs="+", default=[], metavar="BLOCK", help="blocks whose id begins so")
    result.add_argument(
        "--try", nargs="+", default=[], dest="plans", metavar="NAME=STACK",
        help="only these plans, written as Benchmark's plan axis takes them, in turns with stock: "
        "'mine=compile(inductor)+dynamic_cfg(0.5)+tiny'",
    )  # fmt: skip
    result.add_argument("--model", choices=("sdxl", "sd15"), default="sdxl", help="model of --try (default: sdxl)")
    result.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16", help="its dtype (default: fp16)")
    result.add_argument("--list", action="store_true", help="list the blocks and end")
    result.add_argument("--small", action="store_true", help="tiny models: to try the suite out, on a CPU too")
    result.add_argument("--again", action="store_true", help="measure anew, with --only those blocks alone")
    result.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder for results")
    result.add_argument("--resume", type=Path, nargs="+", default=[], metavar="DIR", help="more places of earlier ones")
    result.add_argument(
        "--pack", nargs="?", type=Path, const=PACK_FOLDER, metavar="DIR",
        help="only make the folder that brings ComfyUI and its pure-Python packages to a machine without network "
        f"(default: {PACK_FOLDER.relative_to(_ROOT)} beside run.py, where the suite looks for it)",
    )  # fmt: skip
    return result


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("a number above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a whole number of 1 or more")
    return value

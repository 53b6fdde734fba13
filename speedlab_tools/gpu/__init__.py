"""`run.py gpu`: one suite of measurements for a bare machine with a GPU, resumed over several calls.

`plan` says what is measured, the `measure_*` files how, `report` keeps and prints the rows. Nothing here is
part of the pack in ComfyUI.
"""

from __future__ import annotations

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

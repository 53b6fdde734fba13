"""Whether compiled code may use the CPU's vector units, without the larger part of inductor's test of it.

Inductor builds a library for each set of instructions and loads each in a new Python process, again in every process
that compiles. Its concern is a PyTorch built without the vector functions, or a compiler that does not know the
instructions; both can be asked directly. Its further tests, of single instructions such as those for bf16, remain.
"""

from __future__ import annotations

import ctypes
import logging
import shlex
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from ...common.timing import apart
from ...common.torch_private import run_cpp_compiler, widest_vectors

log = logging.getLogger(__name__)

# The exponential function that compiled code calls, by the width of its vectors in bits.
_FUNCTIONS = {512: "Sleef_expf16_u10", 256: "Sleef_expf8_u10"}


@cache
@apart("Timing ways to compute")
def known_to_work() -> bool:
    """Whether compiler and PyTorch have all that the widest vectors of this CPU need; False where that cannot
    be known, and inductor's own test decides."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        found = widest_vectors()
        if found is None or not _has_functions(found.bit_width()):
            return False
        _compile(found.build_arch_flags())
    except Exception as error:  # the compiler's, or inductor's insides, which may look different in another PyTorch
        log.debug("SpeedLab: inductor tests the vector instructions itself: %r", error)
        return False
    return True


def _has_functions(bits: int) -> bool:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return bits in _FUNCTIONS and hasattr(ctypes.CDLL(str(library)), _FUNCTIONS[bits])


def _compile(flags: str) -> None:
    """Let inductor call its compiler with these flags. Raises whatever it raises for a compiler without them."""
    with tempfile.TemporaryDirectory(prefix="speedlab-") as folder:
        source = Path(folder) / "vectors.cpp"
        source.write_text("#include <immintrin.h>\n", encoding="utf-8")
        run_cpp_compiler(f"{flags} -fsyntax-only {shlex.quote(str(source))}", folder)

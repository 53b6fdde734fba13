"""Whether compiled code may use the CPU's vector units, without the larger part of inductor's test of it.

Inductor builds a library for each set of instructions and loads each in a new Python process, anew in every process
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
from typing import Any

import torch

from ...common.timing import apart

log = logging.getLogger(__name__)

# The exponential function that compiled code calls, by the width of its vectors in bits.
_FUNCTIONS = {512: "Sleef_expf16_u10", 256: "Sleef_expf8_u10"}


@cache
@apart()
def known_to_work() -> bool:
    """Whether compiler and PyTorch have all that the widest vectors of this CPU need; False where that cannot
    be told, and inductor's own test decides."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        found = _widest()
        if found is None or not _has_functions(found.bit_width()):
            return False
        _compile(found.build_arch_flags())
    except Exception as error:  # the compiler's, or inductor's insides, which may look different in another PyTorch
        log.debug("SpeedLab: inductor tests the vector instructions itself: %r", error)
        return False
    return True


def _widest() -> Any | None:
    """The first set of instructions in inductor's list, which begins with the widest, that this CPU has."""
    from torch._inductor import cpu_vec_isa

    have = cpu_vec_isa.x86_isa_checker()
    known = (isa for isa in cpu_vec_isa.supported_vec_isa_list if str(isa).split())
    return next((isa for isa in known if have and all(name in have for name in str(isa).split())), None)


def _has_functions(bits: int) -> bool:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return bits in _FUNCTIONS and hasattr(ctypes.CDLL(str(library)), _FUNCTIONS[bits])


def _compile(flags: str) -> None:
    """Let inductor call its compiler with these flags. Raises whatever it raises for a compiler without them."""
    from torch._inductor.cpp_builder import get_cpp_compiler, run_compile_cmd

    with tempfile.TemporaryDirectory(prefix="speedlab-") as folder:
        source = Path(folder) / "vectors.cpp"
        source.write_text("#include <immintrin.h>\n", encoding="utf-8")
        run_compile_cmd(f"{get_cpp_compiler()} {flags} -fsyntax-only {shlex.quote(str(source))}", cwd=folder)

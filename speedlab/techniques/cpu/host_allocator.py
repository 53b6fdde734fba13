"""Memory that a layer gives back, kept for the next layer while a model samples on a CPU.

glibc takes every block above 32 MB from the system and gives it back at once. So each large activation, and each
convolution's copy of its weights, comes as fresh pages that the system clears and hands out one by one, in every layer
of every step. That is why guides tell users of PyTorch on a CPU to start it with another allocator. Here glibc itself
keeps what is given back, for a run: the arithmetic is the same, bit for bit.

Blocks above 64 MB fit into the first of glibc's arenas alone, and ComfyUI samples in a thread. `prestartup_script.py`
has the threads of a ComfyUI on a CPU share that arena; in a thread with another one, smaller blocks alone are kept.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = -1  # more than 2 GB may lie free, and an int holds no more
# glibc's own: it maps blocks of their own above a size that grows with what is freed, up to this one.
_MAPPED_BLOCKS = 65536
_LARGEST_THRESHOLD = 32 << 20
# More than any arena but the first can hold.
_LARGE = 96 << 20
_IS_MAPPED = 2  # a flag in the word before a block, in which glibc keeps its size
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@dataclass
class _Users:
    """Runs that want memory kept: the setting holds for the process, so the last one to end puts it back."""

    runs: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_users = _Users()


@cache
def why_not_reused() -> str:
    """Why memory cannot be kept here; empty where it can."""
    if not sys.platform.startswith("linux"):
        return "this is glibc's, the C library of Linux"
    try:
        libc, process = _libc(), ctypes.CDLL(None)
        known = libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return "this Linux has another C library than glibc"
    assert all(known)
    if ctypes.cast(libc.malloc, ctypes.c_void_p).value != ctypes.cast(process.malloc, ctypes.c_void_p).value:
        return "another allocator was loaded before glibc's, and manages memory its own way"
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in _VARIABLES):
        return "the environment sets glibc's allocator already (GLIBC_TUNABLES or MALLOC_...)"
    return ""


@contextmanager
def memory_reused() -> Iterator[bool]:
    """While entered, what is freed stays with the process for the next allocation; afterwards it goes back to the
    system. Gives whether that is so for blocks above 64 MB in this thread too. Call it only where `why_not_reused` is
    empty."""
    with _users.lock:
        _users.runs += 1
        if _users.runs == 1:
            _set(_M_MMAP_MAX, 0)
            _set(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield not _maps_large_blocks()
    finally:
        with _users.lock:
            _users.runs -= 1
            if _users.runs == 0:
                _set(_M_MMAP_MAX, _MAPPED_BLOCKS)
                # What glibc comes to by itself once a large block was freed; it no longer adapts after these calls.
                _set(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
                _set(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
                _libc().malloc_trim(0)


def _maps_large_blocks() -> bool:
    """Whether this thread still gets a large block from the system. It is never touched, so it costs no page."""
    block = _libc().malloc(_LARGE)
    if not block:
        return True
    try:
        return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MAPPED)
    finally:
        _libc().free(block)


def _set(parameter: int, value: int) -> None:
    _libc().mallopt(parameter, value)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    return libc

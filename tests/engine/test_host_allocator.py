"""Memory kept for a run: counted in page faults, which the system counts exactly."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speedlab.techniques.cpu.host_allocator import memory_reused, why_not_reused

pytestmark = pytest.mark.skipif(bool(why_not_reused()), reason=why_not_reused() or "glibc is there")
SIZE = 96 << 20
ROOT = Path(__file__).resolve().parents[2]
CALLS = 8
# Where the system hands out pages of 2 MB by itself, there are few either way.
FEW = 1000


def faults_of_convolutions() -> int:
    """Page faults of convolutions, each of which copies its 59 MB of weights into an order of its own."""
    part = torch.nn.Conv2d(1280, 1280, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 1280, 8, 8)
    part(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        part(x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_layers_find_the_memory_of_those_before() -> None:
    """Here; in a thread, as ComfyUI has it, below in a process of its own."""
    plain = faults_of_convolutions()
    with memory_reused():
        kept = faults_of_convolutions()
    assert kept < max(plain / 2, FEW)


def test_memory_goes_back_to_the_system() -> None:
    before = resident()
    with memory_reused():
        block = torch.empty(3 * SIZE, dtype=torch.uint8).fill_(1)
        del block
        assert resident() > before + 2 * SIZE
    assert resident() < before + SIZE


_NESTED = """
import ctypes

import torch

from speedlab.techniques.cpu import host_allocator
from speedlab.techniques.cpu.host_allocator import memory_reused

SIZE = 96 << 20
NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info


def maps_large_blocks():
    # Whether a block larger than any hole is mapped for itself, which is how it goes back at once.
    before = libc.mallinfo2().hblkhd
    block = torch.empty(8 * SIZE, dtype=torch.uint8)  # never touched
    mapped = libc.mallinfo2().hblkhd - before
    del block
    return mapped >= 8 * SIZE


assert maps_large_blocks(), "before"
try:
    with memory_reused():
        with memory_reused():
            assert not maps_large_blocks(), "inner"
        assert not maps_large_blocks(), "the outer one still holds"
        raise RuntimeError("in the middle")
except RuntimeError as error:
    assert str(error) == "in the middle"
assert host_allocator._users.runs == 0
assert maps_large_blocks(), "after"
"""


def test_runs_within_runs_and_errors() -> None:
    """In a process of its own: where this one's allocator puts a block depends on every test before."""
    ended = subprocess.run([sys.executable, "-c", _NESTED], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


_LARGE_IN_A_THREAD = """
import resource
import threading

from speedlab.techniques.cpu.host_allocator import memory_reused


def run():
    import torch

    def faults():
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(8):
            torch.empty(96 << 20, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    torch.set_num_threads(1)
    plain = faults()
    with memory_reused() as keeps_large:
        faults()
        kept = faults()
    print(keeps_large, plain, kept)


thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("arenas", ["1", "8"])
def test_blocks_above_64_mb_are_kept_in_a_thread_of_the_first_arena(arenas: str) -> None:
    """As `prestartup_script.py` arranges it; elsewhere it is told that they are not."""
    ended = subprocess.run(
        [sys.executable, "-c", _LARGE_IN_A_THREAD], env={**os.environ, "MALLOC_ARENA_MAX": arenas},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    keeps_large, plain, kept = ended.stdout.split()
    assert keeps_large == str(arenas == "1")
    if arenas == "1":
        # Now and then a small allocation lies in the freed block, and the next large one is a new one.
        assert int(kept) <= int(plain) // 4
    assert int(plain) > 100  # also where a page has 2 MB


@pytest.mark.parametrize("variable, value", [("GLIBC_TUNABLES", "glibc.malloc.mmap_max=10"), ("MALLOC_MMAP_MAX_", "1")])
def test_what_the_user_has_set_stays(variable: str, value: str) -> None:
    code = "from speedlab.techniques.cpu.host_allocator import why_not_reused; print(why_not_reused())"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, variable: value}, cwd=ROOT, capture_output=True, text=True
    )
    assert "environment sets glibc's allocator" in told.stdout, told.stderr


def test_other_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not_reused.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        assert "Linux" in why_not_reused()
    why_not_reused.cache_clear()
    assert why_not_reused() == ""

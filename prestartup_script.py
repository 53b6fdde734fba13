"""ComfyUI runs this file before it imports PyTorch and starts threads: what Precision's `memory` needs from the start.

glibc keeps memory in arenas. Only the first one can keep a block above 64 MB for later; a thread with an arena of its
own gets such a block from the system and gives it back at once. ComfyUI samples in a thread, and how many arenas there
are can be said only before threads have them. So on a CPU, which is what `memory` is for, all threads share the first.
"""

from __future__ import annotations

import ctypes
import os
import sys

from comfy.cli_args import args

_M_ARENA_MAX = -8  # mallopt(3)


def share_one_arena() -> None:
    """Have the threads to come share the first arena, unless the environment says how many there are."""
    if not sys.platform.startswith("linux"):
        return
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_ARENA_MAX, 1)


if args.cpu:
    share_one_arena()

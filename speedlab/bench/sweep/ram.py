"""How much RAM a batch may still take. A CPU that runs out of memory is killed, so nothing is tried there by force."""

from __future__ import annotations

from pathlib import Path

from .batch_search import RAM_SHARE

_CGROUP = Path("/sys/fs/cgroup")


def free_ram_bytes() -> int:
    """RAM that this process may still take: what the system has left, or the limit of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdigit() else free


def too_large(growth: int, resident_now: int, start: int, free: int) -> str | None:
    """Why a batch whose peak lies `growth` bytes over `start` is not tried; None where it fits in 80 % of `free`."""
    needed = start + growth - resident_now
    if needed <= RAM_SHARE * free:
        return None
    return (
        f"not tried: it would take {needed / 1e9:.1f} GB by prediction, more than {RAM_SHARE:.0%} of the "
        f"{free / 1e9:.1f} GB of RAM that are free"
    )

"""How many threads a ComfyUI on a CPU gets, and on which CPUs: one a physical core, all on one NUMA node.

Two threads of one core share its units for products of matrices, and weights that lie in another node's memory are read
over the link between both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"
_SYSTEM = Path("/sys/devices/system")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Threads:
    """`count` threads; `cpus` are those of a NUMA node where there are several, else empty: nothing is bound."""

    count: int
    words: str
    cpus: frozenset[int] = frozenset()


def choose(
    env: Mapping[str, str],
    allowed: Collection[int] | None = None,
    system: Path = _SYSTEM,
    quota: Path = _QUOTA,
) -> Threads | None:
    """For a process with this environment; None where the user set OMP_NUM_THREADS, or the system tells no cores.

    `allowed` are the CPUs that it may run on.
    """
    if env.get(VARIABLE):
        return None
    if allowed is None:
        allowed = getattr(os, "sched_getaffinity", lambda _process: ())(0)
    usable = frozenset(allowed)
    cores = {cpu: _listed(system / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list") for cpu in usable}
    if not usable or not all(cores.values()):
        return None
    nodes = {
        int(folder.name[4:]): usable & _listed(folder / "cpulist") for folder in (system / "node").glob("node[0-9]*")
    }
    nodes = {number: cpus for number, cpus in nodes.items() if cpus}
    bound, where = frozenset[int](), ""
    if len(nodes) > 1:
        node = max(sorted(nodes), key=lambda number: len({cores[cpu] for cpu in nodes[number]}))
        bound, where = nodes[node], f", on NUMA node {node} of {len(nodes)}"
    found = len({cores[cpu] for cpu in bound or usable})
    limit = _limit(quota)
    if limit is not None and limit < found:
        return Threads(limit, f"{limit}, as many as the limit of this container allows{where}", bound)
    return Threads(found, f"{found}, one a physical core{where}", bound)


def _listed(path: Path) -> frozenset[int]:
    """The CPUs in a file such as `0-3,8`; none where it cannot be read."""
    try:
        parts = [part for part in path.read_text(encoding="ascii").strip().split(",") if part]
        ends = [[int(number) for number in part.split("-")] for part in parts]
    except (OSError, ValueError):
        return frozenset()
    return frozenset(cpu for pair in ends for cpu in range(pair[0], pair[-1] + 1))


def _limit(path: Path) -> int | None:
    """CPUs that the container may use at once."""
    try:
        used, period = path.read_text(encoding="ascii").split()
        return None if used == "max" else max(1, math.ceil(int(used) / int(period)))
    except (OSError, ValueError):
        return None

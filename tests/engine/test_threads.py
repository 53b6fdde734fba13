"""How many threads `serve` and `bench` give a ComfyUI on a CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from speedlab_tools.host import threads
from speedlab_tools.host.base import Host, ServerError
from speedlab_tools.host.server import ComfyServer
from speedlab_tools.host.threads import choose


def machine(root: Path, cores: list[str], nodes: list[str]) -> Path:
    """What Linux tells of CPUs: `cores` the CPUs of each core, `nodes` those of each NUMA node."""
    for text in cores:
        for cpu in text.split(","):
            folder = root / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{text}\n")
    for number, text in enumerate(nodes):
        (root / "node" / f"node{number}").mkdir(parents=True)
        (root / "node" / f"node{number}" / "cpulist").write_text(f"{text}\n")
    return root


def test_one_thread_a_core_and_one_numa_node(tmp_path: Path) -> None:
    two = machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"], ["0-1,4-5", "2-3,6-7"])
    none = tmp_path / "no such file"
    found = choose({}, range(8), two, none)
    assert found is not None and (found.count, found.cpus) == (2, {0, 1, 4, 5})
    assert "NUMA node 0 of 2" in found.words
    # The node of which the process may use more cores.
    found = choose({}, (0, 2, 3, 6, 7), two, none)
    assert found is not None and (found.count, found.cpus) == (2, {2, 3, 6, 7})
    # On one node alone nothing is bound, and two threads of one core count once.
    found = choose({}, (2, 6), two, none)
    assert found is not None and (found.count, found.cpus) == (1, frozenset())


@pytest.mark.parametrize(("text", "count"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("", 4)])
def test_a_containers_limit(tmp_path: Path, text: str, count: int) -> None:
    one = machine(tmp_path, ["0", "1", "2", "3"], ["0-3"])
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    found = choose({}, range(4), one, quota)
    assert found is not None and found.count == count and not found.cpus


def test_the_users_choice_and_unknown_systems_are_left_alone(tmp_path: Path) -> None:
    one = machine(tmp_path, ["0", "1"], ["0-1"])
    assert choose({"OMP_NUM_THREADS": "7"}, range(2), one) is None
    assert choose({}, range(3), one) is None, "of one CPU nothing is told"
    assert choose({}, (), one) is None


def test_a_server_starts_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ComfyUI that says what it was given, and ends."""
    comfyui = tmp_path / "comfyui"
    (comfyui / "comfy").mkdir(parents=True)
    (comfyui / "comfy" / "cli_args.py").write_text('parser.add_argument("--base-directory")\n')
    # It is bound right after its start.
    (comfyui / "main.py").write_text(
        "import os, time\ntime.sleep(0.5)\n"
        "print(os.environ.get('OMP_NUM_THREADS'), getattr(os, 'sched_getaffinity', lambda _: None)(0))\n"
    )
    here: set[int] | None = getattr(os, "sched_getaffinity", lambda _: None)(0)
    one = min(here) if here else None  # elsewhere than on Linux nothing is bound
    (tmp_path / "pack").mkdir()

    def said(*extra: str, cpu: bool | None = True, **env: str) -> str:
        host = Host(comfyui, Path(sys.executable), True, "test")
        server = ComfyServer(host, pack=tmp_path / "pack", base=tmp_path / "base", cpu=cpu, extra_args=extra, env=env)
        with pytest.raises(ServerError):
            server.start()
        return server.tail(1)[0]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        threads,
        "choose",
        lambda env: None if "OMP_NUM_THREADS" in env else threads.Threads(3, "3", frozenset({one} - {None})),
    )
    assert said() == f"3 {here and {one}}"
    assert said("--cpu", cpu=None) == f"3 {here and {one}}", "asked for in ComfyUI's own words"
    assert said(OMP_NUM_THREADS="5") == f"5 {here}"

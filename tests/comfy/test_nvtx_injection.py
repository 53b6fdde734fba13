"""A real NVTX tool attached to a real run: an injection library, built here, that counts pushes and pops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def injection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The counting library."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform == "win32":
        message = "no C compiler for the NVTX injection library"
        if os.environ.get("CI", "").lower() in ("1", "true") and sys.platform != "win32":
            pytest.fail(message)
        pytest.skip(message)
    library = tmp_path_factory.mktemp("nvtx") / "libnvtxcounter.so"
    source = HERE / "nvtx_counter.c"
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", str(source), "-o", str(library)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return library


@pytest.fixture
def counted(injection: Path, comfy: object, tmp_path: Path):
    """Facts of a run under the library: pushes by name, and totals."""

    def run(steps: int, sampler: str = "euler", detail: str = "timing") -> tuple[dict[str, int], dict[str, int]]:
        counts = tmp_path / f"counts-{steps}-{sampler}-{detail}"
        answer = subprocess.run(
            [sys.executable, str(HERE / "nvtx_child.py"), str(tmp_path), str(steps), sampler, detail],
            env={**os.environ, "NVTX_INJECTION64_PATH": str(injection), "NVTX_COUNTS": str(counts)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr[-2000:]
        names, totals = {}, {}
        for line in counts.read_text().splitlines():
            *key, value = line.split()
            (names if key[0] == "name" else totals)[key[-1]] = int(value)
        return names, totals

    return run


@pytest.mark.full
def test_a_tool_sees_every_range_and_as_many_names_for_more_steps(counted):
    """The extra passes of a detail emit none."""
    few, totals = counted(3, detail="trace")
    # One warm-up and two measured runs of three steps.
    assert few == {"sl/run": 1, "sl/sample": 3, "sl/step": 9, "sl/eval": 9, "sl/forward": 9}
    assert totals["pushes"] == totals["pops"] == sum(few.values())
    assert totals["open"] == 0
    assert totals["deepest"] == 5
    many, totals = counted(12, "heun")
    assert set(many) == set(few), "names do not grow with steps"
    assert many == {"sl/run": 1, "sl/sample": 3, "sl/step": 36, "sl/eval": 69, "sl/forward": 69}
    assert totals["pushes"] == totals["pops"]

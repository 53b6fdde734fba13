"""The pack's requirements install from wheels alone wherever ComfyUI runs, and it does without what has none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from speedlab.measure import environment
from speedlab_tools.host import pack_root

# Tags as pip spells them for that system; what ComfyUI's own packages ask for.
PLATFORMS = {
    "win32": ("win_amd64",),
    "linux": ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"),
    "darwin": ("macosx_14_0_arm64",),
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def lines_for(system: str, python: str) -> list[str]:
    """The requirements that apply there. pip reads markers for the Python that it runs in."""
    text = (pack_root() / "requirements.txt").read_text(encoding="utf-8")
    wanted = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    there = {**default_environment(), "sys_platform": system, "python_version": python}
    found = []
    for one in wanted:
        if one.marker is None or one.marker.evaluate(there):
            one.marker = None
            found.append(str(one))
    return found


def test_the_metadata_lists_what_the_file_lists() -> None:
    text = (pack_root() / "requirements.txt").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", (pack_root() / "pyproject.toml").read_text("utf-8"), re.M)
    assert re.findall(r'"([^"]+)"', listed) == [line for line in text.splitlines() if line and line[0] != "#"]


def test_nvtx_is_not_asked_for_where_it_has_no_wheel() -> None:
    assert not any(line.startswith("nvtx") for line in lines_for("darwin", "3.12"))
    assert any(line.startswith("nvtx") for line in lines_for("linux", "3.12"))


@pytest.mark.full
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", PLATFORMS)
def test_everything_comes_as_a_wheel(system: str, python: str, tmp_path: Path) -> None:
    tags = [part for tag in PLATFORMS[system] for part in ("--platform", tag)]
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    there = ["--implementation", "cp", "--python-version", python, *tags, "--target", str(tmp_path)]
    done = subprocess.run([*pip, *there, *lines_for(system, python)], capture_output=True, text=True, timeout=600)
    if "Failed to establish a new connection" in done.stderr or "Temporary failure in name" in done.stderr:
        pytest.skip("pip reaches no index")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Would install" in done.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version: 12.2", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build", "575.57.08"),
        ("something else", None),
        (None, None),
    ],
)
def test_the_driver_is_named_by_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, told: str | None
) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(environment, "_KERNEL_MODULE", file)
    cuda = environment.cuda_of_driver()
    environment._driver_version.cache_clear()
    try:
        assert environment._driver_version() == (told or (f"for CUDA {cuda}" if cuda else None))
    finally:
        environment._driver_version.cache_clear()


def test_no_source_runs_text_as_code() -> None:
    """The Registry's validator warns of exec and eval in any file of a pack."""
    found = [
        f"{path.relative_to(pack_root())}:{number}"
        for folder in ("speedlab", "speedlab_tools", "nodes", "tests", "benchmarks")
        for path in (pack_root() / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"(?<![\w.\"'_])(exec|eval)\(", line)
    ]
    assert not found

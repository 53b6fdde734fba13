"""The pack's requirements install from wheels alone wherever ComfyUI runs, and it does without what has none."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
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


def test_a_registry_install_holds_what_a_user_needs_and_is_as_large_as_said() -> None:
    ignored = [
        line.strip("/")
        for line in (pack_root() / ".comfyignore").read_text(encoding="utf-8").splitlines()
        if line and line[0] != "#"
    ]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=pack_root(), capture_output=True, text=True, check=True)
    kept = [
        name
        for name in listed.stdout.split("\0")
        if name and not any(name == one or name.startswith(f"{one}/") for one in ignored)
    ]
    for needed in ("__init__.py", "prestartup_script.py", "requirements.txt", "run.py", "README.md", "LICENSE"):
        assert needed in kept
    assert not [name for name in kept if name.split("/")[0] in ("tests", "benchmarks", ".github")]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in kept:
            file.write(pack_root() / name, name)
    on_disk = sum((pack_root() / name).stat().st_size for name in kept)
    said = f"is {len(archive.getvalue()) / 1e6:.0f} MB to download from the Registry and {on_disk / 1e6:.0f} MB on disk"
    assert said in (pack_root() / "README.md").read_text(encoding="utf-8")


def test_the_workflows_cover_what_they_are_said_to() -> None:
    """Other systems and Pythons on every push; what the Registry checks and the two readers of packs once a week."""
    ci, weekly = (
        yaml.safe_load((pack_root() / ".github" / "workflows" / name).read_text(encoding="utf-8"))["jobs"]
        for name in ("ci.yml", "weekly.yml")
    )
    legs = {(leg["system"].split("-")[0], leg["python"]) for leg in ci["elsewhere"]["strategy"]["matrix"]["include"]}
    assert {"windows", "macos"} <= {system for system, _ in legs} and {"3.13", "3.14"} <= {python for _, python in legs}
    runs = [step.get("run", "") for step in ci["elsewhere"]["steps"]]
    assert "python run.py test tests/engine" in runs and "python run.py check" in runs
    text = "\n".join(step.get("run", "") for step in weekly["registry"]["steps"])
    for tool in ("node validate", "comfy-import-guard check", "comfy-lint --server"):
        assert tool in text

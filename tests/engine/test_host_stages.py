"""Stages, their stamps, the lock, and the records of installed packages."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from speedlab_tools.host import HostError, managed, packages
from speedlab_tools.host.lock import SetupLock
from speedlab_tools.host.packages import explain_failure, pip_environment
from speedlab_tools.host.progress import PipDigest, Reporter, run_logged
from speedlab_tools.host.staged import Stage, first_reason, reason_to_run, run_stages


def quiet() -> Reporter:
    return Reporter(io.StringIO())


class Bench:
    """Two stages that write a file each, and count how often they ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stamps = root / "stamps"
        self.inputs = {"one": "1", "two": "2"}
        self.runs: list[str] = []
        self.failing = ""

    def stages(self) -> list[Stage]:
        return [self._stage("one"), self._stage("two")]

    def go(self) -> list[str]:
        return run_stages(self.stages(), self.stamps, quiet())

    def _stage(self, name: str) -> Stage:
        def run(_label: str) -> dict[str, str]:
            self.runs.append(name)
            (self.root / name).write_text("half")
            if self.failing == name:
                raise HostError("the network is gone")
            (self.root / name).write_text("whole")
            return {"text": "whole"}

        def fault(facts: dict[str, str]) -> str:
            file = self.root / name
            return "" if file.is_file() and file.read_text() == facts["text"] else f"{name} is damaged"

        return Stage(name, name.title(), lambda: {"input": self.inputs[name]}, run, fault)


def test_stages_run_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.go() == ["one", "two"]
    assert first_reason(bench.stages(), bench.stamps) == ""
    assert bench.go() == []


def test_only_the_stage_with_new_inputs_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.go()
    bench.inputs["two"] = "changed"
    assert "has changed" in first_reason(bench.stages(), bench.stamps)
    assert bench.go() == ["two"]


def test_only_the_damaged_stage_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.go()
    (tmp_path / "one").unlink()
    assert first_reason(bench.stages(), bench.stamps) == "One: one is damaged"
    assert bench.go() == ["one"]


def test_a_stage_that_fails_leaves_no_stamp_and_resumes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.failing = "two"
    with pytest.raises(HostError, match="network"):
        bench.go()
    bench.failing = ""
    assert bench.go() == ["two"]
    assert bench.runs == ["one", "two", "two"]


def test_inputs_that_change_during_the_run_are_seen(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    stage = bench.stages()[0]

    def run(label: str) -> dict[str, str]:
        facts = stage.run(label)
        bench.inputs["one"] = "edited meanwhile"
        return facts

    edited = Stage(stage.name, stage.title, stage.inputs, run, stage.fault)
    run_stages([edited], bench.stamps, quiet())
    assert "has changed" in reason_to_run(stage, bench.stamps)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "x"}', "null"])
def test_an_unreadable_stamp_means_not_done(tmp_path: Path, text: str) -> None:
    bench = Bench(tmp_path)
    bench.go()
    (bench.stamps / "one.json").write_text(text)
    assert "unreadable" in reason_to_run(bench.stages()[0], bench.stamps)
    assert bench.go() == ["one"]


# The lock


def test_the_lock_excludes_and_says_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    said: list[str] = []
    with SetupLock(path), pytest.raises(HostError, match=str(os.getpid())):
        SetupLock(path, wait_s=0.05, poll_s=0.01, on_wait=said.append).__enter__()
    assert len(said) == 1 and "waiting" in said[0]
    with SetupLock(path, wait_s=0.0):
        pass


def test_a_waiting_set_up_goes_on_when_the_other_ends(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    entered = threading.Event()

    def second() -> None:
        with SetupLock(path, wait_s=20, poll_s=0.01):
            entered.set()

    with SetupLock(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(20)
    thread.join()


def test_a_lock_left_by_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    path.write_text(dead.stdout)
    with SetupLock(path, wait_s=0.0):
        assert path.read_text().strip() == str(os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are inherited on POSIX only")
def test_a_child_that_outlives_its_parent_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    with SetupLock(path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=lock.inherit)
    try:
        with pytest.raises(HostError, match="held"):
            SetupLock(path, wait_s=0.05, poll_s=0.01).__enter__()
    finally:
        child.communicate(b"\n")
    with SetupLock(path, wait_s=5.0, poll_s=0.01):
        pass


# Records of packages


def install(folder: Path, name: str, needs: tuple[str, ...] = (), text: str = "x = 1\n") -> Path:
    """Lay a package out as pip does."""
    module = name.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(text)
    headers = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
    (info / "METADATA").write_text("\n".join(headers) + "\n\nRequires-Dist: not-a-header\n")
    rows = [f"{module}.py,sha256=x,{len(text)}", f"{module}.pyc,,", f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    return info


def test_whole_packages_have_no_fault(tmp_path: Path) -> None:
    install(tmp_path, "Some-Package")
    found = packages.installed(tmp_path)
    assert list(found) == ["some-package"]
    assert found["some-package"].version == "1.0" and found["some-package"].fault == ""
    assert packages.installed(None) == {}


@pytest.mark.parametrize("damage", ["file", "size", "RECORD", "METADATA"])
def test_damage_is_seen_and_its_record_removed(tmp_path: Path, damage: str) -> None:
    info = install(tmp_path, "one")
    install(tmp_path, "two")
    (tmp_path / "~ne-1.0.dist-info").mkdir()
    if damage == "file":
        (tmp_path / "one.py").unlink()
    elif damage == "size":
        (tmp_path / "one.py").write_text("x")
    else:
        (info / damage).unlink()
    assert packages.installed(tmp_path)["one"].fault
    removed = packages.remove_broken(tmp_path)
    assert len(removed) == 1 and removed[0].startswith("one (")
    assert not info.exists() and not list(tmp_path.glob("~*"))
    assert list(packages.installed(tmp_path)) == ["two"]


def test_requirement_lines() -> None:
    text = "# all\n\ntorch\nnumpy>=1.25 # why\n--extra-index-url x\n-r other.txt\nPyYAML~=6.0 ; python_version > '3'\n"
    lines = packages.requirement_lines(text)
    assert lines == ["torch", "numpy>=1.25", "PyYAML~=6.0 ; python_version > '3'"]
    assert [packages.requirement_name(line) for line in lines] == ["torch", "numpy", "pyyaml"]
    assert packages.requirement_name("./folder") == ""


@pytest.mark.parametrize("layout", ["Lib/site-packages", "lib/python3.11/site-packages"])
def test_site_packages_of_both_layouts(tmp_path: Path, layout: str) -> None:
    (tmp_path / layout).mkdir(parents=True)
    assert packages.site_packages(tmp_path) == tmp_path / layout


# pip in words


def test_pip_failures_in_words(tmp_path: Path) -> None:
    log = tmp_path / "torch.log"
    unfound = "ERROR: No matching distribution found for torch==2.12.1\n"
    gone = f"WARNING: Retrying after connection broken by 'NewConnectionError'\n{unfound}"
    assert "Could not fetch torch==2.12.1" in explain_failure(gone, what="PyTorch", log=log)
    unbuilt = explain_failure(unfound, what="PyTorch", log=log)
    assert "torch==2.12.1" in unbuilt and "--comfyui" in unbuilt
    assert "disk is full" in explain_failure("OSError: [Errno 28] No space left on device", what="PyTorch", log=log)
    assert "ResolutionImpossible" in explain_failure("ResolutionImpossible", what="PyTorch", log=log)


def test_pip_keeps_the_users_settings_and_leaves_no_other_packages_in() -> None:
    env = {"PIP_INDEX_URL": "https://own.example/simple", "PIP_USER": "1", "PYTHONPATH": "/x", "PIP_TARGET": "/y"}
    result = pip_environment(env)
    assert result["PIP_INDEX_URL"] == "https://own.example/simple"
    assert result["PIP_USER"] == "0" and "PYTHONPATH" not in result and "PIP_TARGET" not in result


def test_pips_lines_become_one() -> None:
    digest = PipDigest()
    for line in (
        "Collecting torch==2.12.1\n",
        "  Downloading torch-2.12.1-cp311-cp311-manylinux_2_28_x86_64.whl (532.2 MB)\n",
        "Collecting numpy>=1.25 (from torchvision)\n",
        "  Using cached numpy-2.4.6-cp311-cp311-manylinux.whl.metadata (6.6 kB)\n",
    ):
        digest.feed(line)
    assert str(digest) == "fetching numpy, 0.53 GB so far"
    digest.feed("Installing collected packages: a, b, c\n")
    assert str(digest) == "unpacking 3 packages (0.53 GB packed)"


def test_a_silent_command_shows_signs_of_life(tmp_path: Path) -> None:
    stream = io.StringIO()
    code = "import time; time.sleep(0.5); print('end'); raise SystemExit(3)"
    outcome = run_logged(
        [sys.executable, "-c", code],
        log=tmp_path / "x.log",
        reporter=Reporter(stream, interval_s=0.05),
        label="[1/1] X",
    )
    assert outcome.code == 3 and outcome.lines == ("end",)
    assert stream.getvalue().startswith("[1/1] X: starting")
    assert "end\n" in (tmp_path / "x.log").read_text()


# Wheels


def test_a_file_outside_of_its_folder_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "evil-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as sink:
        sink.writestr("pkg/../../escaped.py", "x")
    with pytest.raises(HostError, match="outside"):
        managed.unpack(archive, "pkg", tmp_path / "target")
    assert not (tmp_path.parent / "escaped.py").exists()


def test_unpack_keeps_an_old_tree_with_the_users_files(tmp_path: Path) -> None:
    archive = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as sink:
        sink.writestr("pkg/main.py", "new")
        sink.writestr("pkg/drop.yaml", "x")
    target = tmp_path / "tree"
    (target / "models").mkdir(parents=True)
    (target / "main.py").write_text("old")
    (target / "models" / "mine.safetensors").write_text("mine")
    kept: list[Path] = []
    sizes = managed.unpack(archive, "pkg", target, ("drop.yaml",), on_kept=kept.append)
    assert sizes == {"main.py": 3} and (target / "main.py").read_text() == "new"
    assert (kept[0] / "models" / "mine.safetensors").read_text() == "mine"
    assert managed.tree_fault(target, sizes) == ""
    managed.unpack(archive, "pkg", target, ("drop.yaml",), on_kept=kept.append)
    assert len(kept) == 1 and len(list(tmp_path.glob("tree*"))) == 2

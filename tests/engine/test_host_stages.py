"""Stages and their stamps, the lock, pip's failures in words, and the wheel that holds ComfyUI."""

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
from speedlab_tools.host.environment import Stage, StagedEnvironment, key_of, setup_lock
from speedlab_tools.host.packages import failure_text, pip_environment
from speedlab_tools.host.progress import Reporter, pip_status, run_logged


class Bench(StagedEnvironment):
    """Two stages that write a file each, and remember which ran."""

    announcement = "Setting up the bench"
    disk_gb = 0.0

    def __init__(self, root: Path) -> None:
        self.stream = io.StringIO()
        super().__init__(root, Reporter(self.stream))
        self.inputs = {"one": "1", "two": "2"}
        self.runs: list[str] = []
        self.failing = ""
        self.edited_meanwhile = False

    def stages(self) -> list[Stage]:
        return [self._stage("one"), self._stage("two")]

    def go(self) -> list[str]:
        before = len(self.runs)
        self.prepare()
        return self.runs[before:]

    def _stage(self, name: str) -> Stage:
        def run(_label: str) -> None:
            self.runs.append(name)
            if self.failing == name:
                raise HostError("the network is gone")
            (self.root / name).write_text("whole")
            if self.edited_meanwhile:
                self.inputs[name] = "edited meanwhile"

        return Stage(name, name.title(), key_of({"input": self.inputs[name]}), run, self.root / name)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_stages_run_once_and_are_listed(bench: Bench) -> None:
    assert bench.missing() == "One: not done yet"
    assert bench.go() == ["one", "two"]
    said = bench.stream.getvalue()
    assert said.startswith("Setting up the bench\n[1/2] One: not done yet\n[1/2] One: done in ")
    assert bench.missing() == "" and bench.go() == []
    assert bench.stream.getvalue() == said


def test_only_the_stage_with_new_inputs_runs(bench: Bench) -> None:
    bench.go()
    bench.inputs["two"] = "changed"
    assert "has changed" in bench.missing()
    assert bench.go() == ["two"]
    assert "[1/2] One: ready" in bench.stream.getvalue()


def test_only_the_stage_whose_result_is_gone_runs(bench: Bench) -> None:
    bench.go()
    (bench.root / "one").unlink()
    assert bench.missing() == f"One: {bench.root / 'one'} is missing"
    assert bench.go() == ["one"]


@pytest.mark.parametrize("error", [HostError("the network is gone"), KeyboardInterrupt()])
def test_a_stage_that_did_not_end_leaves_no_stamp_and_resumes(bench: Bench, error: BaseException) -> None:
    whole = bench.stages()
    half = Stage("two", "Two", whole[1].key, lambda _label: (_ for _ in ()).throw(error), whole[1].result)
    bench.stages = lambda: [whole[0], half]  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        bench.go()
    bench.stages = lambda: whole  # type: ignore[method-assign]
    assert bench.missing() == "Two: not done yet"
    assert bench.go() == ["two"]


def test_a_stage_that_fails_the_second_time_is_not_taken_for_done(bench: Bench) -> None:
    bench.go()
    bench.inputs["two"], bench.failing = "changed", "two"
    with pytest.raises(HostError, match="network"):
        bench.go()
    bench.inputs["two"], bench.failing = "2", ""
    assert bench.go() == ["two"], "what it was before is gone with the attempt"


def test_inputs_that_change_during_the_run_are_seen(bench: Bench) -> None:
    bench.edited_meanwhile = True
    assert bench.go() == ["one", "two"]
    bench.edited_meanwhile = False
    assert "has changed" in bench.missing()
    assert bench.go() == ["one", "two"]


@pytest.mark.parametrize("text", [b"", b"{", b'{"key": "x"}', b"\xff\xfe"])
def test_a_damaged_stamp_means_not_done(bench: Bench, text: bytes) -> None:
    bench.go()
    (bench.stamps / "one.json").write_bytes(text)
    assert bench.missing()
    assert bench.go() == ["one"]


def test_too_little_space_is_said_once_and_before(bench: Bench) -> None:
    bench.disk_gb = 1e9
    bench.go()
    assert bench.stream.getvalue().splitlines()[1].startswith("Warning: ")
    assert bench.stream.getvalue().count("GB are free there; the set-up takes about 1e+09 GB") == 1


# The lock


def test_the_lock_excludes_and_says_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    said: list[str] = []
    with (
        setup_lock(path, said.append),
        pytest.raises(HostError, match=str(os.getpid())),
        setup_lock(path, said.append, wait_s=0.05, poll_s=0.01),
    ):
        pass
    assert len(said) == 1 and "waiting" in said[0]
    with setup_lock(path, said.append, wait_s=0.0):
        pass


def test_a_waiting_set_up_goes_on_when_the_other_ends(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    entered, waiting = threading.Event(), threading.Event()

    def second() -> None:
        with setup_lock(path, lambda _text: waiting.set(), poll_s=0.01):
            entered.set()

    with setup_lock(path, print):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(20) and not entered.is_set()
    assert entered.wait(20)
    thread.join()


def test_a_lock_left_by_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    path.write_text(dead.stdout)
    with setup_lock(path, print, wait_s=0.0):
        assert path.read_text().strip() == str(os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are inherited on POSIX only")
def test_a_child_that_outlives_its_parent_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    with setup_lock(path, print) as inherit:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=inherit)
    try:
        with pytest.raises(HostError, match="held"), setup_lock(path, print, wait_s=0.05, poll_s=0.01):
            pass
    finally:
        child.communicate(b"\n")
    with setup_lock(path, print, wait_s=5.0, poll_s=0.01):
        pass


# pip


def test_requirement_lines() -> None:
    text = "# all\n\ntorch\nnumpy>=1.25 # why\n--extra-index-url x\n-r other.txt\nPyYAML~=6.0 ; python_version > '3'\n"
    lines = packages.requirement_lines(text)
    assert lines == ["torch", "numpy>=1.25", "PyYAML~=6.0 ; python_version > '3'"]


def test_pip_failures_in_words(tmp_path: Path) -> None:
    log = tmp_path / "torch.log"
    unfound = "ERROR: No matching distribution found for torch==2.12.1\n"
    gone = f"WARNING: Retrying after connection broken by 'NewConnectionError'\n{unfound}"
    assert "Could not fetch torch==2.12.1 (for PyTorch): the package index did not answer" in failure_text(
        gone, what="PyTorch", log=log
    )
    unbuilt = failure_text(unfound, what="PyTorch", log=log)
    assert "torch==2.12.1" in unbuilt and "--comfyui" in unbuilt and str(log) in unbuilt
    assert "disk is full" in failure_text("OSError: [Errno 28] No space left on device", what="PyTorch", log=log)
    assert "ResolutionImpossible" in failure_text("ResolutionImpossible", what="PyTorch", log=log)


def test_pip_keeps_the_users_settings_and_leaves_no_other_packages_in() -> None:
    env = {"PIP_INDEX_URL": "https://own.example/simple", "PIP_USER": "1", "PYTHONPATH": "/x", "PIP_TARGET": "/y"}
    result = pip_environment(env)
    assert result["PIP_INDEX_URL"] == "https://own.example/simple"
    assert result["PIP_USER"] == "0" and "PYTHONPATH" not in result and "PIP_TARGET" not in result


def test_pips_output_in_a_few_words() -> None:
    output = (
        "Collecting torch==2.12.1\n"
        "  Downloading torch-2.12.1-cp311-cp311-manylinux_2_28_x86_64.whl (532.2 MB)\n"
        "Collecting numpy>=1.25 (from torchvision)\n"
        "  Using cached numpy-2.4.6-cp311-cp311-manylinux.whl.metadata (6.6 kB)\n"
    )
    assert pip_status("") == "starting"
    assert pip_status(output) == "fetching numpy, 0.53 GB so far"
    assert pip_status(output + "Installing collected packages: a, b, c\n") == "unpacking 3 packages, 0.53 GB so far"


def test_a_silent_command_shows_signs_of_life(tmp_path: Path) -> None:
    stream = io.StringIO()
    code = "import time; time.sleep(0.5); print('end'); raise SystemExit(3)"
    ended = run_logged(
        [sys.executable, "-c", code],
        log=tmp_path / "x.log",
        reporter=Reporter(stream, interval_s=0.05),
        label="[1/1] X",
    )
    assert ended == (3, "end\n") and (tmp_path / "x.log").read_text() == "end\n"
    assert stream.getvalue().startswith("[1/1] X: starting")


def test_an_interrupt_ends_the_command(tmp_path: Path) -> None:
    class Interrupting(Reporter):
        def alive(self, text: str) -> None:
            if (tmp_path / "pid").exists():
                raise KeyboardInterrupt

    code = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'part')!r}).write_text(str(os.getpid()))"
    code += f"; os.replace({str(tmp_path / 'part')!r}, {str(tmp_path / 'pid')!r}); time.sleep(600)"
    reporter = Interrupting(io.StringIO(), interval_s=0.05)
    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", code], log=tmp_path / "x.log", reporter=reporter, label="X")
    if sys.platform != "win32":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


# The wheel


def test_no_file_of_a_wheel_lands_outside_of_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "evil-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as sink:
        sink.writestr("pkg/main.py", "x")
        sink.writestr("pkg/../../escaped.py", "x")
    managed.unpack(archive, "pkg", tmp_path / "below" / "target")
    assert (tmp_path / "below" / "target" / "main.py").is_file()
    assert not list(tmp_path.parent.glob("escaped.py")) and not list(tmp_path.glob("escaped.py"))
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["target"]


def test_unpack_keeps_an_old_tree_with_the_users_files(tmp_path: Path) -> None:
    archive = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as sink:
        sink.writestr("pkg/main.py", "new")
        sink.writestr("pkg/drop.yaml", "x")
    target = tmp_path / "tree"
    (target / "models").mkdir(parents=True)
    (target / "main.py").write_text("old")
    (target / "models" / "mine.safetensors").write_text("mine")
    kept = managed.unpack(archive, "pkg", target, ("drop.yaml",))
    assert [path.name for path in target.iterdir()] == ["main.py"] and (target / "main.py").read_text() == "new"
    assert kept is not None and (kept / "models" / "mine.safetensors").read_text() == "mine"
    assert managed.unpack(archive, "pkg", target, ("drop.yaml",)) is None
    assert len(list(tmp_path.glob("tree*"))) == 2


def test_a_wheel_without_that_folder_leaves_the_old_tree(tmp_path: Path) -> None:
    archive = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as sink:
        sink.writestr("other/main.py", "new")
    (tmp_path / "tree").mkdir()
    with pytest.raises(HostError, match="nothing under pkg"):
        managed.unpack(archive, "pkg", tmp_path / "tree")
    assert (tmp_path / "tree").is_dir()

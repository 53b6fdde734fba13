"""Which ComfyUI is chosen, and what is said where it cannot be used."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speedlab_tools.host import Host, HostError, cache_root, child_environment, from_environment, pack_root, resolve
from speedlab_tools.host.base import environment_python, is_comfyui
from speedlab_tools.host.progress import Reporter
from speedlab_tools.host.resolve import choose, lacking, own_interpreter


def tree(path: Path, requirements: str = "pytest\n") -> Path:
    """The two things by which a ComfyUI is known, and its requirements."""
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").write_text("")
    (path / "requirements.txt").write_text(requirements)
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack that needs only what runs these tests."""
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "requirements.txt").write_text("pytest>=1\n")
    (folder / "requirements-dev.txt").write_text("pytest-timeout\nsl-no-such-tool\n")
    monkeypatch.setattr(sys.modules[resolve.__module__], "pack_root", lambda: folder)
    return folder


def test_the_order(tmp_path: Path) -> None:
    asked, variable, around = (tree(tmp_path / name) for name in ("asked", "variable", "around"))
    pack = around / "custom_nodes" / "ComfyUI-SpeedLab"
    env = {"COMFYUI_PATH": str(variable)}
    assert choose(str(asked), env, [pack]) == (asked, "from --comfyui")
    assert choose(None, env, [pack]) == (variable, "from COMFYUI_PATH")
    assert choose(None, {}, [pack]) == (around, "the one whose custom_nodes holds this pack")
    assert choose(None, {"COMFYUI_PATH": " "}, [tmp_path / "elsewhere" / "pack"]) is None


def test_custom_nodes_of_something_else_is_no_comfyui(tmp_path: Path) -> None:
    assert choose(None, {}, [tmp_path / "custom_nodes" / "pack"]) is None


def test_wrong_paths(tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    inner = tree(tmp_path / "outer" / "ComfyUI")
    for given, words in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "no main.py"),
        (inner.parent, f"Did you mean {inner}"),
    ):
        with pytest.raises(HostError, match="--comfyui names") as caught:
            choose(str(given), {}, [])
        assert words in str(caught.value)
    with pytest.raises(HostError, match="COMFYUI_PATH names"):
        choose(None, {"COMFYUI_PATH": str(tmp_path)}, [])
    with pytest.raises(HostError, match="empty"):
        choose("", {}, [])
    assert is_comfyui(inner) and not is_comfyui(tmp_path)


def test_missing_packages_are_named_and_nothing_is_installed(tmp_path: Path, own: Path) -> None:
    path = tree(tmp_path / "ComfyUI", "pytest\nsl-no-such-package>=2\nsl-other; sys_platform == 'none'\n")
    stream = io.StringIO()
    with pytest.raises(HostError) as caught:
        resolve(str(path), reporter=Reporter(stream), env={})
    text = str(caught.value)
    assert "lacks sl-no-such-package>=2 (missing)" in text
    assert f"{sys.executable} -m pip install" in text and "--install" in text and "--managed" in text
    assert stream.getvalue() == ""


def test_the_interpreter_of_that_comfyui_is_named(tmp_path: Path) -> None:
    path = tree(tmp_path / "ComfyUI", "sl-no-such-package\n")
    other = environment_python(path / "venv")
    other.parent.mkdir(parents=True)
    other.write_text("")
    assert own_interpreter(path) == other
    with pytest.raises(HostError, match="interpreter of its own") as caught:
        resolve(str(path), env={})
    assert str(other) in str(caught.value)


def test_versions_count_for_ours_and_not_for_theirs() -> None:
    python = Path(sys.executable)
    assert lacking(python, ["pytest<1", "PyTest"], strict=False) == {}
    assert lacking(python, ["pytest<1", "PyTest>=1"], strict=True) == {"pytest<1": f"has {pytest.__version__}"}
    with pytest.raises(HostError, match="does not run"):
        lacking(Path("/no/such/python"), ["pytest"], strict=True)


def test_a_usable_comfyui_is_taken_as_it_is(tmp_path: Path, own: Path) -> None:
    path = tree(tmp_path / "ComfyUI")
    host = resolve(str(path), env={})
    assert host == Host(path, Path(sys.executable), False, "from --comfyui")
    with pytest.raises(HostError, match="lacks sl-no-such-tool"):
        resolve(str(path), True, env={})


def test_paths_of_an_environment_on_both_systems() -> None:
    assert environment_python(Path("venv"), windows=True) == Path("venv/Scripts/python.exe")
    assert environment_python(Path("venv"), windows=False) == Path("venv/bin/python")


def test_the_cache_folder(tmp_path: Path) -> None:
    assert cache_root({"SPEEDLAB_CACHE": str(tmp_path)}) == tmp_path
    assert cache_root({"SPEEDLAB_CACHE": "relative"}).is_absolute()
    assert cache_root({}) == Path.home() / ".cache" / "speedlab"


def test_children_find_the_host_again_and_not_our_nodes_folder(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(pack_root()), str(tmp_path)])
    env = {"PYTHONPATH": paths, "PYTHONHOME": "/x", "SPEEDLAB_CACHE": str(tmp_path), "KEPT": "1"}
    own = child_environment(Host(tmp_path / "c", tmp_path / "p", True, ""), env)
    assert from_environment(own) == Host(tmp_path / "c", tmp_path / "p", True, "chosen by run.py")
    assert "PYTHONPATH" not in own and "PYTHONHOME" not in own and own["KEPT"] == "1"
    theirs = child_environment(Host(tmp_path / "c", tmp_path / "p", False, ""), env)
    assert theirs["PYTHONPATH"] == str(tmp_path) and theirs["SPEEDLAB_MANAGED"] == "0"
    with pytest.raises(HostError, match=r"run\.py"):
        from_environment({})


def test_a_python_without_pip_and_packaging_is_told_what_it_needs(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    with pytest.raises(HostError, match="neither pip nor packaging"):
        lacking(environment_python(bare), ["torch"], strict=False)

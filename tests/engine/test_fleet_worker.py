"""What a worker looks for on its own machine: a ComfyUI, a Python, the model files."""

from __future__ import annotations

import asyncio
import platform
import sys
from pathlib import Path

import pytest

from speedlab_tools.fleet.worker import ModelFile, Worker, WorkerSpec, find_host, show_models
from speedlab_tools.host import Host, HostError


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A machine with an empty cache and no ComfyUI named."""
    monkeypatch.setenv("SPEEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path


def comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def drivers(path: Path) -> Host:
    return Host(path, Path(sys.executable), True, "")


def test_the_drivers_comfyui_is_taken_where_it_exists(elsewhere):
    host = find_host(drivers(comfyui(elsewhere / "driver")))
    assert (host.comfyui, host.python, host.managed) == (elsewhere / "driver", Path(sys.executable), True)


def test_the_machines_own_comfyui_is_next(elsewhere, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui(elsewhere / "own")))
    host = find_host(drivers(elsewhere / "driver"))
    assert (host.comfyui, host.managed) == (elsewhere / "own", False)
    monkeypatch.setenv("COMFYUI_PATH", str(elsewhere / "none"))
    with pytest.raises(HostError, match="COMFYUI_PATH names"):
        find_host(drivers(elsewhere / "driver"))


def test_a_machine_without_one_says_what_to_do(elsewhere):
    with pytest.raises(HostError, match=r"run\.py setup") as caught:
        find_host(drivers(elsewhere / "driver"))
    assert "COMFYUI_PATH" in str(caught.value) and str(elsewhere / "driver") in str(caught.value)
    assert not (elsewhere / "cache").exists(), "nothing is installed"


def test_a_model_is_the_drivers_or_one_of_that_size_here(elsewhere):
    host = Host(comfyui(elsewhere / "own"), Path(sys.executable), False, "")
    own = elsewhere / "own" / "models" / "checkpoints" / "a.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"12345")
    there = elsewhere / "shared" / "a.safetensors"
    file = ModelFile("checkpoints", str(there), 5)
    show_models([file], host, elsewhere / "base")
    shown = elsewhere / "base" / "models" / "checkpoints" / "a.safetensors"
    assert shown.resolve() == own
    there.parent.mkdir()
    there.write_bytes(b"54321")
    show_models([file], host, elsewhere / "base")
    assert shown.read_bytes() == b"54321", "the driver's own path comes first"


def test_a_model_of_another_size_is_not_taken(elsewhere):
    host = Host(comfyui(elsewhere / "own"), Path(sys.executable), True, "")
    there = elsewhere / "a.safetensors"
    there.write_bytes(b"1")
    with pytest.raises(HostError, match=r"a\.safetensors of 5 bytes is not on this machine") as caught:
        show_models([ModelFile("checkpoints", str(there), 5)], host, elsewhere / "base")
    assert f"{there} (1 bytes)" in str(caught.value) and "not there" in str(caught.value)


def test_a_start_that_fails_says_on_which_machine_and_why_in_plain_text(elsewhere):
    """Plain text, because the driver need not be able to read an exception of this pack's."""
    worker = Worker(WorkerSpec("w1", "f", drivers(elsewhere / "driver"), folder=str(elsewhere)))
    with pytest.raises(RuntimeError, match=r"run\.py setup") as caught:
        asyncio.run(worker.start())
    assert type(caught.value) is RuntimeError and str(caught.value).startswith(f"{platform.node()}: ")
    with pytest.raises(RuntimeError, match="its process ended, and the new one has no ComfyUI yet"):
        asyncio.run(worker.run({}, {}, 1.0))


def test_a_worker_that_lacks_a_model_leaves_no_folder(elsewhere):
    file = ModelFile("checkpoints", str(elsewhere / "none.safetensors"), 5)
    spec = WorkerSpec("w1", "f", drivers(comfyui(elsewhere / "driver")), (file,), folder=str(elsewhere))
    (elsewhere / "speedlab-fleet-f-w1-killed").mkdir()
    with pytest.raises(RuntimeError, match=r"none\.safetensors of 5 bytes is not on this machine"):
        asyncio.run(Worker(spec).start())
    assert not list(elsewhere.glob("speedlab-fleet-*")), "neither its own nor that of a killed one before it"


def test_a_worker_that_was_stopped_does_not_start_again(elsewhere):
    """Ray tries a start again that failed because the worker was stopped meanwhile."""
    worker = Worker(WorkerSpec("w1", "f", drivers(comfyui(elsewhere / "driver")), folder=str(elsewhere)))
    asyncio.run(worker.stop())
    with pytest.raises(RuntimeError, match="this worker was stopped"):
        asyncio.run(worker.start())
    assert not list(elsewhere.glob("speedlab-fleet-*"))

"""A GPU that PyTorch does not use is named, and no CPU is measured in its place."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from speedlab_tools.host import ComfyServer, Host, HostError, ServerError, gpu, server
from speedlab_tools.host.managed import ManagedHost

WORDS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", gpu.CPU_VARIABLE)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU; a folder on its PATH."""
    for name in WORDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "_DRM", tmp_path / "drm")
    return tmp_path


def put_nvidia_in(folder: Path, says: str, code: int = 0) -> None:
    """A driver's `nvidia-smi -L`."""
    if sys.platform == "win32":
        (folder / "nvidia-smi.bat").write_text(f"@echo {says}\n@exit /b {code}\n")
        return
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    tool.chmod(0o755)


def put_amd_in(folder: Path, vendor: str = "0x1002", gb: int = 16) -> None:
    """What the kernel tells of AMD's cards."""
    device = folder / "drm" / "card0" / "device"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "mem_info_vram_total").write_text(f"{gb << 30}\n")


def test_cards_are_known_by_their_drivers(machine: Path) -> None:
    assert gpu.maker_of_gpu() == ""
    put_amd_in(machine)
    assert gpu.maker_of_gpu() == "AMD"
    put_nvidia_in(machine, "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)")
    assert gpu.maker_of_gpu() == "NVIDIA"


def test_what_is_no_card_is_none(machine: Path) -> None:
    put_nvidia_in(machine, "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9)
    put_amd_in(machine, gb=1)  # the graphics of a processor
    assert gpu.maker_of_gpu() == ""


@pytest.mark.parametrize("system, nvidia, fits", [
    ("Windows", True, False), ("Linux", True, True), ("Linux", False, False), ("Windows", False, False),
])  # fmt: skip
def test_a_managed_host_is_not_set_up_beside_a_card_that_it_would_not_use(
    machine: Path, monkeypatch: pytest.MonkeyPatch, system: str, nvidia: bool, fits: bool
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    put_nvidia_in(machine, "GPU 0: NVIDIA L4 (UUID: GPU-1)") if nvidia else put_amd_in(machine)
    monkeypatch.setattr(ManagedHost, "prepare", lambda _self: None)
    host = ManagedHost(machine / "cache")
    if not fits:
        name = "NVIDIA" if nvidia else "AMD"
        with pytest.raises(HostError, match=rf"an {name} GPU.*--index-url https.*--comfyui PATH.*SPEEDLAB_CPU=1"):
            host.ensure()
        monkeypatch.setenv("SPEEDLAB_CPU", "1")
    assert host.ensure() == host.host()


def test_no_server_computes_on_the_cpu_unasked_where_there_is_a_gpu(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_has_device", lambda _host, _env: False)
    put_nvidia_in(machine, "GPU 0: NVIDIA L4 (UUID: GPU-1)")

    def wants_cpu(cpu: bool | None = None, **env: str) -> bool:
        host = Host(machine, Path(sys.executable), True, "test")
        return ComfyServer(host, pack=machine, base=machine / "base", cpu=cpu, env=env)._wants_cpu()

    with pytest.raises(ServerError, match=r"an NVIDIA GPU, and the PyTorch of .* sees none.*SPEEDLAB_CPU=1"):
        wants_cpu()
    assert wants_cpu(cpu=True) and wants_cpu(SPEEDLAB_CPU="1") and wants_cpu(CUDA_VISIBLE_DEVICES="")
    (machine / ("nvidia-smi.bat" if sys.platform == "win32" else "nvidia-smi")).unlink()
    assert wants_cpu()

"""A real ComfyUI process: it starts with the pack, answers, and never outlives its owner."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from speedlab_tools.host import ComfyServer, Host, HostError, ServerError, from_environment, pack_root

pytestmark = pytest.mark.server
QUICK = ("--disable-api-nodes",)


@pytest.fixture(scope="module")
def host() -> Host:
    """The host of this test run."""
    try:
        return from_environment()
    except HostError:
        path = os.environ.get("COMFYUI_PATH")
        if not path:
            pytest.fail("No ComfyUI to test against: run the tests with `python run.py test`, or set COMFYUI_PATH.")
        return Host(Path(path), Path(sys.executable), True, "COMFYUI_PATH")


def gone(pid: int, within_s: float) -> bool:
    """Whether a process ends (one that nobody has waited for yet counts as ended)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.1)
    return False


def test_start_answer_stop(host: Host, tmp_path: Path) -> None:
    models = tmp_path / "more models"
    (models / "loras").mkdir(parents=True)
    (models / "loras" / "mine.safetensors").write_bytes(b"")
    output = tmp_path / "pictures"
    with ComfyServer(
        host, pack=pack_root(), base=tmp_path / "base", output=output, models=models, cpu=True, extra_args=QUICK
    ) as server:
        assert server.process is not None
        pid = server.process.pid
        arguments = server.system_stats()["system"]["argv"]
        assert arguments[arguments.index("--output-directory") + 1] == str(output)
        assert arguments[arguments.index("--listen") + 1] == "127.0.0.1"
        with urllib.request.urlopen(f"{server.url}/object_info/LoraLoader") as answer:
            loras = json.load(answer)["LoraLoader"]["input"]["required"]["lora_name"][0]
        assert loras == ["mine.safetensors"]
        assert any("ComfyUI-SpeedLab" in line for line in server.tail(60))
        with pytest.raises(ServerError, match=f"Port {server.port} is in use"):
            ComfyServer(host, pack=pack_root(), base=tmp_path / "b", port=server.port, cpu=True).start()
    assert server.process is None and gone(pid, 1)
    server.stop()


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal of POSIX")
def test_a_killed_owner_takes_its_server_along(host: Host, tmp_path: Path) -> None:
    owner = f"""
import sys, time
sys.path.insert(0, {str(pack_root())!r})
from pathlib import Path
from speedlab_tools.host import ComfyServer, Host, pack_root
host = Host(Path({str(host.comfyui)!r}), Path({str(host.python)!r}), {host.managed!r}, "test")
server = ComfyServer(host, pack=pack_root(), base=Path({str(tmp_path / "base")!r}), cpu=True, extra_args={QUICK!r})
print(server.start().process.pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert gone(pid, 60)

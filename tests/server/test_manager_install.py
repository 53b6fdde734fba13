"""The pack installed the way ComfyUI-Manager does it: clone into custom_nodes, pip install, start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from speedlab_tools.host import ComfyServer, from_environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.server


@pytest.mark.full
def test_clone_install_start(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the pack is no git clone")
    base = tmp_path / "base"
    target = base / "custom_nodes" / "ComfyUI-SpeedLab"
    target.parent.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(target)], check=True, timeout=120)
    before = _version("torch")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "-r", str(target / "requirements.txt")]
    subprocess.run(install, check=True, timeout=600)
    assert _version("torch") == before, "requirements.txt must leave PyTorch alone"
    with ComfyServer(from_environment(), pack=target, base=base) as server:
        import json
        import urllib.request

        with urllib.request.urlopen(f"{server.url}/object_info/SpeedLabProfileSampler", timeout=60) as answer:
            assert "SpeedLabProfileSampler" in json.load(answer)
        log = "\n".join(server.tail(500))
    assert "IMPORT FAILED" not in log
    assert str(target) in log


def _version(package: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pip", "show", package], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("Version:"))

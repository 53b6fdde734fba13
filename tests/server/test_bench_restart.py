"""A server that is killed and started again under a running bench: the series goes on, and each row is there once."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedlab_tools.bench.runner import parts_of
from speedlab_tools.host import ComfyServer, from_environment, pack_root
from speedlab_tools.host.server import free_port
from speedlab_tools.scenarios.catalog import find

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform == "win32", reason="a port is not free at once there"),
]
CHECKPOINT = "speedlab_demo_sd15.safetensors"
SCENARIO = "sd15-samplers"
KILLED_AFTER = 2


@pytest.fixture
def restarted(demo_checkpoint, tmp_path):
    """Starts a server, again and again at one address."""
    base, port = tmp_path / "base", free_port()
    (base / "models" / "checkpoints").mkdir(parents=True)
    (base / "models" / "checkpoints" / CHECKPOINT).symlink_to(demo_checkpoint)
    running = []

    def start():
        running.append(ComfyServer(from_environment(), pack=pack_root(), base=base, port=port, cpu=True))
        return running[-1].start()

    yield start
    for server in running:
        server.stop()


def bench(out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(pack_root()), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-u", "-m", "speedlab_tools", "bench", SCENARIO, *arguments, "--out", str(out)]
    return subprocess.Popen(line, env=environment, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def parts_done(out: Path) -> int:
    """Parts that the series has finished, as its journal tells."""
    return max((len(json.loads(p.read_text())) for p in (out / "speedlab" / "series").glob("*.json")), default=0)


@pytest.mark.full
def test_a_series_goes_on_where_its_server_was_killed_and_came_back(restarted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    server = restarted()
    running = bench(out, "--server", server.url, "--checkpoint", CHECKPOINT, "--small")
    try:
        deadline = time.monotonic() + 180
        while parts_done(out) < KILLED_AFTER and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.02)
        server.process.kill()
        server.process.wait()
        server.stop()
        killed_at = parts_done(out)
        restarted()
        text = running.communicate(timeout=300)[0]
    finally:
        running.kill()
        running.wait()
    wanted = len(parts_of(find(SCENARIO), small=True))
    assert KILLED_AFTER <= killed_at < wanted, text
    assert running.returncode == 0, text
    assert f"going on with {SCENARIO}" in text
    assert "of its parts were done by an earlier call" in text
    assert not parts_done(out), "a whole series leaves no journal"
    with (out / "speedlab" / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["run_id"] for row in rows}) == len(rows) >= wanted
    assert {row["status"] for row in rows} == {"ok"}
    settings = {(row["plan"], row["sampler"], row["scheduler"], row["steps"]) for row in rows}
    assert len(settings) == wanted, "every part has its row"
    assert len(rows) <= wanted + 1, "only what the kill cut off was run again"


def test_an_address_where_nothing_ever_answered_is_not_waited_for(tmp_path):
    started, port = time.monotonic(), free_port()
    running = bench(tmp_path, "--server", f"http://127.0.0.1:{port}", "--checkpoint", CHECKPOINT, "--small")
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 1 and "no answer from ComfyUI" in text.replace(
        "no ComfyUI answers", "no answer from ComfyUI"
    )
    assert "Waiting" not in text and time.monotonic() - started < 60

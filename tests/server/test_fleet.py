"""A fleet on Ray with real ComfyUI workers: interrupted, its workers killed, gone on with; and on another's cluster."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from speedlab_tools.bench.results import shown_images
from speedlab_tools.client.client import ComfyClient
from speedlab_tools.fleet.tasks import prompt_work, read_prompts
from speedlab_tools.host import pack_root
from speedlab_tools.host.server import free_port
from speedlab_tools.scenarios.catalog import find
from speedlab_tools.scenarios.overrides import Overrides, adapt

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="the test packages have Ray on Linux alone"),
]
SCENARIO, SEED = "txt2img-default", 77
SIZES = ("--width", "64", "--height", "64", "--steps", "2")
PROMPTS = (
    "a tree",
    "a house by the sea",
    "a cat",
    "a dog",
    "a mountain",
    "a lamp",
    "a boat",
    "a bridge",
    "a cup",
    "snow",
)
READY = re.compile(r"(w\d+) is ready on \S+: process (\d+), ComfyUI (\d+) at http://127\.0\.0\.1:")
PATIENCE_S = 150.0


@dataclass
class Call:
    """A running `fleet` command, as `run.py` starts it. `ready` are worker, actor and server processes."""

    process: subprocess.Popen[str]
    log: Path
    out: Path
    seen: set[int] = field(default_factory=set)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def ready(self) -> list[tuple[str, int, int]]:
        return [(name, int(actor), int(server)) for name, actor, server in READY.findall(self.text)]

    def rows(self) -> list[dict]:
        """The rows that are whole so far."""
        path = self.out / "fleet.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []

    def wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.text}"
            time.sleep(0.02)
        self.note()

    def note(self) -> None:
        """Remember every process of this call that there is now."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.seen |= {child.pid for child in children}

    def addresses(self) -> set[str]:
        """Where the processes of this call listen."""
        connections = [entry for pid in self.seen for entry in psutil.Process(pid).net_connections("tcp")]
        return {entry.laddr.ip for entry in connections if entry.status == psutil.CONN_LISTEN}

    def end(self) -> int:
        code = self.process.wait(PATIENCE_S)
        require_gone(self.seen | {pid for _, actor, server in self.ready for pid in (actor, server)})
        return code


def require_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 15.0
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.1)


def wait_until_it_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60.0
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        assert process.poll() is None and time.monotonic() < deadline, "the cluster does not start"
        time.sleep(0.1)


def threads() -> str:
    """As many as the session's server uses."""
    return os.environ.get("OMP_NUM_THREADS") or str(torch.get_num_threads())


def hear_ctrl_c() -> None:
    """A shell that runs the tests in the background has children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def fleet(tmp_path, demo_checkpoint):
    """Start `fleet` commands that stand in `tmp_path`; one that is left is killed in the end."""
    calls: list[Call] = []

    def start(*arguments: str, out: Path, environment: dict[str, str] | None = None) -> Call:
        log = tmp_path / f"call-{len(calls)}.log"
        line = [
            sys.executable, "-m", "speedlab_tools", "fleet", *arguments, "--out", str(out), "--workers", "2", "--cpu",
            "--threads", threads(), "--checkpoint", str(demo_checkpoint),
        ]  # fmt: skip
        env = {**os.environ, "SPEEDLAB_CALLED_FROM": str(tmp_path), **(environment or {})}
        with log.open("w") as output:
            process = subprocess.Popen(
                line, cwd=pack_root(), env=env, stdout=output, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, preexec_fn=hear_ctrl_c,
            )  # fmt: skip
        calls.append(Call(process, log, out))
        return calls[-1]

    yield start
    for call in calls:
        if call.process.poll() is None:
            call.process.kill()
            call.process.wait()


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def pixels(picture: bytes) -> tuple[tuple[int, int], bytes]:
    with Image.open(io.BytesIO(picture)) as image:
        return image.size, image.convert("RGB").tobytes()


def one_machine(url: str, prompts: Path, checkpoint: str) -> list[bytes]:
    """The same prompts on one server, one after another."""
    scenario = adapt(find(SCENARIO), Overrides(width=64, height=64, steps=2), checkpoint)
    negative = scenario.settings.prompts[0].negative
    work = prompt_work(scenario, read_prompts(prompts, seed=SEED, negative=negative), models={})

    async def run() -> list[bytes]:
        made = []
        async with ComfyClient(url) as client:
            for task in work.tasks:
                payload = work.build(task)
                result = await client.run(payload.graph, extra_data=payload.extra, timeout_s=300)
                made += [await client.view(image) for image in shown_images(result)]
        return made

    return asyncio.run(run())


@pytest.mark.full
def test_a_fleet_that_is_interrupted_and_whose_workers_are_killed_loses_nothing(
    server, fleet, prompts, tmp_path, demo_checkpoint
):
    out = tmp_path / "out"
    order = (SCENARIO, "--prompts", "prompts.txt", "--seed", str(SEED), *SIZES)
    folders = set(Path(tempfile.gettempdir()).glob("slray*"))

    # A cluster of somebody else is not used unasked.
    first = fleet(*order, out=out, environment={"RAY_ADDRESS": "127.0.0.1:9"})
    first.wait_for(lambda: first.ready, "a first worker")
    listening = first.addresses()
    assert listening and all(address.removeprefix("::ffff:") in ("127.0.0.1", "::1") for address in listening)
    first.wait_for(lambda: first.rows(), "a first result")
    # As a terminal does it: Ctrl-C reaches Ray's processes too.
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.end() == 130
    assert "all workers have ended" in first.text
    done = first.rows()
    assert 1 <= len(done) < len(PROMPTS)
    assert len((out / "manifest.jsonl").read_text().splitlines()) == len(done)
    assert set(Path(tempfile.gettempdir()).glob("slray*")) <= folders

    second = fleet(*order, out=out)
    second.wait_for(lambda: second.ready, "a first worker")
    name, _, server_pid = second.ready[0]
    time.sleep(1.0)  # into its first prompt, which loads the models
    os.kill(server_pid, signal.SIGKILL)
    second.wait_for(lambda: len(second.rows()) > len(done), "a result of the other worker")
    other, actor_pid, _ = next(entry for entry in reversed(second.ready) if entry[0] != name)
    os.kill(actor_pid, signal.SIGKILL)
    assert second.end() == 0, second.text
    assert f"{name} is lost, starting it again: ComfyUI ended with exit code -9" in second.text
    assert f"{other} is lost, starting it again: its process ended" in second.text

    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert [row["seed"] for row in rows] == [SEED + place for place in range(len(PROMPTS))]
    assert {row["status"] for row in rows} == {"ok"}
    assert [row for row in rows if row["index"] in {entry["index"] for entry in done}] == sorted(
        done, key=lambda row: row["index"]
    )
    assert max(row["attempts"] for row in rows) >= 2
    pictures = [(out / row["pictures"][0]["file"]).read_bytes() for row in rows]
    assert len(list((out / "pictures").iterdir())) == len(PROMPTS)
    expected = one_machine(server.url, prompts, demo_checkpoint.name)
    assert [pixels(picture) for picture in pictures] == [pixels(picture) for picture in expected]
    assert len({pixels(picture) for picture in pictures}) == len(PROMPTS)

    with (out / "speedlab" / "results.csv").open(newline="") as file:
        written = [row["run_id"] for row in csv.DictReader(file)]
    assert sorted(written) == sorted(run_id for row in rows for run_id in row["run_ids"])
    phases = [json.loads(path.read_text())["phases_ms"] for path in (out / "speedlab" / "runs").glob("*.json")]
    loads = [entry["load"] for entry in phases]
    assert all(entry["total"] is None for entry in phases), "the first prompts are cold, and the others' texts cached"
    assert len(loads) == len(PROMPTS)
    assert sum(load != "cached" for load in loads) <= len(first.ready) + len(second.ready)
    assert "cached" in loads, "a worker loads its models once"

    again = fleet(*order, out=out)
    assert again.end() == 0
    assert f"{len(PROMPTS)} of {len(PROMPTS)} results are there already" in again.text and "Starting" not in again.text
    prompts.write_text("\n".join([*PROMPTS[:3], "a fish", *PROMPTS[4:]]))
    changed = fleet(*order, out=out)
    assert changed.end() == 1
    assert f"{len(PROMPTS) - 1} are the same, the first that differs is number 4" in changed.text


@pytest.mark.full
def test_cells_are_spread_over_a_cluster_that_runs(fleet, tmp_path):
    """The pack travels to the workers, whose cluster this call neither starts nor ends."""
    out, port = tmp_path / "out", free_port()
    environment = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="slray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        line = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port),
            "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder,
            "--node-ip-address", "127.0.0.1", "--object-store-memory", str(128 * 2**20),
        ]  # fmt: skip
        log = (tmp_path / "head.log").open("w")
        head = subprocess.Popen(line, env={**os.environ, **environment}, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_until_it_listens(port, head)
            call = fleet("xy-grid", "--cells", "--small", "--address", f"127.0.0.1:{port}", out=out,
                         environment=environment)  # fmt: skip
            call.wait_for(lambda: call.ready, "a worker")
            assert call.end() == 0, call.text
            assert head.poll() is None, "the cluster is somebody else's"
        finally:
            head.terminate()
            head.wait(60)
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [f"xy-grid, steps {x}, cfg {y}" for y in ("8", "5") for x in ("1", "2")]
    assert {row["status"] for row in rows} == {"ok"}
    assert all((out / row["pictures"][0]["file"]).is_file() for row in rows)
    with (out / "speedlab" / "results.csv").open(newline="") as file:
        cells = {(row["steps"], row["cfg"]) for row in csv.DictReader(file)}
    assert cells == {(steps, cfg) for steps in ("1", "2") for cfg in ("8", "5")}

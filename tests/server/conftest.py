"""Fixtures of the server tier: a real ComfyUI process with the pack, spoken to over HTTP as any client does."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from speedlab_tools.host import ComfyServer, from_environment, pack_root

from ..conftest import DEMO_CHECKPOINT, link

__all__ = ["DEMO_CHECKPOINT"]


@dataclass(frozen=True)
class Api:
    """A running server: `url`, its output folder, and the few calls that tests need."""

    url: str
    output: Path
    models: Path
    server: ComfyServer

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def queue(self, prompt: dict[str, Any]) -> str:
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        assert status == 200, answer
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = 300.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise AssertionError("the prompt did not end:\n" + "\n".join(self.server.tail(30)))

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue and wait; the history entry."""
        return self.wait(self.queue(prompt))

    def texts(self, entry: dict[str, Any], node_id: str) -> str:
        return "\n".join(entry["outputs"][node_id]["text"])

    def error(self, entry: dict[str, Any]) -> str:
        """The message of the node that failed."""
        assert entry["status"]["status_str"] == "error", entry["status"]
        return next(
            data["exception_message"] for kind, data in entry["status"]["messages"] if kind == "execution_error"
        )

    def record(self, run_id: str) -> dict[str, Any]:
        return json.loads((self.output / "speedlab" / "runs" / f"{run_id}.json").read_text())


@dataclass
class Shared:
    """The one server that modules share: started when the first of them asks, and again after `stop`."""

    launch: Callable[..., Api]
    api: Api | None = None

    def running(self) -> Api:
        self.api = self.api or self.launch()
        return self.api

    def stop(self) -> None:
        if self.api is not None:
            self.api.server.stop()
        self.api = None


SHARED = pytest.StashKey[Shared]()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path, taesd_files: Path) -> Callable[..., Api]:
    """Start a server with the demo checkpoint and TAESD in its folders. Whoever calls it stops it."""

    def start(base: Path | None = None, output: Path | None = None, **options: Any) -> Api:
        base = base or tmp_path_factory.mktemp("server")
        models = base / "models"
        for kind in ("checkpoints", "loras", "vae", "vae_approx"):
            (models / kind).mkdir(parents=True, exist_ok=True)
        link(demo_checkpoint, models / "checkpoints", DEMO_CHECKPOINT)
        for file in taesd_files.glob("*.safetensors"):
            link(file, models / "vae_approx")
        server = ComfyServer(from_environment(), pack=pack_root(), base=base, output=output, **options)
        server.start()
        return Api(server.url, output or base / "output", models, server)

    return start


@pytest.fixture(scope="module")
def start_server(launch: Callable[..., Api]) -> Iterator[Callable[..., Api]]:
    """Start servers of a module's own; all are stopped at its end."""
    with ExitStack() as running:

        def start(**options: Any) -> Api:
            api = launch(**options)
            running.callback(api.server.stop)
            return api

        yield start


@pytest.fixture(scope="session")
def shared(launch: Callable[..., Api], request: pytest.FixtureRequest) -> Iterator[Shared]:
    request.config.stash[SHARED] = shared = Shared(launch)
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def server(shared: Shared) -> Api:
    """The server of all modules here: CPU, the small demo checkpoint, TAESD with random weights."""
    return shared.running()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the shared server with the last test of this folder: the tests that follow need its memory."""
    shared = item.config.stash.get(SHARED, None)
    if shared is not None and (nextitem is None or nextitem.path.parent != item.path.parent):
        shared.stop()


@pytest.fixture
def graph(graph_of: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The main job as an API prompt; keyword arguments override the sampler's inputs."""
    return graph_of


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., dict[str, Any]]:
    """What `graph` builds, for fixtures that last longer than a test."""

    def build(
        size: int = 64, text: str = "a tree", tiny: bool = True, batch: int = 1, **sampler: Any
    ) -> dict[str, Any]:
        decode = {
            "class_type": "SpeedLabVAEDecode",
            "inputs": {
                "samples": ["5", 0],
                "vae": ["1", 2],
                "slicing": False,
                "tile_size": 0,
                "overlap": 64,
                "precision": "auto",
            },
        }
        if tiny:
            decode = {
                "class_type": "SpeedLabTinyVAEDecode",
                "inputs": {"samples": ["5", 0], "decoder": "auto", "slice_size": 1, "tile_size": 0},
            }
        return {
            "1": {"class_type": "SpeedLabCheckpointLoader", "inputs": {
                "ckpt_name": DEMO_CHECKPOINT, "precision": "auto", "memory_format": "contiguous"}},
            "2": {"class_type": "SpeedLabTextEncode", "inputs": {"clip": ["1", 1], "text": text}},
            "3": {"class_type": "SpeedLabTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
            "4": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": batch}},
            "5": {"class_type": "SpeedLabProfileSampler", "inputs": {
                "model": ["1", 0], "seed": 1, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
                "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "denoise": 1.0,
                "detail": "timing", "warmup": 0, "repeats": 1, "nvtx": True, **sampler}},
            "6": decode,
            "7": {"class_type": "SpeedLabProfileReport", "inputs": {"profile": ["5", 1], "images": ["6", 0]}},
            "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "test"}},
        }  # fmt: skip

    return build

"""OneDiff with nexfort, in a Python of its own: what Compile Model does with it on ComfyUI's real UNet, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from speedlab_tools.host import HostError, cache_root, from_environment, pack_root
from speedlab_tools.host.base import clean_python_environment
from speedlab_tools.host.managed import NexfortEnvironment, nexfort_not_built_for

CHILD = Path(__file__).with_name("nexfort_child.py")
# The first run installs PyTorch 2.4.0 with CUDA's libraries: 3 GB to fetch.
pytestmark = pytest.mark.timeout(3600)


def unmet(reason: str) -> None:
    """A test that cannot run here: a failure in CI, else a skip, with the reason."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    """The interpreter that has OneDiff and nexfort, set up once and kept."""
    reason = nexfort_not_built_for()
    if reason:
        pytest.skip(reason)
    if not from_environment().managed:
        pytest.skip("runs against the managed ComfyUI, whose packages are known: call run.py with --managed")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        environment = NexfortEnvironment(cache_root() / "onediff")
        try:
            environment.prepare()  # says what it fetches, for minutes
        except HostError as error:
            unmet(str(error))
    return environment.python


@pytest.fixture(scope="module")
def seen(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process saw."""
    folder = tmp_path_factory.mktemp("nexfort")
    answer = folder / "answer.json"
    arguments = [pack_root(), from_environment().comfyui, folder, answer]
    ended = subprocess.run(
        [str(python), str(CHILD), *map(str, arguments)],
        env=clean_python_environment(os.environ), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(answer.read_text(encoding="utf-8"))


def test_the_versions_and_the_network_are_the_real_ones(seen: dict[str, Any]) -> None:
    assert seen["versions"] == {"torch": "2.4.0+cu121", "onediff": "1.2.0", "nexfort": "0.1.dev330"}
    assert seen["network"] == "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel"


def test_nothing_is_imported_before_a_network_is_compiled(seen: dict[str, Any]) -> None:
    assert seen["imported"] == [[], []]


def test_it_equals_eager_at_each_size_and_python_no_longer_runs_the_network(seen: dict[str, Any]) -> None:
    assert len({tuple(run["size"]) for run in seen["sizes"]}) == 2
    for run in seen["sizes"]:
        assert run["error"] < 1e-4, run
        assert (run["compiled"], run["compiled_again"]) == (1, 0), run
        assert run["python_forwards"] == 0 and run["python_forwards_eager"] == 2, run
        assert run["left"] == [], run


def test_a_lora_acts_and_is_gone_again(seen: dict[str, Any]) -> None:
    run = seen["lora"]
    assert run["effect"] > 0.01, "this LoRA changes nothing"
    assert run["error"] < 1e-4 and run["python_forwards"] == 0 and run["compiled"] == 1, run
    assert run["after"] < 1e-4, "it still acts on the model without it"


def test_programs_that_nothing_needs_are_let_go(seen: dict[str, Any]) -> None:
    assert seen["kept"] <= 2, "four were compiled: more than the last two live on"


def test_a_cancel_leaves_the_network_as_it_was(seen: dict[str, Any]) -> None:
    assert seen["cancelled"] == {"raised": True, "left": [], "same_weights": True}


def test_what_folds_weights_is_refused(seen: dict[str, Any]) -> None:
    refused = seen["refused"]
    assert "has no freeze_weights" in refused["freeze_weights"]
    for mode in ("freezing", "inductor_freezing"):
        assert "a later LoRA would have no effect" in refused[mode]
    assert seen["modes"]["jit_follows_weights"] and not seen["modes"]["freezing_follows_weights"]


def test_modes_are_those_that_nexfort_knows(seen: dict[str, Any]) -> None:
    assert seen["modes"]["rejected"] == [] and seen["modes"]["not_known_here"] == []
    assert "no mode 'faster'" in seen["refused"]["unknown"]


def test_what_cannot_be_compiled_fails_while_it_is_compiled(seen: dict[str, Any]) -> None:
    assert seen["refused"]["broken"] == "this layer is broken"

"""Every graph of every scenario passes ComfyUI's own validation; a server is only needed to run it."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from speedlab_tools.bench.runner import parts_of
from speedlab_tools.scenarios.catalog import SCENARIOS

# Nodes of ComfyUI beside those of `nodes.py`.
EXTRA = ("nodes_canny.py", "nodes_freelunch.py", "nodes_images.py", "nodes_model_advanced.py")


@pytest.fixture(scope="module")
def execution(pack: ModuleType, core: ModuleType, model_files: Path) -> Iterator[ModuleType]:
    """ComfyUI's executor with the nodes that scenarios use, and every file that one names, empty."""
    root = Path(core.__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        # As ComfyUI's main does: its package `utils`, before `comfy/utils.py` is in sight.
        patch.syspath_prepend(str(root))
        importlib.import_module("utils.install_util")
    for name in EXTRA:
        assert asyncio.run(core.load_custom_node(str(root / "comfy_extras" / name), module_parent="comfy_extras"))
    core.NODE_CLASS_MAPPINGS.update(pack.NODE_CLASS_MAPPINGS)
    needed = {model_files.parent / file.folder / file.default for one in SCENARIOS.values() for file in one.files}
    lacking = [path for path in needed if not path.exists()]
    for path in lacking:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    yield importlib.import_module("execution")
    for path in lacking:
        path.unlink()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_comfyui_takes_each_graph(execution, scenario, small):
    for name, graph in parts_of(scenario, small):
        valid, error, _outputs, node_errors = asyncio.run(execution.validate_prompt(name, graph, None))
        assert valid, (name, error, node_errors)


def test_a_wrong_graph_would_be_seen(execution):
    ((_, graph),) = parts_of(SCENARIOS["txt2img-default"])
    (sampler,) = (node for node in graph.values() if node["class_type"] == "SpeedLabProfileSampler")
    sampler["inputs"]["sampler_name"] = "no such sampler"
    valid, _error, _outputs, node_errors = asyncio.run(execution.validate_prompt("wrong", graph, None))
    assert not valid and node_errors

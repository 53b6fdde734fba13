"""What a first prompt compiles or times stands apart: its steps and its sampling are those of a repeat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import tiny_unet


@pytest.fixture(scope="module")
def unet(comfy: Any) -> Any:
    with torch.inference_mode():
        return tiny_unet.build("mini")


@pytest.fixture
def fresh(engine: Any, unmeasured: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled or chosen yet. Graphs of inductor run as dynamo captured them."""
    dynamo, inductor = engine("techniques.compile.backends.dynamo"), engine("techniques.compile.backends.inductor")
    monkeypatch.setattr(inductor, "_compile_graph", lambda _options, graph, _inputs: graph.forward)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    monkeypatch.setattr(engine("techniques.attention.attach").TABLE, "_choices", {})

    def clear() -> None:
        engine("techniques.compile.program")._programs.clear()
        dynamo._functions.clear()
        torch._dynamo.reset()

    clear()
    yield
    clear()


def compiled(backend: str) -> Callable[..., Any]:
    def attach(node: Any, model: Any) -> Any:
        return node("SpeedLabCompileModel").apply(model, backend, "auto", "default", "auto", "error")[0]

    return attach


def core_compile(node: Any, model: Any) -> Any:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend="eager")
    return clone


def chosen_attention(node: Any, model: Any) -> Any:
    return node("SpeedLabAttention").apply(model, "auto")[0]


FIRST = {
    "jit_trace": compiled("jit_trace"),
    "openvino": compiled("openvino"),
    "inductor": compiled("inductor"),
    "TorchCompileModel": core_compile,
    "attention": chosen_attention,
}
SLOW = ("openvino", "TorchCompileModel")


@pytest.mark.parametrize(
    "technique", [pytest.param(name, marks=pytest.mark.full if name in SLOW else ()) for name in FIRST]
)
def test_only_the_first_prompt_has_it(node: Any, unet: Any, fresh: None, technique: str) -> None:
    model = FIRST[technique](node, unet.model)

    def record() -> Any:
        latent = {"samples": torch.zeros(1, 4, 32, 32)}
        return node("SpeedLabProfileSampler").sample(
            model, 1, 3, 5.0, "euler", "normal", unet.cond(1), unet.cond(2), latent
        )["result"][1]

    first, again = record(), record()
    phases, steps = first.phases_ms, first.steps
    assert phases["compile"] > 0.0
    assert again.phases_ms["compile"] is None
    assert first.summary["it_per_s"] == pytest.approx(3000.0 / phases["sample"], rel=1e-4)
    assert sum(step["cpu_ms"] for step in steps) == pytest.approx(phases["sample"], rel=0.001)
    # The first evaluation stays whole: what it compiled, and what is in the first step.
    assert phases["first_eval"] <= phases["compile"] + steps[0]["cpu_ms"]
    assert phases["first_eval"] > steps[0]["cpu_ms"]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("module", "name"),
    [("cpu.onednn", "is_faster_here"), ("cpu.conv_as_matmul", "most_pixels_here"), ("cpu.vectors", "known_to_work")],
)
def test_what_is_timed_once_a_process_stands_apart(engine: Any, module: str, name: str) -> None:
    measured = getattr(engine(f"techniques.{module}"), name)
    spans: list[tuple[int, int]] = []
    measured.cache_clear()
    with engine("common.timing").watching(lambda: 0, spans):
        known = measured()
        assert measured() == known
    assert spans == [(0, 0)]


def test_a_compiled_decoder(node: Any, engine: Any, model_files: Any) -> None:
    _, _, vae, _ = node("SpeedLabCheckpointLoader").load("speedlab_demo_sd15.safetensors", "auto", "contiguous")
    (decoder,) = node("SpeedLabCompileVAE").apply(vae, "jit_trace", "default")
    timeline, apart = engine("measure.timeline"), []
    for _ in range(2):
        with timeline.measured("decode") as block:
            node("SpeedLabVAEDecode").decode({"samples": torch.zeros(1, 4, 8, 8)}, decoder, False, 0, 64, "auto")
        apart.append(block.apart_ms)
    assert apart[0] > 0.0 and apart[1] == 0.0

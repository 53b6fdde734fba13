"""Compiled programs that hold weights go when ComfyUI unloads their model, and Memory Plan counts them."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import tiny_unet
from .test_memory_plan import plan
from .tiny_unet import relative

SIZE = (16, 16)
DEMO = "speedlab_demo_sd15.safetensors"


@pytest.fixture
def tiny(comfy: Any) -> Any:
    return tiny_unet.build("slim")


@pytest.fixture(scope="module")
def compiled(engine: Any) -> Any:
    return engine("techniques.compile.attach")


@pytest.fixture(scope="module")
def mm(comfy: Any) -> Any:
    return importlib.import_module("comfy.model_management")


class Program:
    """What a backend makes; it can be waited for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.target(*inputs)


@pytest.fixture
def made(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Programs of openvino and jit_trace as weak references: they keep the network alive, as some backends' do."""
    found: list[Any] = []
    for name in ("openvino", "jit_trace"):
        backend = importlib.import_module(f"speedlab.techniques.compile.backends.{name}")

        def compile_it(target: Any, _options: Any) -> Program:
            program = Program(target)
            found.append(weakref.ref(program))
            return program

        monkeypatch.setattr(backend, "compile", compile_it)
    return found


def alive(programs: list[Any]) -> int:
    gc.collect()
    return sum(one() is not None for one in programs)


WAYS = ("Free Memory all", "Free Memory diffusion", "ComfyUI makes room", "ComfyUI unloads everything")


def unload(way: str, engine: Any, mm: Any) -> None:
    if way.startswith("Free Memory"):
        engine("memory.free").free_models(way.rsplit(" ", 1)[1])
    elif way == "ComfyUI makes room":
        for device in {one.device for one in mm.current_loaded_models}:
            mm.free_memory(1e30, device)
    else:
        mm.unload_all_models()


@pytest.mark.parametrize(
    ("way", "freeze"),
    [
        pytest.param(way, freeze, marks=() if number % 3 == 0 else pytest.mark.full)
        for number, (way, freeze) in enumerate(itertools.product(WAYS, (False, True)))
    ],
)
def test_programs_with_weights_go_when_the_model_is_unloaded(
    tiny: Any, compiled: Any, engine: Any, mm: Any, made: list[Any], way: str, freeze: bool
) -> None:
    mm.unload_all_models()
    config = compiled.CompileConfig("jit_trace" if freeze else "openvino", freeze_weights=freeze)
    model = compiled.attach_compile(tiny.model, config)
    expected = tiny.sample(steps=1, size=SIZE)
    first = tiny.sample(model.clone(), steps=1, size=SIZE)  # as a LoRA node behind it makes one
    assert relative(first, expected) < 1e-5
    assert alive(made) == 1
    tiny.sample(model, steps=1, size=SIZE)
    assert alive(made) == 1 == len(made), "another clone of the loaded model has the same program"
    unload(way, engine, mm)
    assert alive(made) == 0
    assert relative(tiny.sample(model, steps=1, size=SIZE), expected) < 1e-5
    assert alive(made) == 1 and len(made) == 2


def test_programs_of_live_weights_stay_while_the_model_is_there_and_go_with_it(
    compiled: Any, mm: Any, made: list[Any]
) -> None:
    tiny = tiny_unet.build("mini")
    model = compiled.attach_compile(tiny.model, compiled.CompileConfig("jit_trace"))
    tiny.sample(model, steps=1, size=SIZE)
    mm.unload_all_models()
    tiny.sample(model, steps=1, size=SIZE)
    assert alive(made) == 1 == len(made)
    mm.unload_all_models()
    network = weakref.ref(tiny.unet)
    del model, tiny
    mm.cleanup_models()
    assert alive(made) == 0, "though the program keeps its network alive"
    assert network() is None


def test_the_next_run_says_why_it_compiles(tiny: Any, compiled: Any, mm: Any, made: list[Any], node: Any) -> None:
    model = compiled.attach_compile(tiny.model, compiled.CompileConfig("openvino"))
    latent = {"samples": torch.zeros(1, 4, *SIZE)}

    def warnings() -> str:
        arguments = (1, 1, 2.0, "euler", "normal", tiny.cond(1), tiny.cond(2), latent)
        return " ".join(node("SpeedLabProfileSampler").sample(model, *arguments)["result"][1].warnings)

    assert "given back" not in warnings()
    mm.unload_all_models()
    assert "given back when ComfyUI unloaded the model" in warnings()
    assert "given back" not in warnings()


def test_frozen_code_goes_with_the_model(tiny: Any, compiled: Any, engine: Any, mm: Any, monkeypatch: Any) -> None:
    """Inductor's: by the word for its weights."""
    frozen, dynamo = engine("techniques.compile.engine"), engine("techniques.compile.backends.dynamo")
    word = (id(tiny.unet), "weights")
    frozen._frozen[id(tiny.unet)] = word
    dynamo._functions[("inductor", "_residual", ("kind", word))] = lambda: None
    model = compiled.attach_compile(tiny.model, compiled.CompileConfig("inductor", freeze_weights=True))
    mm.load_models_gpu([model])
    mm.unload_all_models()
    assert id(tiny.unet) not in frozen._frozen
    assert not any(word in key[-1] for key in dynamo._functions if isinstance(key[-1], tuple))


@pytest.fixture(scope="module")
def checkpoint(model_files: Any, core: Any) -> SimpleNamespace:
    model, clip, vae = core.CheckpointLoaderSimple().load_checkpoint(DEMO)
    return SimpleNamespace(model=model, clip=clip, vae=vae)


@pytest.mark.parametrize("what", ["vae", "all"])
def test_a_compiled_vaes_programs_go_with_the_vae(
    checkpoint: Any, engine: Any, mm: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    backend = importlib.import_module("speedlab.techniques.compile.backends.onnxruntime")
    made: list[Any] = []

    def compile_it(target: Any, _options: Any) -> Program:
        made.append(weakref.ref(program := Program(target)))
        return program

    monkeypatch.setattr(backend, "compile", compile_it)
    monkeypatch.setattr(backend, "available", lambda: (True, ""))
    vae = engine("vae.compile").compile_vae(checkpoint.vae, "onnxruntime", "default")
    latents = torch.zeros(1, 4, 8, 8)
    expected = checkpoint.vae.decode(latents)
    assert relative(vae.decode(latents), expected) < 1e-5
    assert alive(made) == 1
    engine("memory.free").free_models(what)
    assert alive(made) == 0
    assert relative(vae.decode(latents), expected) < 1e-5
    assert not checkpoint.vae.patcher.callbacks.get("on_detach_after"), "the VAE given has nothing of it"


def test_memory_plan_counts_what_programs_hold(checkpoint: Any, compiled: Any, engine: Any, monkeypatch: Any) -> None:
    backend = importlib.import_module("speedlab.techniques.compile.backends.onnxruntime")
    monkeypatch.setattr(backend, "available", lambda: (True, ""))
    memory = SimpleNamespace(plan=engine("memory.plan"))
    weights = engine("memory.streaming").weight_bytes
    held = weights(checkpoint.model.model.diffusion_model)

    def phases(models: Any) -> dict[str, int]:
        return {phase.name: phase.weights for phase in plan(memory, models, "model").prediction.phases}

    plain = phases(checkpoint)
    for config, copies in (
        (compiled.CompileConfig("jit_trace"), 0),
        (compiled.CompileConfig("jit_trace", freeze_weights=True), 2),
        (compiled.CompileConfig("openvino"), 1),
        (compiled.CompileConfig("inductor"), 0),
        (compiled.CompileConfig("inductor", freeze_weights=True), 1),
    ):
        models = copy.copy(checkpoint)
        models.model = compiled.attach_compile(checkpoint.model, config)
        assert phases(models)["sampling"] == plain["sampling"] + copies * held, config
        told = plan(memory, models, "model").text
        assert ("Compiled programs hold weights of their own" in told) == (copies > 0)
    models = copy.copy(checkpoint)
    models.vae = engine("vae.compile").compile_vae(checkpoint.vae, "onnxruntime", "default")
    assert phases(models)["decoding"] == plain["decoding"] + weights(checkpoint.vae.first_stage_model.decoder)

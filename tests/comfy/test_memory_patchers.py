"""Memory Plan on patchers of other classes: those of other packs, and ComfyUI's dynamic VRAM (see dynamic_patcher)."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import tiny_unet
from .test_memory_plan import encoded, latent, plan

OFFLOADS = ("model", "sequential")


@pytest.fixture
def memory(engine: Any) -> SimpleNamespace:
    names = ("plan", "predict", "placement", "out_of_memory")
    return SimpleNamespace(**{name: engine(f"memory.{name}") for name in names})


@pytest.fixture(scope="module")
def checkpoint(model_files: Any, core: Any) -> SimpleNamespace:
    model, clip, vae = core.CheckpointLoaderSimple().load_checkpoint("speedlab_demo_sd15.safetensors")
    return SimpleNamespace(model=model, clip=clip, vae=vae)


@pytest.fixture
def others(comfy: Any) -> Any:
    return importlib.import_module("tests.comfy.dynamic_patcher")


def under(kind: Any, thing: Any) -> Any:
    """A CLIP or VAE object of its own on a patcher of that kind."""
    second = copy.copy(thing)
    second.patcher = thing.patcher.clone()
    second.patcher.__class__ = kind
    return second


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_plan_stays_on_clones_of_a_patcher_that_clones_to_its_own_class(
    memory: Any, others: Any, offload: str
) -> None:
    tiny = tiny_unet.build("sd15")
    expected = tiny.sample()
    gguf = tiny.model.clone()
    gguf.__class__ = others.GgufPatcher
    models = SimpleNamespace(model=gguf, clip=None, vae=None)
    planned = plan(memory, models, offload).model
    behind = planned.clone().clone()
    assert memory.placement.is_planned(behind)
    assert behind.placement.offload == offload
    assert torch.equal(tiny.sample(behind), expected)
    assert (behind.stream is not None) == (offload == "sequential")
    plain = memory.placement.unplanned(behind)
    assert type(plain) is others.GgufPatcher
    assert torch.equal(tiny.sample(plain), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_text_encoder_of_such_a_patcher_loads_under_a_plan(
    memory: Any, checkpoint: Any, others: Any, node: Any, offload: str
) -> None:
    expected = encoded(node, checkpoint.clip)
    gguf = under(others.GgufPatcher, checkpoint.clip)
    planned = plan(memory, SimpleNamespace(model=checkpoint.model, clip=gguf, vae=None), offload)
    for clip in (planned.clip, planned.clip.clone()):
        assert memory.placement.is_planned(clip.patcher)
        assert torch.equal(encoded(node, clip)[0][0], expected[0][0])


@pytest.mark.parametrize("offload", OFFLOADS)
def test_dynamic_models_are_left_to_comfyui_and_the_plan_and_the_record_say_so(
    memory: Any, checkpoint: Any, others: Any, node: Any, offload: str
) -> None:
    mm = importlib.import_module("comfy.model_management")
    mm.unload_all_models()
    dynamic = SimpleNamespace(
        model=others.as_dynamic(checkpoint.model),
        clip=under(others.DynamicPatcher, checkpoint.clip),
        vae=under(others.DynamicPatcher, checkpoint.vae),
    )
    planned = plan(memory, dynamic, offload)
    assert "dynamic VRAM moves the weights of UNet, text encoders, VAE itself" in planned.text
    cond = encoded(node, planned.clip)
    record = node("SpeedLabProfileSampler").sample(planned.model, 1, 1, 2.0, "euler", "normal", cond, cond, latent())[
        "result"
    ][1]
    (told,) = [one for one in record.request["accelerators"] if one.startswith("memory_plan")]
    assert told == f"memory_plan(offload={offload}, left_to=dynamic_vram)"
    assert any("Memory Plan: ComfyUI's dynamic VRAM moved the weights" in text for text in record.warnings)
    loaded = {type(one.model.model).__name__ for one in mm.current_loaded_models}
    assert type(checkpoint.clip.cond_stage_model).__name__ in loaded, "nothing of it was evicted"
    assert getattr(planned.model, "stream", None) is None
    mm.unload_all_models()


def test_a_plain_model_of_the_group_takes_turns_beside_a_dynamic_one(
    memory: Any, checkpoint: Any, others: Any, node: Any
) -> None:
    mm = importlib.import_module("comfy.model_management")
    mm.unload_all_models()
    mixed = SimpleNamespace(
        model=checkpoint.model, clip=under(others.DynamicPatcher, checkpoint.clip), vae=checkpoint.vae
    )
    planned = plan(memory, mixed, "model")
    assert "moves the weights of text encoders itself" in planned.text
    encoded(node, planned.clip)
    planned.vae.decode(torch.zeros(1, 4, 8, 8))
    mm.load_models_gpu([planned.model])
    loaded = {type(one.model.model).__name__ for one in mm.current_loaded_models}
    assert loaded == {type(checkpoint.clip.cond_stage_model).__name__, type(checkpoint.model.model).__name__}
    mm.unload_all_models()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_plain_clone_of_a_dynamic_model_follows_the_plan(memory: Any, others: Any, offload: str) -> None:
    """Core makes one for prompts with hooks, Compile Model for its programs."""
    tiny = tiny_unet.build("sd15")

    def load(disable_dynamic: bool = False) -> Any:
        return others.as_whole(tiny_unet.build("sd15").model)

    dynamic = others.as_dynamic(tiny.model, (load, ()))
    planned = plan(memory, SimpleNamespace(model=dynamic, clip=None, vae=None), offload).model
    delegate = planned.clone(disable_dynamic=True)
    assert not delegate.is_dynamic()
    assert memory.placement.is_planned(delegate)
    assert torch.equal(tiny.sample(delegate), tiny.sample())
    assert (delegate.stream is not None) == (offload == "sequential")


def test_out_of_memory_under_dynamic_vram_names_what_helps_there(memory: Any, others: Any) -> None:
    tiny = tiny_unet.build("sd15")
    planned = plan(
        memory, SimpleNamespace(model=others.as_dynamic(tiny.model), clip=None, vae=None), "model"
    ).model  # fmt: skip

    def fail(*_: Any) -> Any:
        raise MemoryError("no memory")

    handle = tiny.unet.middle_block[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(memory.out_of_memory.OutOfMemoryError, match="--reserve-vram") as caught:
            tiny.sample(planned)
        assert "Set offload" not in str(caught.value)
    finally:
        handle.remove()


def test_predictions_count_quantised_weights_as_what_they_stand_for(memory: Any, engine: Any) -> None:
    from .test_lora_quantised import TELLING

    tiny = tiny_unet.build("sd15")
    size = memory.predict.ImageSize(64, 64)
    plain = memory.predict.sampling_bytes(tiny.model, size)
    held = engine("memory.streaming").weight_bytes(tiny.unet)
    for name, pack in TELLING.items():
        packed = tiny_unet.build("sd15")
        for layer in packed.unet.modules():
            if isinstance(layer, torch.nn.Linear) and layer.in_features % 64 == 0:
                layer._parameters["weight"] = pack(layer.weight.detach())
        assert memory.predict.sampling_bytes(packed.model, size) == plain, name
        assert engine("memory.streaming").weight_bytes(packed.unet) < held, name

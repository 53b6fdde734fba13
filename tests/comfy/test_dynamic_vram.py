"""Models under ComfyUI's dynamic VRAM, by a class of its interface (see dynamic_patcher): it needs a GPU to run."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from . import tiny_unet
from .tiny_unet import relative

SIZE = (16, 16)


@pytest.fixture(scope="module")
def compiled(engine: Any) -> Any:
    return engine("techniques.compile.attach")


class Loader:
    """A loader that core can call again; counts how often it was."""

    def __init__(self) -> None:
        self.loads = 0

    def load(self, seed: int, disable_dynamic: bool = False) -> tuple[Any, ...]:
        from . import dynamic_patcher

        self.loads += 1
        patcher = tiny_unet.build("sd15", seed).model
        assert disable_dynamic
        return (dynamic_patcher.as_whole(patcher), "clip")


@pytest.fixture
def paged(comfy: Any) -> Any:
    """A model under dynamic VRAM, its loader, and an equal one that is not."""
    from . import dynamic_patcher

    loader = Loader()
    plain = tiny_unet.build("sd15", 3)
    model = dynamic_patcher.as_dynamic(tiny_unet.build("sd15", 3).model, (loader.load, (3,), 0))
    return model, loader, plain


def lora(model: Any, strength: float = 1.0) -> Any:
    clone = model.clone()
    weights = {k: v for k, v in model.model.state_dict().items() if "attn" in k and v.ndim > 1}
    generator = torch.Generator().manual_seed(3)
    patches = {k: ("diff", (0.05 * torch.randn(v.shape, generator=generator),)) for k, v in weights.items()}
    clone.add_patches(patches, strength)
    return clone


@pytest.mark.parametrize("backend", ["jit_trace", pytest.param("openvino", marks=pytest.mark.full)])
@pytest.mark.parametrize("order", ["before", "behind"])
def test_a_program_runs_on_weights_that_lie_still_and_has_the_lora(
    paged: Any, compiled: Any, backend: str, order: str
) -> None:
    from .dynamic_patcher import is_at_rest

    model, _loader, plain = paged
    config = compiled.CompileConfig(backend)
    if order == "before":
        after = compiled.attach_compile(lora(model), config)
    else:
        after = lora(compiled.attach_compile(model, config))
    eager = plain.sample(lora(plain.model), steps=2, size=SIZE)
    assert relative(plain.sample(after, steps=2, size=SIZE), eager) < 1e-4
    assert relative(eager, plain.sample(steps=2, size=SIZE)) > 1e-3
    assert model.is_dynamic()
    assert is_at_rest(model.model)
    assert not after.is_dynamic()


def test_all_compiled_clones_of_a_model_share_one_second_set_of_weights(paged: Any, compiled: Any) -> None:
    model, loader, _plain = paged
    config = compiled.CompileConfig("inductor")
    first = compiled.attach_compile(model, config)
    second = compiled.attach_compile(lora(model), config)
    assert first.model is second.model is not model.model
    assert first.is_clone(second) and loader.loads == 1
    gone = weakref.ref(first.model)
    del first, second
    gc.collect()
    assert gone() is None  # what ComfyUI lets go is let go
    assert not compiled.attach_compile(model, config).is_dynamic()
    assert loader.loads == 2


def test_what_cannot_be_loaded_again_is_refused_by_name_or_runs_uncompiled(
    comfy: Any, compiled: Any, engine: Any, caplog: Any
) -> None:
    from . import dynamic_patcher

    plain = tiny_unet.build("sd15", 3)
    model = dynamic_patcher.as_dynamic(plain.model)
    with pytest.raises(engine("common.errors").UnavailableError, match=r"Compile Model.*dynamic VRAM.*Load Checkpoint"):
        compiled.attach_compile(model, compiled.CompileConfig("jit_trace"))
    eager = compiled.attach_compile(model, compiled.CompileConfig("jit_trace", on_failure="eager"))
    assert torch.equal(plain.sample(eager, steps=2, size=SIZE), plain.sample(model, steps=2, size=SIZE))
    assert "uncompiled" in caplog.text and "dynamic VRAM" in caplog.text


def test_out_of_memory_while_loading_again_is_no_refusal(comfy: Any, compiled: Any) -> None:
    from . import dynamic_patcher

    def load(disable_dynamic: bool = False) -> Any:
        raise MemoryError("no memory")

    model = dynamic_patcher.as_dynamic(tiny_unet.build("sd15", 3).model, (load, ()))
    with pytest.raises(MemoryError):
        compiled.attach_compile(model, compiled.CompileConfig("jit_trace"))


@pytest.mark.parametrize("backend", ["inductor", "jit_trace"])
def test_a_model_that_is_paged_again_behind_the_node_is_refused(
    paged: Any, compiled: Any, engine: Any, backend: str
) -> None:
    from . import dynamic_patcher

    model, _loader, plain = paged
    again = compiled.attach_compile(model, compiled.CompileConfig(backend))
    again.__class__ = dynamic_patcher.DynamicPatcher
    with pytest.raises(engine("common.errors").SpeedLabError, match=rf"{backend}.*dynamic VRAM"):
        plain.sample(again, steps=1, size=SIZE)


@pytest.mark.parametrize("left", ["weight_lowvram_function", "_v"])
def test_a_program_refuses_weights_that_are_paged_whatever_the_patcher_says(
    compiled: Any, engine: Any, left: str
) -> None:
    plain = tiny_unet.build("sd15", 3)
    setattr(plain.unet.time_embed[0], left, object())
    model = compiled.attach_compile(plain.model, compiled.CompileConfig("jit_trace"))
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"jit_trace.*dynamic VRAM.*inductor"):
        plain.sample(model, steps=1, size=SIZE)


class Packed(torch.nn.Parameter):
    """A weight of a class of its own, as GGUF's and ComfyUI's quantised ones are."""


def test_a_program_refuses_quantised_weights_by_name(compiled: Any, engine: Any) -> None:
    plain = tiny_unet.build("sd15", 3)
    layer = plain.unet.time_embed[0]
    layer._parameters["weight"] = Packed(layer.weight.detach().clone(), requires_grad=False)
    model = compiled.attach_compile(plain.model, compiled.CompileConfig("jit_trace"))
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"jit_trace.*quantised \(Packed\).*inductor"):
        plain.sample(model, steps=1, size=SIZE)


@pytest.fixture
def vae(model_files: Any, core: Any) -> Any:
    from nodes import CheckpointLoaderSimple

    return CheckpointLoaderSimple().load_checkpoint("speedlab_demo_sd15.safetensors")[2]


def test_a_vae_is_compiled_on_weights_that_lie_still(vae: Any, engine: Any) -> None:
    from . import dynamic_patcher

    def load(disable_dynamic: bool = False) -> Any:
        assert disable_dynamic
        return dynamic_patcher.as_whole(copy.deepcopy(vae.patcher))

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    eager = vae.decode(latents)
    paged = copy.copy(vae)
    paged.patcher = dynamic_patcher.as_dynamic(vae.patcher, (load, ()))
    compiled = engine("vae.compile").compile_vae(paged, "jit_trace", "default")
    assert relative(compiled.decode(latents), eager) < 1e-4
    assert not compiled.patcher.is_dynamic()
    assert compiled.patcher.model is not vae.first_stage_model
    assert paged.first_stage_model is vae.first_stage_model and paged.patcher.is_dynamic()
    assert dynamic_patcher.is_at_rest(vae.first_stage_model)


def test_a_vae_that_cannot_be_loaded_again_is_refused_by_name(vae: Any, engine: Any) -> None:
    from . import dynamic_patcher

    paged = copy.copy(vae)
    paged.patcher = dynamic_patcher.as_dynamic(vae.patcher)
    with pytest.raises(engine("common.errors").UnavailableError, match=r"Compile VAE.*dynamic VRAM.*Load VAE"):
        engine("vae.compile").compile_vae(paged, "jit_trace", "default")

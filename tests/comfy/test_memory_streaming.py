"""Sequential offload: two layers at most on the device, and the same bits as a model that is loaded whole."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from . import tiny_unet


@pytest.fixture
def memory(engine) -> SimpleNamespace:
    return SimpleNamespace(placement=engine("memory.placement"), streaming=engine("memory.streaming"))


def sequential(memory, patcher):
    group = memory.placement.Group()
    group.add(patcher.model)
    return memory.placement.planned(patcher, memory.placement.Placement("sequential", group))


def as_users_have_it(engine, patcher):
    """The model as the Memory Plan node gives it, with what ends a run cut off in the middle."""
    plan = engine("memory.plan")
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    return plan.plan_memory(patcher, None, None, plan.MemoryPlanConfig("sequential"), latent).model


def homes(tiny) -> dict[str, tuple[int, int]]:
    """Where every weight lies, and which object it is."""
    return {name: (id(weight), weight.data_ptr()) for name, weight in tiny.unet.named_parameters()}


@pytest.mark.parametrize("layout", ["sd15", "sd2", "sdxl", "ssd1b", "vega", "refiner", "inpaint"])
def test_streamed_latents_are_the_loaded_ones_and_two_units_are_resident_at_most(memory, layout):
    tiny = tiny_unet.build(layout)
    loaded = tiny.sample()
    before = homes(tiny)
    model = sequential(memory, tiny.model)
    streamed = tiny.sample(model)
    assert torch.equal(streamed, loaded)
    seen = model.stream.residency
    layers = model.stream.streams[0].layers
    two_largest = sum(sorted(layer.nbytes for layer in layers)[-2:])
    assert seen.layers == 2
    assert 0 < seen.nbytes <= two_largest
    assert seen.nbytes < memory.streaming.weight_bytes(tiny.unet)
    assert len(layers) > 20
    assert homes(tiny) == before


def test_units_hold_every_weight_once(memory):
    tiny = tiny_unet.build("sdxl")
    held = [id(w) for layer in memory.streaming.layers_of(tiny.unet) for *_, w in memory.streaming.movable(layer)]
    assert sorted(held) == sorted(id(weight) for weight in tiny.unet.parameters())


def test_residency_is_counted_from_live_buffers(memory):
    """The count that the stream keeps is checked against the weights that forwards find in the network."""
    tiny = tiny_unet.build("sd15")
    home = {weight.data_ptr() for weight in tiny.unet.parameters()}
    away: list[int] = []

    def look(*_):
        away.append(sum(w.nbytes for w in tiny.unet.parameters() if w.data_ptr() not in home))

    layers = [part for part in tiny.unet.modules() if type(part).__name__ == "ResBlock"]
    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        model = sequential(memory, tiny.model)
        tiny.sample(model, steps=2)
    finally:
        for handle in handles:
            handle.remove()
    largest = max(layer.nbytes for layer in model.stream.streams[0].layers)
    assert 0 < max(away) <= largest, "at any time one layer's weights are swapped in"
    assert model.stream.streams[0]._slots is None, "the slots live as long as a forward"


def test_between_two_forwards_weights_are_cast_in_use_again(memory):
    """Off the device ComfyUI casts a weight where it is used; while it is streamed it need not."""
    tiny = tiny_unet.build("sd15")
    streamed: list[bool] = []
    layer = next(part for part in tiny.unet.modules() if type(part).__name__ == "ResBlock").in_layers[2]
    handle = layer.register_forward_pre_hook(lambda *_: streamed.append(layer.comfy_cast_weights))
    tiny.sample(sequential(memory, tiny.model), steps=1)
    handle.remove()
    offloaded = [part for part in tiny.unet.modules() if hasattr(part, "prev_comfy_cast_weights")]
    assert layer in offloaded and not any(streamed) and streamed
    assert all(part.comfy_cast_weights for part in offloaded)


def lora(tiny, seed: int) -> dict:
    """Low-rank patches on attention and convolution weights, as ComfyUI's LoRA loader makes them."""
    adapter = importlib.import_module("comfy.weight_adapter.lora").LoRAAdapter
    generator = torch.Generator().manual_seed(seed)
    patches = {}
    for name, weight in tiny.unet.named_parameters():
        if name.endswith(("to_q.weight", "to_out.0.weight", "in_layers.2.weight")):
            up = torch.randn(weight.shape[0], 2, generator=generator)
            down = torch.randn(2, weight[0].numel(), generator=generator)
            key = f"diffusion_model.{name}"
            patches[key] = adapter({key}, (up, down, 1.0, None, None, None))
    return patches


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.full) for dtype in (torch.float16, torch.float8_e4m3fn))],
)
def test_lora_patches_are_those_of_the_loaded_model_bit_for_bit(memory, dtype):
    tiny = tiny_unet.build("sd15")
    set_storage(tiny, dtype)
    patched = tiny.model.clone()
    assert patched.add_patches(lora(tiny, 1), 0.1)
    plain, loaded = tiny.sample(), tiny.sample(patched)
    assert not torch.equal(plain, loaded)
    model = sequential(memory, patched)
    assert torch.equal(tiny.sample(model), loaded)
    assert torch.equal(tiny.sample(model), loaded), "a second run does not patch what is patched"
    assert torch.equal(tiny.sample(patched), loaded), "nor does loading it whole afterwards"
    assert torch.equal(tiny.sample(model), loaded)
    assert torch.equal(tiny.sample(), plain), "the unpatched model is what it was"
    assert torch.equal(tiny.sample(sequential(memory, tiny.model)), plain)


def set_storage(tiny, dtype: torch.dtype) -> None:
    """Keep the weights in `dtype` and compute in fp32, as ComfyUI does with fp8 files and on CPUs."""
    if dtype == torch.float32:
        return
    base = tiny.model.model
    config = base.model_config
    config.set_inference_dtype(dtype, torch.float32)
    again = config.get_model({}, "", device=torch.device("cpu"))
    weights = {name: weight.to(dtype) for name, weight in base.diffusion_model.state_dict().items()}
    again.diffusion_model.load_state_dict(weights)
    again.diffusion_model.to(dtype)
    cpu = torch.device("cpu")
    tiny.model = importlib.import_module("comfy.model_patcher").ModelPatcher(again, cpu, cpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_storage_in_another_type_than_the_computation(memory, dtype):
    tiny = tiny_unet.build("sdxl")
    set_storage(tiny, dtype)
    loaded = tiny.sample(steps=3)
    model = sequential(memory, tiny.model)
    assert torch.equal(tiny.sample(model, steps=3), loaded)
    assert model.stream.residency.layers == 2


def test_a_cancel_in_the_middle_leaves_every_weight_where_it_was(engine):
    mm = importlib.import_module("comfy.model_management")
    tiny = tiny_unet.build("sd15")
    expected, before = tiny.sample(), homes(tiny)
    model = as_users_have_it(engine, tiny.model)
    calls = []

    def cancel(*_):
        calls.append(1)
        if len(calls) == 12:
            mm.interrupt_current_processing()

    handle = tiny.unet.middle_block[0].register_forward_pre_hook(cancel)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            tiny.sample(model, steps=30)
    finally:
        handle.remove()
        mm.interrupt_current_processing(False)
    assert homes(tiny) == before
    assert model.stream is None or model.stream.streams[0]._slots is None
    assert torch.equal(tiny.sample(model), expected)
    assert torch.equal(tiny.sample(), expected)


class _CancelOfNewerComfyUIError(BaseException):
    """No Exception, so PyTorch calls no forward hook on its way out."""


@pytest.mark.parametrize("error", [ZeroDivisionError, _CancelOfNewerComfyUIError])
def test_an_error_in_a_layer_leaves_every_weight_where_it_was(engine, error):
    tiny = tiny_unet.build("sd15")
    expected, before = tiny.sample(), homes(tiny)
    model = as_users_have_it(engine, tiny.model)

    def fail(*_):
        raise error("a layer broke")

    handle = tiny.unet.output_blocks[2][0].register_forward_hook(fail)
    try:
        with pytest.raises(error):
            tiny.sample(model)
    finally:
        handle.remove()
    assert homes(tiny) == before
    assert model.stream is None or model.stream.streams[0]._slots is None
    assert torch.equal(tiny.sample(model), expected)


def test_a_cancel_under_a_hook_leaves_the_weights_as_they_were(engine):
    """ComfyUI puts weights back that a hook changed, on the way out of a cancelled run: into the weights at home."""
    hooks = importlib.import_module("comfy.hooks")
    tiny = tiny_unet.build("sd15")
    expected, before = tiny.sample(), {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    state = {}
    for name, weight in tiny.unet.state_dict().items():
        if name.endswith("attn2.to_v.weight"):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            state[f"{key}.lora_up.weight"] = torch.ones(weight.shape[0], 2)
            state[f"{key}.lora_down.weight"] = torch.ones(2, weight.shape[1])
    hooked = hooks.set_hooks_for_conditioning(tiny.cond(1), hooks.create_hook_lora(state, 1.0, 0.0))
    model = as_users_have_it(engine, tiny.model)
    changed = []

    def cancel(layer, *_):
        changed.append(not torch.equal(layer.weight, before["middle_block.1.transformer_blocks.0.attn2.to_v.weight"]))
        if changed[-1]:
            raise _CancelOfNewerComfyUIError

    handle = tiny.unet.middle_block[1].transformer_blocks[0].attn2.to_v.register_forward_hook(cancel)
    try:
        with pytest.raises(_CancelOfNewerComfyUIError):
            tiny.sample(model, positive=[*hooked, *tiny.cond(3)])
    finally:
        handle.remove()
    assert changed[-1], "in the middle of a layer that the hook changed"
    now = tiny.unet.state_dict()
    assert [name for name, value in before.items() if not torch.equal(now[name], value)] == []
    assert torch.equal(tiny.sample(), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_compute_dtype_chosen_by_cores_node(memory, dtype):
    """ModelComputeDtype has loaded weights cast in use, and so it does with streamed ones."""
    tiny = tiny_unet.build("sd15")
    model = tiny.model.clone()
    model.set_model_compute_dtype({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    expected = tiny.sample(model)
    assert torch.equal(tiny.sample(sequential(memory, model)), expected)


def test_skipped_blocks_are_not_copied(memory, engine):
    deepcache = engine("techniques.deepcache.attach")
    tiny = tiny_unet.build("sd15")
    cached = deepcache.attach_deepcache(tiny.model, deepcache.DeepCacheConfig(interval=4))
    expected = tiny.sample(cached, steps=8)
    whole, saving = sequential(memory, tiny.model), sequential(memory, cached)
    tiny.sample(whole, steps=8)
    copied_in_full = whole.stream.residency.copied_bytes
    assert torch.equal(tiny.sample(saving, steps=8), expected)
    assert saving.stream.residency.copied_bytes < 0.5 * copied_in_full
    assert saving.stream.residency.layers == 2


def test_composes_with_dynamic_cfg_attention_and_precision(memory, engine):
    guidance, attention = engine("techniques.guidance.dynamic_cfg"), engine("techniques.attention.attach")
    flags = engine("techniques.precision.attach")
    tiny = tiny_unet.build("sd15")
    stack = guidance.attach_dynamic_cfg(tiny.model, guidance.DynamicCFGConfig(stop_at=0.5))
    stack = attention.attach_attention(stack, attention.AttentionConfig("sdpa"))
    stack = flags.attach_precision(stack, flags.PrecisionConfig(memory_format="channels_last", autocast="bf16"))
    expected = tiny.sample(stack)
    assert torch.equal(tiny.sample(sequential(memory, stack)), expected)
    # The other way round: techniques behind the plan.
    behind = guidance.attach_dynamic_cfg(sequential(memory, tiny.model), guidance.DynamicCFGConfig(stop_at=0.5))
    behind = attention.attach_attention(behind, attention.AttentionConfig("sdpa"))
    behind = flags.attach_precision(behind, flags.PrecisionConfig(memory_format="channels_last", autocast="bf16"))
    assert torch.equal(tiny.sample(behind), expected)


@pytest.mark.full
def test_split_conds_batches_and_other_samplers(memory):
    tiny = tiny_unet.build("sdxl")
    model = sequential(memory, tiny.model)
    for options in ({"batch": 3}, {"sampler": "heun"}, {"denoise": 0.5}, {"cfg": 1.0}):
        assert torch.equal(tiny.sample(model, steps=4, **options), tiny.sample(steps=4, **options))
    with tiny.split():
        assert torch.equal(tiny.sample(model, steps=4), tiny.sample(steps=4))


def test_a_clone_keeps_the_plan_and_the_original_never_gets_one(memory):
    tiny = tiny_unet.build("sd15")
    model = sequential(memory, tiny.model)
    clone = model.clone()
    assert memory.placement.is_planned(clone)
    assert clone.placement is model.placement
    assert not memory.placement.is_planned(tiny.model)
    assert not memory.placement.is_planned(memory.placement.unplanned(model))
    expected = tiny.sample()
    assert torch.equal(tiny.sample(clone), expected)
    assert clone.stream is not None
    hooks = [m for m in tiny.unet.modules() if m._forward_pre_hooks]
    assert hooks
    assert torch.equal(tiny.sample(), expected)
    assert not [m for m in tiny.unet.modules() if m._forward_pre_hooks or m._forward_hooks], "nothing is left hooked"

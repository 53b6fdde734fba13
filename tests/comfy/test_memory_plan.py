"""Memory Plan: the choice by budget, text encoders and VAE under a plan, taking turns, and bad input."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .tiny_unet import build

GB = 1e9


@pytest.fixture
def memory(engine) -> SimpleNamespace:
    return SimpleNamespace(
        **{name: engine(f"memory.{name}") for name in ("plan", "predict", "placement", "streaming", "out_of_memory")}
    )


@pytest.fixture(scope="module")
def checkpoint(model_files, node) -> SimpleNamespace:
    """The small SD 1.5 checkpoint with real text encoder and VAE."""
    with torch.inference_mode():
        model, clip, vae, _ = node("SpeedLabCheckpointLoader").load(
            "speedlab_demo_sd15.safetensors", "auto", "contiguous"
        )
    return SimpleNamespace(model=model, clip=clip, vae=vae)


def latent(size: int = 64, batch: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 4, size // 8, size // 8)}


def plan(memory, models, offload: str = "auto", budget: float = 0.0, size: int = 64, batch: int = 1):
    config = memory.plan.MemoryPlanConfig(offload, budget)
    return memory.plan.plan_memory(models.model, models.clip, models.vae, config, latent(size, batch))


def predictions(memory, models, size: int = 64) -> dict[str, Any]:
    parts = memory.predict.parts_of(models.model, models.clip, models.vae, memory.predict.ImageSize(size, size))
    return {offload: memory.predict.predict(parts, offload) for offload in memory.predict.OFFLOADS}


def test_none_gives_back_the_very_objects(memory, checkpoint):
    planned = plan(memory, checkpoint, "none")
    assert planned.model is checkpoint.model
    assert planned.clip is checkpoint.clip
    assert planned.vae is checkpoint.vae


def test_nothing_connected_is_nothing_given(node, checkpoint):
    result = node("SpeedLabMemoryPlan").plan(checkpoint.model, "model", 0.0)["result"]
    assert result[1] is None
    assert result[2] is None
    assert "text encoding" not in result[3]


def test_auto_takes_the_fastest_that_fits(memory, checkpoint):
    peaks = {name: one.peak for name, one in predictions(memory, checkpoint).items()}
    assert peaks["none"] > peaks["model"] > peaks["sequential"]
    for offload, budget in peaks.items():
        planned = plan(memory, checkpoint, "auto", (budget + 1e6) / GB)
        assert planned.prediction.offload == offload
        assert planned.prediction.peak == budget
        assert planned.text.startswith(f"Memory plan: {offload} ")
    assert plan(memory, checkpoint).prediction.offload == "none", "this machine has room for a small model"


def test_a_budget_that_nothing_fits_names_the_smallest_that_would(memory, checkpoint):
    least = predictions(memory, checkpoint)["sequential"].peak / GB
    with pytest.raises(memory.plan.MemoryBudgetError, match=rf"sequential offload with {least:.2f} GB") as caught:
        plan(memory, checkpoint, "auto", 0.001)
    named = float(str(caught.value).split("budget_gb to ")[1].split(" ")[0])
    assert plan(memory, checkpoint, "auto", named).prediction.offload == "sequential"
    with pytest.raises(memory.plan.MemoryBudgetError, match=r"offload none needs .* Set offload to auto or sequential"):
        plan(memory, checkpoint, "none", named)


@pytest.mark.parametrize(("offload", "budget"), [("other", 0.0), ("auto", -1.0), ("auto", float("inf")),
                                                 ("auto", float("nan"))])  # fmt: skip
def test_settings_out_of_range(memory, offload, budget):
    with pytest.raises(ValueError, match=r"choose one of|it must be 0"):
        memory.plan.MemoryPlanConfig(offload, budget)


def test_a_video_latent_is_refused(memory, checkpoint):
    with pytest.raises(RuntimeError, match="predicts for images"):
        memory.plan.image_size(checkpoint.model, {"samples": torch.zeros(1, 4, 2, 8, 8)})


def test_without_a_latent_the_native_size_counts(memory, checkpoint):
    size = memory.plan.image_size(checkpoint.model, None)
    assert (size.width, size.height, size.batch) == (512, 512, 1)
    size = memory.plan.image_size(build("sdxl").model, None)
    assert (size.width, size.height) == (1024, 1024)


def test_the_prediction_is_of_counted_bytes(memory, checkpoint):
    found = predictions(memory, checkpoint)
    unet = sum(p.numel() * p.element_size() for p in checkpoint.model.model.diffusion_model.parameters())
    phases = {phase.name: phase for phase in found["model"].phases}
    assert list(phases) == ["text encoding", "sampling", "decoding"]
    assert phases["sampling"].weights == pytest.approx(unet, rel=0.001)
    assert {phase.weights for phase in found["none"].phases} == {sum(p.weights for p in phases.values())}
    largest = max(u.nbytes for u in memory.streaming.layers_of(checkpoint.model.model.diffusion_model))
    assert found["sequential"].phases[1].weights == 2 * largest
    bigger = predictions(memory, checkpoint, 128)["model"].phases
    assert bigger[1].activations == pytest.approx(4 * phases["sampling"].activations, rel=0.15)
    assert bigger[2].activations == pytest.approx(4 * phases["decoding"].activations, rel=0.15)
    assert bigger[0].activations == phases["text encoding"].activations


def encoded(node, clip) -> list:
    return node("SpeedLabTextEncode").encode(clip, "a lighthouse at dawn")[0]


def test_text_encoder_and_vae_are_streamed_and_give_the_same_bits(memory, node, checkpoint):
    cond, samples = encoded(node, checkpoint.clip), torch.randn(1, 4, 8, 8)
    pictures = checkpoint.vae.decode(samples)
    planned = plan(memory, checkpoint, "sequential")
    again = encoded(node, planned.clip)
    assert torch.equal(again[0][0], cond[0][0])
    assert torch.equal(again[0][1]["pooled_output"], cond[0][1]["pooled_output"])
    seen = planned.clip.patcher.stream.residency
    assert seen.layers == 2
    assert seen.nbytes <= memory.streaming.streamed_bytes(checkpoint.clip.cond_stage_model)
    assert torch.equal(planned.vae.decode(samples), pictures)
    seen = planned.vae.patcher.stream.residency
    assert seen.layers == 2
    assert seen.nbytes <= memory.streaming.streamed_bytes(checkpoint.vae.first_stage_model)
    assert planned.vae.patcher is not checkpoint.vae.patcher
    assert not memory.placement.is_planned(checkpoint.vae.patcher)
    assert torch.equal(checkpoint.vae.decode(samples), pictures)
    assert torch.equal(encoded(node, checkpoint.clip)[0][0], cond[0][0])


def test_a_decode_in_another_precision_stays_in_the_plan(memory, node, checkpoint):
    mm = importlib.import_module("comfy.model_management")
    mm.unload_all_models()
    planned = plan(memory, checkpoint, "model")
    mm.load_models_gpu([planned.model])
    settings = {"slicing": False, "tile_size": 0, "overlap": 64, "precision": "bf16"}
    for _ in range(2):
        (picture,) = node("SpeedLabVAEDecode").decode(latent(), planned.vae, **settings)
        assert [type(one.model.model).__name__ for one in mm.current_loaded_models] == ["AutoencoderKL"]
    (plain,) = node("SpeedLabVAEDecode").decode(latent(), checkpoint.vae, **settings)
    assert torch.equal(picture, plain)
    mm.unload_all_models()


def test_a_checkpoint_without_a_vae_says_so(memory, node, checkpoint):
    sd = importlib.import_module("comfy.sd")
    hollow = sd.VAE.__new__(sd.VAE)
    hollow.first_stage_model = None
    models = SimpleNamespace(model=checkpoint.model, clip=None, vae=hollow)
    with pytest.raises(RuntimeError, match="There is no VAE"):
        plan(memory, models)
    with pytest.raises(RuntimeError, match="There is no VAE"):
        node("SpeedLabVAEDecode").decode(latent(), hollow, False, 0, 64, "auto")


def test_a_compiled_vae_is_planned_for_and_not_streamed(memory, node, checkpoint):
    (compiled,) = node("SpeedLabCompileVAE").apply(checkpoint.vae, "jit_trace", "default")
    models = SimpleNamespace(model=checkpoint.model, clip=None, vae=compiled)
    known = SimpleNamespace(model=checkpoint.model, clip=None, vae=checkpoint.vae)
    assert [p.total for p in predictions(memory, models)["model"].phases] == [
        p.total for p in predictions(memory, known)["model"].phases
    ]
    assert plan(memory, models, "model").vae is not compiled
    with pytest.raises(RuntimeError, match="Compile VAE"):
        plan(memory, models, "sequential")
    with pytest.raises(RuntimeError, match="Compile VAE"):
        node("SpeedLabCompileVAE").apply(plan(memory, known, "sequential").vae, "jit_trace", "default")


def test_a_budget_error_names_no_plan_that_would_be_refused(memory, node, checkpoint, engine):
    (compiled,) = node("SpeedLabCompileVAE").apply(checkpoint.vae, "jit_trace", "default")
    with_vae = SimpleNamespace(model=checkpoint.model, clip=None, vae=compiled)
    model = engine("techniques.compile.attach").attach_compile(
        checkpoint.model, engine("techniques.compile.attach").CompileConfig("jit_trace")
    )
    for models in (with_vae, SimpleNamespace(model=model, clip=checkpoint.clip, vae=checkpoint.vae)):
        peaks = {name: one.peak / GB for name, one in predictions(memory, models).items()}
        with pytest.raises(
            memory.plan.MemoryBudgetError, match=r"smallest is model .*compiled code excludes"
        ) as caught:
            plan(memory, models, "auto", 0.001)
        named = float(str(caught.value).split("budget_gb to ")[1].split(" ")[0])
        assert plan(memory, models, "auto", named).prediction.offload == "model"
        with pytest.raises(memory.plan.MemoryBudgetError, match=r"smallest is model .*compiled code excludes"):
            plan(memory, models, "model", (peaks["model"] + peaks["sequential"]) / 2)
        with pytest.raises(RuntimeError, match="exclude each other"):
            plan(memory, models, "sequential")


def test_what_is_free_is_no_budget_to_raise(memory, checkpoint, monkeypatch):
    monkeypatch.setattr(memory.plan, "free_bytes", lambda *_: int(0.01 * GB))
    with pytest.raises(memory.plan.MemoryBudgetError, match="that are free") as caught:
        plan(memory, checkpoint)
    assert "set budget_gb" not in str(caught.value)


def test_handles_of_paged_weights_are_not_copied(memory, engine, checkpoint):
    """A copy of ComfyUI's handles of dynamic VRAM would free what they stand for."""

    class Handle:
        def __deepcopy__(self, memo):
            raise AssertionError("a handle was copied")

    network = build("sd15").unet
    layer = network.middle_block[0].out_layers[3]
    layer._v, layer._v_signature, layer._pin_state = (Handle(), 4096, 1), 3, Handle()
    layer.weight_lowvram_function = Handle()
    copied = engine("memory.predict").on_meta(network)
    twin = copied.middle_block[0].out_layers[3]
    assert not {"_v", "_v_signature", "_pin_state", "weight_lowvram_function"} & set(twin.__dict__)
    assert isinstance(layer._v[0], Handle)


def test_models_take_turns_and_others_stay(memory, node, checkpoint):
    mm = importlib.import_module("comfy.model_management")
    mm.unload_all_models()
    other = build("sdxl")
    mm.load_models_gpu([other.model])

    def loaded() -> set[str]:
        return {type(one.model.model).__name__ for one in mm.current_loaded_models}

    planned = plan(memory, checkpoint, "model")
    encoded(node, planned.clip)
    assert loaded() == {"SDXL", type(checkpoint.clip.cond_stage_model).__name__}
    mm.load_models_gpu([planned.model])
    assert loaded() == {"SDXL", type(checkpoint.model.model).__name__}
    planned.vae.decode(torch.zeros(1, 4, 8, 8))
    assert loaded() == {"SDXL", "AutoencoderKL"}
    mm.load_models_gpu([planned.model])
    assert loaded() == {"SDXL", type(checkpoint.model.model).__name__}
    mm.unload_all_models()


def test_a_lora_on_the_text_encoder_is_streamed_with_it(memory, node, checkpoint):
    adapter = importlib.import_module("comfy.weight_adapter.lora").LoRAAdapter
    name = next(n for n, _ in checkpoint.clip.cond_stage_model.named_parameters() if n.endswith("0.mlp.fc1.weight"))
    weight = dict(checkpoint.clip.cond_stage_model.named_parameters())[name]
    up, down = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
    patched = checkpoint.clip.clone()
    assert patched.add_patches({name: adapter({name}, (up, down, 1.0, None, None, None))}, 0.01) == [name]
    plain, expected = encoded(node, checkpoint.clip), encoded(node, patched)
    assert not torch.equal(plain[0][0], expected[0][0])
    models = SimpleNamespace(model=checkpoint.model, clip=patched, vae=checkpoint.vae)
    assert torch.equal(encoded(node, plan(memory, models, "sequential").clip)[0][0], expected[0][0])
    # And one that is added behind the plan.
    behind = plan(memory, checkpoint, "sequential").clip.clone()
    behind.add_patches({name: adapter({name}, (up, down, 1.0, None, None, None))}, 0.01)
    assert torch.equal(encoded(node, behind)[0][0], expected[0][0])
    assert torch.equal(encoded(node, checkpoint.clip)[0][0], plain[0][0])


def test_a_second_plan_replaces_the_first(memory, checkpoint):
    first = plan(memory, checkpoint, "sequential")
    models = SimpleNamespace(model=first.model, clip=first.clip, vae=first.vae)
    second = plan(memory, models, "model")
    assert second.model.placement.offload == "model"
    assert second.vae.patcher.placement.offload == "model"
    assert type(second.vae).__mro__.count(type(checkpoint.vae)) == 1
    off = plan(memory, models, "none")
    assert not memory.placement.is_planned(off.model)
    assert not memory.placement.is_planned(off.clip.patcher)
    assert first.model.placement.offload == "sequential"


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(("offload", "words"), [("model", "Set offload of Memory Plan to sequential"),
                                                ("sequential", "make the image or the batch smaller")])  # fmt: skip
def test_out_of_memory_is_freed_and_explained_with_the_next_plan(memory, offload, words):
    mm = importlib.import_module("comfy.model_management")
    tiny = build("sd15")
    expected = tiny.sample()
    config = memory.plan.MemoryPlanConfig(offload)
    model = memory.plan.plan_memory(tiny.model, None, None, config).model
    handle = tiny.unet.middle_block[0].register_forward_pre_hook(out_of_memory)
    try:
        with pytest.raises(memory.out_of_memory.OutOfMemoryError, match=words) as caught:
            tiny.sample(model)
    finally:
        handle.remove()
    assert "while sampling" in str(caught.value)
    assert not any(one.model.model is tiny.model.model for one in mm.current_loaded_models)
    assert torch.equal(tiny.sample(model), expected)


def test_out_of_memory_in_the_text_encoder_and_the_vae(memory, node, checkpoint):
    planned = plan(memory, checkpoint, "model")
    layer = next(m for m in checkpoint.clip.cond_stage_model.modules() if type(m).__name__ == "CLIPLayer")
    handle = layer.register_forward_pre_hook(out_of_memory)
    try:
        for clip in (planned.clip, planned.clip.clone()):  # as a LoRA or Set Last Layer behind the plan makes
            with pytest.raises(memory.out_of_memory.OutOfMemoryError, match="while text encoding with offload model"):
                encoded(node, clip)
    finally:
        handle.remove()
    broken = checkpoint.vae.first_stage_model.decoder.register_forward_pre_hook(out_of_memory)
    try:
        with pytest.raises(memory.out_of_memory.OutOfMemoryError, match=r"while decoding .*tile_size"):
            planned.vae.decode(torch.zeros(1, 4, 8, 8))
    finally:
        broken.remove()
    assert planned.vae.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 64, 64, 3)


def test_other_errors_pass_unchanged(memory):
    tiny = build("sd15")
    model = memory.plan.plan_memory(tiny.model, None, None, memory.plan.MemoryPlanConfig("model")).model

    def fail(*_):
        raise KeyError("not memory")

    handle = tiny.unet.middle_block[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyError, match="not memory"):
            tiny.sample(model)
    finally:
        handle.remove()


def test_sequential_and_a_compiled_model_are_refused_with_both_names(memory):
    tiny = build("sd15")
    compiled = importlib.import_module("comfy_api.torch_helpers").set_torch_compile_wrapper
    sequential = memory.plan.plan_memory(tiny.model, None, None, memory.plan.MemoryPlanConfig("sequential")).model
    with_core = sequential.clone()
    compiled(with_core, backend="eager")
    with pytest.raises(RuntimeError, match="sequential offload and compiled code"):
        tiny.sample(with_core)
    block = tiny.unet.middle_block[0]
    block.compile(backend="eager")
    try:
        with pytest.raises(RuntimeError, match="sequential offload and compiled code"):
            tiny.sample(sequential)
    finally:
        block._compiled_call_impl = None
    assert torch.isfinite(tiny.sample(sequential)).all()


def test_a_device_that_keeps_its_models_is_refused(memory):
    tiny = build("sd15")
    gpu = torch.device("cuda", 0)
    tiny.model.load_device = tiny.model.offload_device = gpu
    with pytest.raises(RuntimeError, match="--highvram or --gpu-only"):
        memory.plan._refuse_resident([tiny.model])


def test_the_record_names_the_plan(node, checkpoint):
    model = node("SpeedLabMemoryPlan").plan(checkpoint.model, "sequential", 3.5)["result"][0]
    cond = [[torch.zeros(1, 77, 768), {}]]
    result = node("SpeedLabProfileSampler").sample(model, 1, 2, 2.0, "euler", "normal", cond, cond, latent())["result"]
    assert result[1].request["accelerators"] == ["memory_plan(offload=sequential, budget_gb=3.5)"]


@pytest.mark.parametrize("layout", ["sd15", "sdxl", "refiner"])
@pytest.mark.parametrize(("side", "batch"), [(128, 1), (256, 1), (128, 3)])
def test_the_count_without_memory_is_that_of_a_real_forward(memory, engine, layout, side, batch):
    """Bytes of live tensors, counted during a real forward on the CPU, against the forward on `meta`."""
    live = engine("memory.predict")
    attention = importlib.import_module("comfy.ldm.modules.attention")
    tiny = build(layout)
    size, rows = memory.predict.ImageSize(side, side, batch), 2 * batch
    height, width = size.latent
    options = {"optimized_attention_override": lambda _function, *a, **k: attention.attention_pytorch(*a, **k)}
    adm = tiny.model.model.model_config.unet_config["adm_in_channels"]
    latent, context = torch.randn(rows, 4, height, width), torch.randn(rows, 77, 64)
    label = torch.randn(rows, adm) if adm else None
    measured = live.peak_bytes(
        lambda: tiny.unet(latent, torch.ones(rows), context=context, y=label, control=None, transformer_options=options)
    )
    predicted = memory.predict.unet_bytes(tiny.model.model, size, rows)
    held = latent.nbytes + context.nbytes + 6 * batch * 4 * height * width * 4
    assert predicted - held == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("side", "batch"), [(64, 1), (128, 2)])
def test_the_count_of_a_decode_is_that_of_a_real_one(memory, engine, checkpoint, side, batch):
    live = engine("memory.predict")
    stage = checkpoint.vae.first_stage_model
    latent = torch.randn(batch, 4, side // 8, side // 8, dtype=checkpoint.vae.vae_dtype)
    measured = live.peak_bytes(lambda: stage.decode(latent))
    predicted = memory.predict.decode_bytes(checkpoint.vae, memory.predict.ImageSize(side, side, batch))
    assert predicted == pytest.approx(measured, rel=0.1)


def test_live_bytes_are_counted_and_forgotten(engine):
    live = engine("memory.predict")
    with live.LiveBytes() as count:
        one = torch.ones(1000)
        two = one + 1
        one.add_(1)
        view = two.view(10, 100)
        assert (count.alive, count.peak) == (8000, 8000)
        del two
        assert count.alive == 8000, "a view keeps its memory"
        del view
        assert (count.alive, count.peak) == (4000, 8000)


def test_counting_a_model_that_streams_or_is_patched_in_use_changes_nothing(memory, engine):
    tiny = build("sd15")
    before = memory.predict.sampling_bytes(tiny.model, memory.predict.ImageSize(64, 64))
    streamed = memory.plan.plan_memory(tiny.model, None, None, memory.plan.MemoryPlanConfig("sequential")).model
    expected = tiny.sample(streamed)
    in_use = tiny.unet.middle_block[0].in_layers[2]
    in_use.weight_function = [lambda weight: weight.cpu()]
    try:
        assert memory.predict.sampling_bytes(tiny.model, memory.predict.ImageSize(64, 64)) == before
    finally:
        in_use.weight_function = []
    assert torch.equal(tiny.sample(streamed), expected)


def test_other_networks_are_predicted_by_comfyuis_own_estimate(memory):
    tiny = build("sd15")

    class Other(torch.nn.Module):
        pass

    model = tiny.model.clone()
    model.add_object_patch("diffusion_model", Other())
    size = memory.predict.ImageSize(64, 64, 2)
    expected = tiny.model.model.memory_required([4, 4, 8, 8])
    assert memory.predict.sampling_bytes(model, size) == int(expected)

"""Which VAEs `auto` tries in fp16, and how VAEs that the pack builds are built once more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

DEMO = "speedlab_demo_sd15.safetensors"


@pytest.fixture(scope="module")
def vae(core: Any, model_files: Any) -> Any:
    return core.CheckpointLoaderSimple().load_checkpoint(DEMO)[2]


@pytest.fixture
def precision(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on a GPU that is fast in fp16."""
    module = engine("vae.precision")
    monkeypatch.setattr(module, "abilities", lambda _device: module.Abilities(fp16=True, bf16=True))
    return module


def on_gpu(vae: Any, **changes: Any) -> Any:
    """Another VAE object that says so; it is asked for its type alone."""
    other = copy.copy(vae)
    other.device, other.patcher = torch.device("cuda"), vae.patcher.clone()
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def with_decoder(vae: Any, decoder: torch.nn.Module) -> torch.nn.Module:
    network = copy.copy(vae.first_stage_model)
    network._modules = {**network._modules, "decoder": decoder}
    return network


def test_auto_tries_fp16_on_image_vaes_of_sd_and_sdxl_alone(precision: Any, engine: Any, vae: Any, core: Any) -> None:
    from comfy.ldm.modules.temporal_ae import VideoDecoder

    source = engine("models.loading")
    assert precision.starting_dtype(on_gpu(vae), "auto") == torch.float16
    video = VideoDecoder(
        ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=32,
        z_channels=4, video_kernel_size=[3, 1, 1],
    )  # fmt: skip
    others = {
        "sixteen channels": on_gpu(vae, latent_channels=16),
        "another scale": on_gpu(vae, upscale_ratio=16),
        "frames": on_gpu(vae, latent_dim=3, upscale_ratio=(4, 8, 8)),
        "a video decoder": on_gpu(vae, first_stage_model=with_decoder(vae, video)),
        "a tiny VAE": on_gpu(core.VAELoader().load_vae("taesd")[0]),
    }
    flux = on_gpu(vae)
    flux.patcher.set_attachments(source.VAE_SOURCE, source.VaeSource(source.Path("a"), True, "Flux"))
    for what, other in {**others, "a checkpoint of another family": flux}.items():
        assert precision.starting_dtype(other, "auto") == other.vae_dtype != torch.float16, what
        assert precision.starting_dtype(other, "fp16") == torch.float16, "what somebody chose counts"


def test_a_safer_precision_is_one_that_works_for_the_vae(precision: Any, vae: Any) -> None:
    both = on_gpu(vae, working_dtypes=[torch.float16, torch.bfloat16, torch.float32])
    one = on_gpu(vae, working_dtypes=[torch.float16, torch.float32])
    assert precision.safer("fp16", precision.abilities_for(both)) == "bf16"
    assert precision.safer("fp16", precision.abilities_for(one)) == "fp32"


def test_how_many_fit_is_asked_of_the_patcher_where_it_knows(vae: Any, engine: Any) -> None:
    """Under dynamic VRAM it counts what ComfyUI could evict, which its other function does not."""
    latents = torch.zeros(3, 4, 8, 8)
    counted: list[int] = []
    needed = vae.memory_used_decode((1, 4, 8, 8), vae.vae_dtype)
    other = copy.copy(vae)
    other.patcher = vae.patcher.clone()
    hook = vae.first_stage_model.decoder.register_forward_pre_hook(lambda _m, inputs: counted.append(len(inputs[0])))
    attempts = engine("vae.attempts")
    try:
        for free, rows in ((1, [1, 1, 1]), (100 * 3 * needed, [3])):
            other.patcher.get_free_memory = lambda _device, free=free: free
            other.memory_used_decode = lambda _shape, _dtype: needed
            counted.clear()
            attempts.decode_fitting(other, latents, attempts.Way(False, 0, 64), str)
            assert counted == rows
    finally:
        hook.remove()


def test_vaes_that_the_pack_builds_say_how_they_are_built_again(
    vae: Any, engine: Any, node: Any, core: Any, model_files: Any
) -> None:
    from safetensors.torch import save_file

    loading = engine("models.loading")
    save_file({k: v.contiguous().clone() for k, v in vae.get_sd().items()}, model_files / "vae" / "own.safetensors")
    built = {
        "a file": node("SpeedLabVAELoader").load("own.safetensors", "bf16")[0],
        "a pair": node("SpeedLabVAELoader").load("taesd", "bf16")[0],
        "a checkpoint": node("SpeedLabCheckpointLoader").load(DEMO, "fp32", "contiguous")[2],
        "in another type": loading.vae_in(node("SpeedLabVAELoader").load("own.safetensors", "fp32")[0], torch.bfloat16),
    }
    for what, one in built.items():
        make, arguments = one.patcher.cached_patcher_init
        for options in ({}, {"disable_dynamic": True}):
            again = make(*arguments, **options)
            assert again.model is not one.first_stage_model, what
            before, after = one.first_stage_model.state_dict(), again.model.state_dict()
            assert before.keys() == after.keys(), what
            assert all(torch.equal(before[name], after[name]) for name in before), what
            assert {w.dtype for w in again.model.parameters()} == {one.vae_dtype}, what


def test_a_vae_of_another_loader_in_another_type_is_built_by_that_loader(vae: Any, engine: Any, core: Any) -> None:
    loading = engine("models.loading")
    loads: list[Any] = []

    def load(name: str) -> Any:
        loads.append(name)
        return (None, core.CheckpointLoaderSimple().load_checkpoint(DEMO)[2].patcher)

    known = copy.copy(vae)
    known.patcher = vae.patcher.clone()
    known.patcher.cached_patcher_init = (load, ("a file",), 1)
    other = loading.vae_in(known, torch.bfloat16)
    make, arguments = other.patcher.cached_patcher_init
    again = make(*arguments)
    assert loads == ["a file"]
    assert {w.dtype for w in again.model.parameters()} == {torch.bfloat16}


def test_a_vae_whose_settings_are_in_no_weight_is_not_built_from_weights(vae: Any, engine: Any) -> None:
    loading = engine("models.loading")
    other = copy.copy(vae)
    other.latent_channels = 16
    with pytest.raises(engine("common.errors").UnavailableError, match=r"AutoencoderKL.*Load VAE.*auto"):
        loading.vae_in(other, torch.bfloat16)

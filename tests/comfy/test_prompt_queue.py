"""Prompt Queue and Free Memory: what they hand on, and which models they unload."""

from __future__ import annotations

import importlib

import pytest

DEMO = "speedlab_demo_sd15.safetensors"


@pytest.fixture(scope="module")
def checkpoint(core, model_files):
    import torch

    with torch.inference_mode():
        return core.CheckpointLoaderSimple().load_checkpoint(DEMO)


@pytest.fixture
def mm(comfy):
    return importlib.import_module("comfy.model_management")


@pytest.fixture
def queue(node, checkpoint):
    def run(prompts, negative="", seeds="1"):
        return node("SpeedLabPromptQueue").encode(checkpoint[1], prompts, negative, seeds)

    return run


def same(a, b):
    import torch

    pooled = [x[0][1].get("pooled_output") for x in (a, b)]
    equal_pooled = pooled[0] is pooled[1] is None or torch.equal(*pooled)
    return torch.equal(a[0][0], b[0][0]) and equal_pooled


def test_each_prompt_is_encoded_as_alone(queue, core, checkpoint):
    positive, negative, seeds, count = queue("a tree\n\n  a house  \n", "blurry", "7\n8\n")
    encode = core.CLIPTextEncode().encode
    assert count == 2
    assert seeds == [7, 8]
    for cond, text in zip(positive, ("a tree", "a house"), strict=True):
        assert same(cond, encode(checkpoint[1], text)[0])
    assert all(same(cond, encode(checkpoint[1], "blurry")[0]) for cond in negative)


def test_a_blank_negative_is_zeroed_and_not_an_empty_text(queue, core, checkpoint):
    positive, negative, _, _ = queue("a tree\na house", " \n ")
    for cond, nothing in zip(positive, negative, strict=True):
        assert same(nothing, core.ConditioningZeroOut().zero_out(cond)[0])
        assert float(nothing[0][0].abs().max()) == 0.0
        assert float(cond[0][0].abs().max()) > 0.0, "the positive one stays as it was"
    assert not same(negative[0], core.CLIPTextEncode().encode(checkpoint[1], "")[0])


def test_one_seed_is_for_all_and_seeds_may_exceed_32_bits(queue):
    assert queue("a\nb\nc", seeds="5567822456")[2] == [5567822456] * 3
    assert queue("a", seeds=str(2**64 - 1))[2] == [2**64 - 1]
    assert queue("a\nb", seeds="\n 3 \n\n+4\n")[2] == [3, 4]


@pytest.mark.parametrize(
    ("prompts", "seeds", "says"),
    [
        ("", "1", "no prompts"),
        (" \n\n ", "1", "no prompts"),
        ("a\nb\nc", "1\n2", "3 prompts and 2 seeds"),
        ("a", "1\n2", "1 prompts and 2 seeds"),
        ("a", "", "no seed"),
        ("a\nb", "1\n\nx", "seeds, line 3: 'x' is not a whole number"),
        ("a", "1.5", "line 1: '1.5'"),
        ("a", "1, 2", "line 1: '1, 2'"),
        ("a", "-1", "line 1: -1 is out of range"),
        ("a", str(2**64), "out of range"),
        ("a", "9" * 5000, "not a whole number"),
    ],
)
def test_what_cannot_be_used_is_named(queue, engine, prompts, seeds, says):
    with pytest.raises(engine("common.errors").SpeedLabError, match=says):
        queue(prompts, seeds=seeds)


def test_no_text_encoder_is_an_error(node, engine):
    with pytest.raises(engine("common.errors").SpeedLabError, match="no text encoder"):
        node("SpeedLabPromptQueue").encode(None, "a", "", "1")


def test_cancel_stops_between_two_prompts(queue, mm, checkpoint):
    import torch

    done = []

    def interrupt(*_):
        done.append(1)
        mm.interrupt_current_processing()

    inner = next(m for m in checkpoint[1].cond_stage_model.modules() if isinstance(m, torch.nn.LayerNorm))
    hook = inner.register_forward_hook(interrupt)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            queue("a\nb\nc")
    finally:
        hook.remove()
        mm.interrupt_current_processing(False)
    assert len(done) < 3


@pytest.fixture
def loaded(mm, checkpoint):
    """UNet, text encoder and VAE all loaded; gives the set of kinds that are loaded now."""
    model, clip, vae = checkpoint[:3]
    mm.unload_all_models()
    mm.load_models_gpu([model, clip.patcher, vae.patcher])
    patchers = {"diffusion": model, "text_encoders": clip.patcher, "vae": vae.patcher}

    def kinds():
        present = mm.loaded_models()
        return {kind for kind, patcher in patchers.items() if any(patcher is other for other in present)}

    assert kinds() == set(patchers)
    yield kinds
    mm.unload_all_models()


@pytest.mark.parametrize("what", ["text_encoders", "diffusion", "vae"])
def test_only_the_kind_asked_for_is_unloaded(node, loaded, what):
    value = [object(), object()]
    out = node("SpeedLabFreeMemory").free(value, [what], [1])
    assert out["result"][0] is value, "the list passes through as it is"
    assert loaded() == {"diffusion", "text_encoders", "vae"} - {what}
    assert "Unloaded" in out["ui"]["text"][0]
    assert "stay in RAM" in out["ui"]["text"][0], "on a CPU it says so"
    assert "Nothing to free" in node("SpeedLabFreeMemory").free(value, [what])["ui"]["text"][0]


def test_all_unloads_everything(node, loaded, mm):
    node("SpeedLabFreeMemory").free([1], ["all"])
    assert loaded() == set()
    assert mm.current_loaded_models == []


def test_a_kind_that_does_not_exist_is_an_error(node, engine):
    with pytest.raises(engine("common.errors").SpeedLabError, match="choose one of text_encoders"):
        node("SpeedLabFreeMemory").free([1], ["unet"])


def test_freeing_takes_patched_weights_back_and_the_model_works_again(node, mm, tiny):
    """A patched model: the second copy of the weights goes, the original ones return, and the latent is the same."""
    import comfy.sample
    import torch

    model = tiny.model.clone()
    key = next(k for k in model.model.state_dict() if k.endswith("out.2.weight"))
    original = model.model.state_dict()[key].clone()
    model.add_patches({key: ("diff", (torch.ones_like(original),))})

    def sample():
        latent = tiny.latent()["samples"]
        noise = comfy.sample.prepare_noise(latent, 1)
        return comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "normal", tiny.cond(1), tiny.cond(2), latent, disable_pbar=True, seed=1
        )

    first = sample()
    assert model.backup
    assert not torch.equal(model.model.state_dict()[key], original)
    node("SpeedLabFreeMemory").free([first], ["diffusion"])
    assert not model.backup
    assert torch.equal(model.model.state_dict()[key], original)
    assert torch.equal(sample(), first)


def test_kinds_are_told_apart(engine, core, checkpoint, tiny, model_files, taesd_files):
    kind_of = engine("memory.free").kind_of
    model, clip, vae = checkpoint[:3]
    tiny_vae = core.VAELoader().load_vae("taesd")[0]
    found = [kind_of(patcher) for patcher in (model, clip.patcher, vae.patcher, tiny_vae.patcher, tiny.model)]
    assert found == ["diffusion", "text_encoders", "vae", "vae", "diffusion"]

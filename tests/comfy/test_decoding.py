"""VAE Decode and Tiny VAE Decode against core; non-finite images are noticed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

DEMO = "speedlab_demo_sd15.safetensors"


@pytest.fixture(scope="session")
def vae(core, model_files):
    import torch

    with torch.inference_mode():
        return core.CheckpointLoaderSimple().load_checkpoint(DEMO)[2]


def latent(batch=1, height=6, width=5, seed=0, channels=4):
    import torch

    return {"samples": torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def decode(node, vae):
    def run(samples, **changes):
        settings = {"slicing": False, "tile_size": 0, "overlap": 64, "precision": "auto", **changes}
        return node("SpeedLabVAEDecode").decode(samples, settings.pop("vae", vae), **settings)[0]

    return run


def test_plain_decode_is_cores(decode, core, vae):
    import torch

    samples = latent(2)
    assert torch.equal(decode(samples), core.VAEDecode().decode(vae, samples)[0])


def test_slicing_and_tiling(decode, core, vae):
    import torch

    samples = latent(3)
    assert torch.allclose(decode(samples, slicing=True), core.VAEDecode().decode(vae, samples)[0], atol=1e-5)
    small = latent(1, 8, 8)
    assert torch.equal(decode(small, tile_size=64), core.VAEDecode().decode(vae, small)[0]), "one tile is the image"


def test_another_precision_is_a_second_module(decode, vae, engine):
    import torch

    before = {key: value.clone() for key, value in vae.first_stage_model.state_dict().items()}
    images = decode(latent(), precision="bf16")
    assert torch.isfinite(images).all()
    assert vae.vae_dtype == torch.float32
    assert all(torch.equal(before[key], value) for key, value in vae.first_stage_model.state_dict().items())
    second = engine("vae.precision").sibling(vae, torch.bfloat16)
    assert second is engine("vae.precision").sibling(vae, torch.bfloat16), "built once"
    assert torch.allclose(images, decode(latent()), atol=0.1)


def test_a_picture_that_is_not_finite_is_decoded_again_in_fp32(node, engine, vae, caplog):
    import torch

    decoding = engine("vae.decode")
    half = engine("models.loading").vae_in(vae, torch.bfloat16)
    half.first_stage_model.post_quant_conv.weight.data.fill_(float("nan"))
    # The second module is built from these weights; give it sound ones, as a file would.
    engine("vae.precision")._siblings[half.first_stage_model] = {torch.float32: vae}
    samples = latent()
    decoded = decoding.decode(half, samples, decoding.DecodeConfig())
    assert torch.isfinite(decoded.images).all()
    assert decoded.info["precision"] == "fp32"
    assert caplog.text.count("NaN or Inf") == 1
    assert "decoded again in fp32" in decoded.info["warning"]
    again = decoding.decode(half, samples, decoding.DecodeConfig())
    assert "warning" not in again.info, "remembered: the second time starts in fp32"
    assert torch.equal(again.images, decoded.images)


def test_latents_that_are_not_finite_are_blamed_on_the_sampler(decode, caplog, node, taesd_files, model_files):
    samples = latent()
    samples["samples"][0, 0, 0, 0] = float("nan")
    decode(samples)
    assert "latents have NaN" in caplog.text


@pytest.mark.parametrize("size", [1, 8, 63])
def test_a_tile_that_is_too_small_is_refused(decode, engine, size):
    with pytest.raises(engine("common.errors").SpeedLabError, match="64 pixels or more"):
        decode(latent(), tile_size=size)


def test_infinite_latents_are_noticed_although_pixels_come_out_finite(tiny_decode, decode, caplog):
    samples = latent()
    samples["samples"] *= float("inf")
    tiny_decode(samples)
    assert caplog.text.count("latents have NaN or Inf") == 1
    decode(samples)
    assert caplog.text.count("latents have NaN or Inf") == 2


def test_the_record_learns_which_decoder_it_was(engine, core, model_files, taesd_files):
    decoding = engine("vae.decode")
    through_input = decoding.decode(core.VAELoader().load_vae("taesd")[0], latent(), decoding.DecodeConfig())
    assert through_input.info["decoder"] == "taesd"


def test_a_latent_of_another_family_or_an_empty_batch_is_refused(decode, engine, node):
    with pytest.raises(engine("common.errors").SpeedLabError, match="16 channels"):
        decode(latent(channels=16))
    with pytest.raises(engine("common.errors").SpeedLabError, match="empty"):
        decode(latent(0))
    with pytest.raises(engine("common.errors").SpeedLabError, match="no VAE"):
        node("SpeedLabVAEDecode").decode(latent(), None, False, 0, 64, "auto")


@pytest.fixture
def tiny_decode(node, model_files, taesd_files):
    def run(samples, decoder="taesd", slice_size=1, tile_size=0, model=None):
        return node("SpeedLabTinyVAEDecode").decode(samples, decoder, slice_size, tile_size, model)[0]

    return run


@pytest.mark.parametrize("name", ["taesd", "taesdxl"])
def test_tiny_decode_equals_cores(tiny_decode, core, name):

    samples = latent(2, 16, 12, seed=3)
    theirs = core.VAEDecode().decode(core.VAELoader().load_vae(name)[0], samples)[0]
    for ours in (tiny_decode(samples, name, 0), tiny_decode(samples, name, 1)):
        assert float((ours - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize(("height", "width", "tile"), [(40, 56, 128), (33, 70, 192), (64, 24, 64)])
def test_tiles_have_no_seam(tiny_decode, height, width, tile):
    samples = latent(1, height, width, seed=4)
    assert float((tiny_decode(samples, tile_size=tile) - tiny_decode(samples)).abs().max()) <= 1e-5


def marked(engine, name, samples):
    """The LATENT as a sampler of this pack would have left it after a model of that latent format."""

    class Model:
        def get_model_object(self, _name):
            return type(name, (), {})()

    return engine("models.latent_mark").marked(samples, Model(), "20260102-030405-0123abcd")


def test_auto_takes_the_family_from_the_model_or_the_mark(tiny_decode, tiny, engine, caplog):
    import torch

    samples = latent(1, 8, 8, seed=5)
    expected = tiny_decode(samples, "taesd")
    assert torch.equal(tiny_decode(samples, "auto", model=tiny.model), expected)
    assert torch.equal(tiny_decode(marked(engine, "SD15", samples), "auto"), expected)
    sdxl = tiny_decode(marked(engine, "SDXL", samples), "auto")
    assert torch.equal(sdxl, tiny_decode(samples, "taesdxl"))
    assert not torch.equal(sdxl, expected)
    caplog.clear()
    by_hand = tiny_decode(marked(engine, "SDXL", samples), "taesd")
    assert torch.equal(by_hand, expected), "what somebody picks is what decodes"
    assert "made by an SDXL model and the decoder 'taesd'" in caplog.text
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"cannot tell an SD 1\.x latent from an SDXL one"):
        tiny_decode(samples, "auto")
    unknown = [marked(engine, "Nonsense", samples), marked(engine, "torch", samples)]
    for given in (*unknown, *({**samples, "speedlab": mark} for mark in ({"latent_format": "SD15"}, "text", None))):
        with pytest.raises(engine("common.errors").SpeedLabError, match="cannot tell"):
            tiny_decode(given, "auto")


# What core's nodes do to a LATENT between the sampler and the decoder, and whether the images are still the same.
BETWEEN = {
    "nothing": (lambda core, latent: latent, True),
    "one of the batch": (lambda core, latent: core.LatentFromBatch().frombatch(latent, 1, 1)[0], True),
    "repeated": (lambda core, latent: core.RepeatLatentBatch().repeat(latent, 2)[0], True),
    "upscaled": (lambda core, latent: core.LatentUpscaleBy().upscale(latent, "bilinear", 2.0)[0], False),
    "flipped": (lambda core, latent: core.LatentFlip().flip(latent, "x-axis: vertically")[0], False),
    "cropped": (lambda core, latent: core.LatentCrop().crop(latent, 32, 32, 0, 0)[0], False),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_mark_is_good_for_the_pictures_it_was_made_for_alone(tiny_decode, engine, core, between):
    import torch

    change, same = BETWEEN[between]
    given = change(core, marked(engine, "SDXL", latent(2, 8, 8, seed=6)))
    assert "speedlab" in given, "core's nodes hand on what they do not know"
    if same:
        assert torch.equal(tiny_decode(given, "auto"), tiny_decode(given, "taesdxl"))
        return
    assert engine("models.latent_mark").mark_of(given) is None
    with pytest.raises(engine("common.errors").SpeedLabError, match="cannot tell"):
        tiny_decode(given, "auto")


def test_a_batch_of_two_models_is_of_neither(tiny_decode, engine):
    import torch

    first, second = marked(engine, "SD15", latent(seed=7)), marked(engine, "SDXL", latent(seed=8))
    both = {**first, "samples": torch.cat([first["samples"], second["samples"]])}
    assert engine("models.latent_mark").mark_of(both) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_mark_reads_latents_of_every_type(engine, dtype):
    import torch

    given = latent(2)
    given["samples"] = given["samples"].to(getattr(torch, dtype)).transpose(2, 3)
    mark = engine("models.latent_mark").mark_of(marked(engine, "SD15", given))
    assert (mark.latent_format, mark.run_id) == ("SD15", "20260102-030405-0123abcd")


def test_a_mark_does_not_outlive_its_sampler(tiny_decode, node, core, tiny, vae, engine):
    """A Profile Sampler, then a core sampler: the first one's mark says nothing of the second one's latent."""
    import torch

    cond = tiny.cond(1)
    first = node("SpeedLabProfileSampler").sample(tiny.model, 1, 1, 1.0, "euler", "normal", cond, cond, tiny.latent())[
        "result"
    ][0]
    assert engine("models.latent_mark").mark_of(first).latent_format == "SD15"
    # The first model's mark, as that of another family, which the second sampler knows nothing of.
    first = {**first, "speedlab": {**first["speedlab"], "latent_format": "SDXL"}}
    second = core.KSampler().sample(tiny.model, 2, 1, 1.0, "euler", "normal", cond, cond, first)[0]
    assert second["speedlab"]["latent_format"] == "SDXL", "core hands the mark on"
    source = engine("models.loading").VaeSource(Path("sd15.safetensors"), in_checkpoint=True, latent_format="SD15")
    other = copy.copy(vae)
    other.patcher = vae.patcher.clone()
    other.patcher.set_attachments(engine("models.loading").VAE_SOURCE, source)
    decoding = engine("vae.decode")
    assert torch.isfinite(decoding.decode(other, second, decoding.DecodeConfig()).images).all()
    assert torch.equal(tiny_decode(second, "taesd"), tiny_decode({"samples": second["samples"]}, "taesd"))
    assert torch.equal(tiny_decode(second, "auto", model=tiny.model), tiny_decode(second, "taesd"))
    with pytest.raises(engine("common.errors").SpeedLabError, match="cannot tell"):
        tiny_decode(second, "auto")


def test_a_decoder_that_is_not_installed_names_the_file(tiny_decode, engine):
    with pytest.raises(engine("common.errors").ModelFileError, match=r"taesd3_decoder\.safetensors"):
        tiny_decode(latent(), "taesd3")


def test_a_broken_decoder_is_named(engine, node, model_files, taesd_files):
    path = model_files / "vae_approx" / "broken_decoder.safetensors"
    path.write_bytes((taesd_files / "taesd_decoder.safetensors").read_bytes()[:5000])
    try:
        with pytest.raises(engine("common.errors").ModelFileError, match="truncated"):
            node("SpeedLabTinyVAEDecode").decode(marked(engine, "SD15", latent()), "broken", 1, 0)
    finally:
        path.unlink()


def test_its_memory_estimate_is_its_own(engine, tiny_decode, core):
    import torch

    tiny_vae = engine("vae.taesd")
    ours = tiny_vae.load_tiny_vae("taesdxl").memory_used_decode((1, 4, 128, 128), torch.bfloat16)
    theirs = core.VAELoader().load_vae("taesdxl")[0].memory_used_decode((1, 4, 128, 128), torch.bfloat16)
    assert 0.3e9 < ours < 0.9e9
    assert ours < theirs / 5


def test_the_choices_always_list_both_families(node, engine, model_files):
    inputs = type(node("SpeedLabTinyVAEDecode")).INPUT_TYPES()
    assert inputs["required"]["decoder"][0][:3] == ["auto", "taesd", "taesdxl"]


def test_the_example_picture_survives_a_round_trip(core, tiny_decode, node, comfy, real_taesd):
    """ComfyUI's example image at 512x512 through TAESDXL: 31.5 dB and more."""
    import numpy
    import torch
    from PIL import Image

    path = Path(comfy.sd.__file__).parents[1] / "input" / "example.png"
    pixels = Image.open(path).convert("RGB").resize((512, 512), Image.Resampling.LANCZOS)
    image = torch.from_numpy(numpy.asarray(pixels).astype(numpy.float32) / 255.0)[None]
    encoded = {"samples": core.VAELoader().load_vae("taesdxl")[0].encode(image)}
    result = node("SpeedLabCompareImages").compare(tiny_decode(encoded, "taesdxl"), image)["result"]
    assert result[0] >= 31.5
    assert result[1] > 0.8


def test_inputs_are_not_changed(tiny_decode, decode):
    import torch

    samples = latent(2)
    before = copy.deepcopy(samples)
    tiny_decode(samples)
    decode(samples, slicing=True)
    assert samples.keys() == before.keys()
    assert torch.equal(samples["samples"], before["samples"])


@pytest.mark.parametrize(("able", "words"), [(False, "this CPU has no instructions"), (True, "")])
def test_fp16_on_a_processor_that_cannot_is_told(node, engine, model_files, taesd_files, monkeypatch, able, words):
    monkeypatch.setattr(engine("common.dtypes"), "cpu_computes_fp16", lambda: able)
    decoding, vae = engine("vae.decode"), node("SpeedLabVAELoader").load("taesd", "fp16")[0]
    told = decoding.decode(vae, latent(), decoding.DecodeConfig()).info.get("warning", "")
    assert words in told and bool(words) == bool(told)
    assert "warning" not in decoding.decode(vae, latent(), decoding.DecodeConfig(precision="fp32")).info

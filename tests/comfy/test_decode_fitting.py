"""VAE Decode: seams, out of memory, precisions, and latents that do not belong to the VAE."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from pathlib import Path

import pytest

DEMO = "speedlab_demo_sd15.safetensors"


@pytest.fixture(scope="session")
def vae(core, model_files):
    import torch

    with torch.inference_mode():
        loaded = core.CheckpointLoaderSimple().load_checkpoint(DEMO)[2]
    loaded.first_stage_model.decoder.num_res_blocks = 0  # one block a level, in half the time
    return loaded


@pytest.fixture(scope="session")
def taesd(core, model_files, taesd_files):
    return core.VAELoader().load_vae("taesd")[0]


@pytest.fixture
def decoding(engine):
    return engine("vae.decode")


def latent(batch=1, height=8, width=8, seed=0, channels=4):
    import torch

    return {"samples": torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))}


@contextmanager
def memory_for(vae, latent_pixels, error=None):
    """Let the decoder run out of memory for any input of more than so many latent pixels, images counted."""
    import torch

    seen = []

    def check(_module, inputs):
        count = inputs[0].shape[0] * inputs[0].shape[2] * inputs[0].shape[3]
        seen.append(tuple(inputs[0].shape))
        if count > latent_pixels:
            raise error or torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")

    inner = vae.first_stage_model
    handle = getattr(inner, "decoder", None) or inner.taesd_decoder
    hook = handle.register_forward_pre_hook(check)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture
def photograph(comfy, core, real_taesd):
    """TAESD, and its latent of ComfyUI's example image at 256x256: sky and landscape, smooth over large areas."""
    import numpy
    import torch
    from PIL import Image

    path = Path(inspect.getfile(comfy.sd)).parents[1] / "input" / "example.png"
    pixels = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    image = torch.from_numpy(numpy.asarray(pixels).astype(numpy.float32) / 255.0)[None]
    with torch.inference_mode():
        taesd = core.VAELoader().load_vae("taesd")[0]
        return taesd, {"samples": taesd.encode(image)}


def test_no_seam_can_be_seen(decoding, engine, photograph):
    """The gradient across the places where tiles meet is what it is elsewhere, as in the image decoded whole."""
    import torch

    taesd, encoded = photograph
    whole = decoding.decode(taesd, encoded, decoding.DecodeConfig()).images
    tiled = decoding.decode(taesd, encoded, decoding.DecodeConfig(tile_size=128, overlap=32)).images
    rows = engine("vae.attempts").spans(32, 16, 4)
    edges = sorted({8 * edge for span in rows for edge in span} - {0, 256})
    assert len(rows) == 3

    def steps(images):
        """Mean absolute step between neighbouring pixel rows and columns, [255] each."""
        grey = images[0].mean(-1)
        return grey.diff(dim=0).abs().mean(1), grey.diff(dim=1).abs().mean(0)

    for ours, plain in zip(steps(tiled), steps(whole), strict=True):
        at_seams = torch.stack([ours[edge - 1] / plain[edge - 1] for edge in edges])
        assert at_seams.min() > 0.8
        assert at_seams.max() < 1.2, "a seam adds no gradient that the image does not have there"
    difference = (tiled - whole).abs()
    assert float(difference.mean()) < 0.01
    hard = decoding.decode(taesd, encoded, decoding.DecodeConfig(tile_size=128, overlap=0)).images
    step_hard, step_plain = steps(hard)[0], steps(whole)[0]
    assert max(step_hard[edge - 1] / step_plain[edge - 1] for edge in (128,)) > 1.2, "without overlap a seam shows"


def test_tiles_of_the_full_vae_have_smooth_borders(decoding, engine, vae):
    """Group norms see a tile instead of the image, so that tones differ from tile to tile: they must glide."""
    import torch

    y = torch.linspace(-1, 1, 16)
    smooth = {
        "samples": (3 * torch.stack([y[:, None] * y, y[:, None] + 0 * y, 0 * y[:, None] + y, -y[:, None] * y]))[None]
    }
    whole = decoding.decode(vae, smooth, decoding.DecodeConfig()).images
    tiled = decoding.decode(vae, smooth, decoding.DecodeConfig(tile_size=64, overlap=64)).images
    extra = (tiled - whole)[0].mean(-1)
    steps = extra.diff(dim=0).abs().mean(1)
    edges = sorted({8 * edge for span in engine("vae.attempts").spans(16, 8, 2) for edge in span} - {0, 128})
    at_seams = torch.stack([steps[edge - 1] for edge in edges]).mean()
    assert at_seams < 1.5 * steps.mean(), "what tiling changes does not change faster at the seams"


def test_out_of_memory_goes_from_all_to_one_to_tiles(decoding, vae, caplog):
    import torch

    samples = latent(2, 12, 8)
    expected = decoding.decode(vae, samples, decoding.DecodeConfig(slicing=True)).images
    with memory_for(vae, 12 * 8) as seen:
        sliced = decoding.decode(vae, samples, decoding.DecodeConfig())
    assert torch.equal(sliced.images, expected)
    assert sliced.info["slicing"] is True
    assert [shape[0] for shape in seen] == [2, 1, 1]
    with memory_for(vae, 8 * 8):
        tiled = decoding.decode(vae, samples, decoding.DecodeConfig())
    assert tiled.info["tile_size"] == 64
    assert tiled.images.shape == expected.shape
    warning = tiled.info["warning"]
    assert "Decoding whole ran out of memory; decoding again one image at a time." in warning
    assert "decoding again in tiles of 64 pixels." in warning
    assert caplog.text.count("ran out of memory") == 3
    wanted = decoding.decode(vae, samples, decoding.DecodeConfig(tile_size=64)).images
    assert torch.equal(tiled.images, wanted), "as if the user had chosen these tiles"
    assert "warning" not in decoding.decode(vae, samples, decoding.DecodeConfig()).info, "nothing stays behind"


def test_when_nothing_fits_the_error_says_what_to_do(decoding, engine, vae):
    with (
        memory_for(vae, 0),
        pytest.raises(
            engine("common.errors").SpeedLabError, match=r"ran out of memory even in tiles of 64.*Free Memory"
        ),
    ):
        decoding.decode(vae, latent(1, 16, 16), decoding.DecodeConfig())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_a_cpu_runs_out_of_memory_in_words_of_its_own(decoding, vae, error):
    with memory_for(vae, 12 * 8, error):
        assert decoding.decode(vae, latent(2, 12, 8), decoding.DecodeConfig()).info["slicing"] is True


def test_other_errors_are_not_taken_for_a_lack_of_memory(decoding, vae):
    with memory_for(vae, 0, RuntimeError("a broken kernel")), pytest.raises(RuntimeError, match="broken kernel"):
        decoding.decode(vae, latent(), decoding.DecodeConfig())


def test_tiles_get_smaller_and_end(engine):
    attempts = engine("vae.attempts")
    samples = latent(3, 96, 64)["samples"]
    way, seen = attempts.Way(False, 0, 64), []
    while (following := attempts.smaller_way(way, samples)) is not None:
        way = following
        seen.append((way.slicing, way.tile_size))
    assert seen == [(True, 0), (True, 384), (True, 192), (True, 64)]
    assert attempts.smaller_way(attempts.Way(False, 4096, 64), samples).tile_size == 384


def test_cancel_between_pictures_leaves_nothing(decoding, vae, comfy):
    import importlib

    mm = importlib.import_module("comfy.model_management")

    def interrupt(_module, _inputs):
        mm.interrupt_current_processing()

    hook = vae.first_stage_model.decoder.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            decoding.decode(vae, latent(3), decoding.DecodeConfig(slicing=True))
    finally:
        hook.remove()
        mm.interrupt_current_processing(False)
    assert decoding.decode(vae, latent(), decoding.DecodeConfig()).images.shape == (1, 64, 64, 3)


@pytest.mark.full
def test_fp16_that_overflows_ends_in_a_safer_precision_and_is_remembered(decoding, engine, vae):
    """Weights as SDXL's own VAE has them: activations beyond fp16's range, fine in bf16 and fp32."""
    import comfy.sd
    import torch

    weights = {key: value.clone() for key, value in vae.get_sd().items()}
    weights["decoder.conv_in.weight"] *= 1e6
    weights["decoder.conv_in.bias"] *= 1e6
    large = comfy.sd.VAE(sd=weights, dtype=torch.float32)
    # fp16 is slow on a CPU: an image of 32x32.
    first = decoding.decode(large, latent(height=4, width=4), decoding.DecodeConfig(precision="fp16"))
    assert torch.isfinite(first.images).all()
    assert first.info["precision"] in ("bf16", "fp32")
    assert "NaN or Inf in fp16" in first.info["warning"]
    assert first.info["second_modules_gb"] >= 0.09
    precision = engine("vae.precision")
    assert "fp16" in precision._not_finite_in[large.first_stage_model]
    assert large.vae_dtype == torch.float32
    assert next(large.first_stage_model.parameters()).dtype == torch.float32


def test_latents_out_of_range_are_not_held_against_a_precision(decoding, engine, vae):
    import comfy.sd
    import torch

    half = comfy.sd.VAE(sd=vae.get_sd(), dtype=torch.bfloat16)
    absurd = {"samples": torch.full((1, 4, 8, 8), 3e38)}
    assert "out of its range" in decoding.decode(half, absurd, decoding.DecodeConfig()).info["warning"]
    assert decoding.decode(half, latent(), decoding.DecodeConfig()).info["precision"] == "bf16"
    assert half.first_stage_model not in engine("vae.precision")._not_finite_in


def test_pictures_on_a_vae_for_videos_are_refused(decoding, engine, vae):
    import copy

    video = copy.copy(vae)
    video.latent_dim = 3
    with pytest.raises(engine("common.errors").SpeedLabError, match="this VAE decodes videos"):
        decoding.decode(video, latent(), decoding.DecodeConfig())


def test_auto_on_a_cpu_keeps_what_was_loaded_and_says_so(decoding, vae):
    info = decoding.decode(vae, latent(), decoding.DecodeConfig()).info
    assert (info["precision"], info["precision_asked"]) == ("fp32", "auto")


def test_a_precision_chosen_in_the_loader_is_marked(engine, node, model_files):
    loading = engine("models.loading")
    auto, chosen = (node("SpeedLabCheckpointLoader").load(DEMO, name, "contiguous")[2] for name in ("auto", "fp32"))
    assert auto.patcher.get_attachment(loading.FIXED_PRECISION) is None
    assert chosen.patcher.get_attachment(loading.FIXED_PRECISION) == "fp32"


def test_latents_of_another_family_are_refused_where_both_are_known(decoding, engine, node, model_files):
    loaded = node("SpeedLabCheckpointLoader").load(DEMO, "auto", "contiguous")[2]
    decode = decoding.decode
    of_sdxl = marked(engine, "SDXL", latent())
    with pytest.raises(
        engine("common.errors").SpeedLabError, match=r"made by an SDXL model.*SD 1\.x or 2\.x checkpoint"
    ):
        decode(loaded, of_sdxl, decoding.DecodeConfig())
    changed = {**of_sdxl, "samples": of_sdxl["samples"] * 1.01}
    unbound = {**latent(), "speedlab": {"latent_format": "SDXL"}}
    others = [{**latent(), "speedlab": mark} for mark in ({}, None, "text")]
    for given in (marked(engine, "SD15", latent()), marked(engine, "Other", latent()), changed, unbound, *others):
        assert decode(loaded, given, decoding.DecodeConfig()).images.shape[0] == 1


def marked(engine, name, samples):
    """The LATENT as a sampler of this pack would have left it after a model of that latent format."""

    class Model:
        def get_model_object(self, _name):
            return type(name, (), {})()

    return engine("models.latent_mark").marked(samples, Model(), "20260102-030405-0123abcd")


def test_a_batch_of_mixed_sizes_is_refused(decoding, engine, vae, node, taesd_files, model_files):
    import importlib

    nested = importlib.import_module("comfy.nested_tensor").NestedTensor
    mixed = {"samples": nested([latent()["samples"], latent(1, 4, 4)["samples"]])}
    for samples in (mixed, {"samples": [latent()["samples"], latent(1, 4, 4)["samples"]]}):
        with pytest.raises(engine("common.errors").SpeedLabError, match="mixes latents of different sizes"):
            decoding.decode(vae, samples, decoding.DecodeConfig())
        with pytest.raises(engine("common.errors").SpeedLabError, match="mixes latents"):
            node("SpeedLabTinyVAEDecode").decode(samples, "taesd", 1, 0)
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"shape \(4, 8, 8\)"):
        decoding.decode(vae, {"samples": latent()["samples"][0]}, decoding.DecodeConfig())


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 40, 100])
def test_bands_of_any_height_give_the_whole_decoder(engine, taesd, rows):
    import torch

    stream = engine("vae.taesd")
    decoder = taesd.first_stage_model.taesd_decoder
    latents = latent(2, 40, 5, seed=6)["samples"]
    parts = list(stream.decode_rows(decoder, latents, rows, lambda: None))
    assert stream.can_stream(decoder)
    assert torch.allclose(torch.cat(parts, dim=2), decoder(latents), atol=2e-5)


def test_bands_hold_a_bands_memory_whatever_the_height(engine, taesd):
    """Largest tensor that any layer gives, counted: a band's, also when the last one brings what was held back."""
    stream = engine("vae.taesd")
    decoder = taesd.first_stage_model.taesd_decoder

    def largest(height):
        seen = []
        hooks = [m.register_forward_hook(lambda _m, _i, out: seen.append(out.numel())) for m in decoder.modules()]
        try:
            for _ in stream.decode_rows(decoder, latent(1, height, 4)["samples"], 4, lambda: None):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return max(seen)

    kept_rows, channels, width = 2, 64, 4 * 8
    assert largest(96) == largest(24) <= channels * width * (4 * 8 + kept_rows)


def test_a_tiny_decoder_out_of_memory_takes_smaller_bands(engine, node, taesd_files, model_files, caplog):
    import torch

    tiny_vae = engine("vae.taesd")
    samples = latent(2, 32, 32, seed=8)
    config = tiny_vae.TinyDecodeConfig("taesd", slice_size=2)
    whole = tiny_vae.decode_tiny(samples, config)
    vae = tiny_vae.load_tiny_vae("taesd")
    raised = []

    def check(_module, inputs):
        if inputs[0].shape[0] > 1:
            raised.append(1)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = vae.first_stage_model.taesd_decoder[1].register_forward_pre_hook(check)
    try:
        again = tiny_vae.decode_tiny(samples, config)
    finally:
        hook.remove()
    assert raised
    assert again.info["slice_size"] == 1
    assert "ran out of memory" in again.info["warning"]
    assert torch.allclose(again.images, whole.images, atol=1e-5)


def test_a_tiny_decoder_of_another_build_decodes_whole_and_says_so(engine, taesd):
    import torch

    stream = engine("vae.taesd")
    changed = torch.nn.Sequential(*taesd.first_stage_model.taesd_decoder, torch.nn.GroupNorm(1, 3))
    assert not stream.can_stream(changed)
    with pytest.raises(stream.UnknownLayerError, match="GroupNorm"):
        next(stream.decode_rows(changed, latent()["samples"], 4, lambda: None))
    tiny_vae = engine("vae.taesd")
    expected = tiny_vae.decode_tiny(latent(3), tiny_vae.TinyDecodeConfig("taesd")).images
    vae = tiny_vae.load_tiny_vae("taesd")
    # The same decoder wrapped in a way that cannot run in bands.
    plain = vae.first_stage_model.taesd_decoder
    vae.first_stage_model.taesd_decoder = torch.nn.Sequential(torch.nn.Sequential(*plain))
    try:
        decoded = tiny_vae.decode_tiny(latent(3), tiny_vae.TinyDecodeConfig("taesd"))
    finally:
        vae.first_stage_model.taesd_decoder = plain
    assert "cannot run in bands" in decoded.info["warning"]
    assert torch.allclose(decoded.images, expected, atol=1e-5)

"""The model that draws in the real ComfyUI: its checkpoint is known, whole, and computes what was trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from speedlab.measure.drawn import world
from speedlab_tools.synthetic.drawn import latents, packed
from speedlab_tools.synthetic.train import autoencoder, data, examine
from speedlab_tools.synthetic.train.net import UNet


@pytest.fixture(scope="module")
def untrained(comfy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict, dict]]:
    """A packed file of weights before their training, moved a little, with what it holds."""
    net = UNet()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name == "out.2.weight":
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    tensors = packed.pack(net.state_dict(), autoencoder.decoder().state_dict())
    file = tmp_path_factory.mktemp("drawn") / "factors.safetensors"
    packed.save_packed(file, tensors, step=0, side=64)
    yield file, *packed.unpack(tensors)
    comfy.model_management.unload_all_models()


def test_the_checkpoint_loads_whole_samples_and_computes_what_was_trained(
    comfy: ModuleType,
    core: ModuleType,
    untrained: tuple[Path, dict, dict],
    model_files: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file, factors, decoder = untrained
    paths = packed.write_drawn(file.parent / "models", file)
    written = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in packed.write_drawn(file.parent / "models", file)] == written
    linked = model_files / "checkpoints" / "drawn.safetensors"
    linked.symlink_to(paths[0])
    try:
        with caplog.at_level(logging.DEBUG):
            model, clip, vae = core.CheckpointLoaderSimple().load_checkpoint(linked.name)
    finally:
        linked.unlink()
    assert type(model.model.model_config).__name__ == "SD15"
    assert model.model.model_type == comfy.model_base.ModelType.EPS
    assert not [r.getMessage() for r in caplog.records if "unet missing" in r.getMessage().lower()]

    texts = ["a big red circle on the left, blue background", ""]
    positive, negative = (core.CLIPTextEncode().encode(clip, text)[0] for text in texts)
    assert positive[0][0].shape == (1, data.TOKENS, data.WIDTH)
    unet = model.model.diffusion_model.float()
    net = UNet()
    net.load_state_dict(factors)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    t, context = torch.tensor([801.0, 40.0]), torch.cat([positive[0][0], negative[0][0]]).float()
    expected = net(x, t, context)
    torch.testing.assert_close(unet(x, t, context=context), expected, rtol=0.02, atol=0.02)
    assert (expected - x).std() > 0.05

    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    sampled = core.KSampler().sample(model, 0, 3, 3.0, "dpmpp_2m", "karras", positive, negative, latent)[0]
    assert torch.isfinite(sampled["samples"]).all()
    picture = core.VAEDecode().decode(vae, sampled)[0]
    assert picture.shape == (1, 64, 64, 3)

    # The examination samples many captions in a batch: each as if it were alone.
    two = examine.sample(model, clip, vae, texts, 5, 64, 3.0, steps=3)
    assert [each.shape for each in two] == [(64, 64, 3)] * 2
    alone = examine.sample(model, clip, vae, texts[:1], 5, 64, 3.0, steps=3)[0]
    assert np.abs(two[0].astype(int) - alone.astype(int)).mean() < 3.0
    assert np.abs(two[0].astype(int) - two[1].astype(int)).mean() > 3.0

    rng = world.generator(3)
    drawn = world.draw(world.random_scene(rng), rng, 64)
    encoded = vae.encode(torch.tensor(drawn[None]).float() / 255.0)
    exact = torch.from_numpy(latents.encode(drawn[None]))
    scaled = model.model.process_latent_in(encoded)
    torch.testing.assert_close(scaled, exact, rtol=0.02, atol=0.05)
    own = autoencoder.decoder()
    own.load_state_dict(decoder)
    shown = own(exact)[0].permute(1, 2, 0).clamp(0, 1)
    torch.testing.assert_close(vae.decode(encoded)[0], shown, rtol=0.0, atol=0.03)
    # Its Tiny VAE is its own decoder, under the name that latents of SD 1.x ask for.
    assert [path.name for path in paths[1:]] == ["taesd_encoder.safetensors", "taesd_decoder.safetensors"]
    tiny = comfy.utils.load_torch_file(str(paths[2]))
    assert tiny.keys() == vae.first_stage_model.taesd_decoder.state_dict().keys()
    assert all(
        torch.equal(tiny[name].float(), tensor.float())
        for name, tensor in vae.first_stage_model.taesd_decoder.state_dict().items()
    )


def test_every_word_of_the_grammar_is_one_token(comfy: ModuleType, parts: Any) -> None:
    clip = parts[1]
    words: set[str] = set()
    for number in range(400):
        rng = world.generator(7, number)
        words |= set(world.caption(world.random_scene(rng), rng).replace(",", " ").split())
    assert {"cross", "shapes", "sunset", "background", "purple", "sail"} <= words
    for word in words:
        start, token, end = (token for token, _ in clip.tokenize(word)["l"][0][:3])
        assert token not in (start, end)
        assert end == clip.tokenize("")["l"][0][1][0], word


def test_the_stored_captions_are_what_comfyui_gives(comfy: ModuleType, parts: Any) -> None:
    """A batch of captions is encoded as sections of one prompt: each must be what it is alone."""
    clip = parts[1]
    texts = ["", "a small green star on the top, white background", "a tree on the left on the snow"]
    sections = [section for text in texts for section in clip.tokenize(text)["l"]]
    together = clip.encode_from_tokens({"l": sections}).reshape(-1, data.TOKENS, data.WIDTH)
    for text, row in zip(texts, together, strict=True):
        alone = clip.encode_from_tokens(clip.tokenize(text))[0]
        torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-3)
    assert math.isclose(float(np.abs(together.numpy()).mean()), 0.8, abs_tol=0.3)

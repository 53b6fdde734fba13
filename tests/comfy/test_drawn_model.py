"""The model that draws in the real ComfyUI: its checkpoint is known, whole, and computes what was trained."""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from speedlab.measure.drawn import examiner, world
from speedlab_tools.synthetic.drawn import factors, latents, packed
from speedlab_tools.synthetic.drawn.factors import SD15, SDXL
from speedlab_tools.synthetic.train import autoencoder, captions, data, examine
from speedlab_tools.synthetic.train.net import UNet, embed_whole


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
    file, weights, decoder = untrained
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
    assert positive[0][0].shape == (1, data.TOKENS, 768)
    unet = model.model.diffusion_model.float()
    net = UNet()
    net.load_state_dict(weights)
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
    assert [path.name for path in paths[1:3]] == ["taesd_encoder.safetensors", "taesd_decoder.safetensors"]
    tiny = comfy.utils.load_torch_file(str(paths[2]))
    assert tiny.keys() == vae.first_stage_model.taesd_decoder.state_dict().keys()
    assert all(
        torch.equal(tiny[name].float(), tensor.float())
        for name, tensor in vae.first_stage_model.taesd_decoder.state_dict().items()
    )
    alone = importlib.import_module("comfy.sd").VAE(sd=comfy.utils.load_torch_file(str(paths[3])))
    assert torch.equal(alone.decode(encoded), vae.decode(encoded))


def test_comfyui_knows_the_second_model_for_vega_and_computes_what_was_trained(comfy: ModuleType) -> None:
    net = UNet(0, SDXL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    weights = {f"model.diffusion_model.{n}": tensor for n, tensor in factors.merged(net.state_dict(), SDXL).items()}
    config = importlib.import_module("comfy.model_detection").model_config_from_unet(weights, "model.diffusion_model.")
    assert type(config).__name__ == "Segmind_Vega"
    patcher = importlib.import_module("comfy.sd").load_diffusion_model_state_dict(dict(weights))
    model = patcher.model
    assert model.model_type == comfy.model_base.ModelType.EPS and model.latent_format.scale_factor == SDXL.latent_scale

    x, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([801.0, 40.0])
    context, pooled = torch.randn(2, 77, 2048, generator=generator), torch.randn(2, 1280, generator=generator)
    sizes = {"height": 512, "width": 256, "target_height": 640, "target_width": 384}
    told = torch.tensor([[512, 256, 0, 0, 640, 384]]).float()
    for given, expected in ((sizes, told), ({}, torch.tensor([data.SIZES]).float())):
        whole = model.encode_adm(device="cpu", pooled_output=pooled, **given)
        torch.testing.assert_close(embed_whole(pooled, expected.expand(2, -1)), whole, rtol=0, atol=1e-4)
    unet = model.diffusion_model.float()
    found = net(x, t, context, whole)
    torch.testing.assert_close(unet(x, t, context=context, y=whole), found, rtol=2e-3, atol=2e-3)
    assert (found - x).std() > 0.05
    assert (found - net(x, t, context.flip(0), whole)).std() > 0.01


@pytest.mark.full
def test_the_captions_of_the_second_model_are_what_comfyui_gives(
    comfy: ModuleType, tmp_path: Path, small_checkpoint: Callable[[str], Path]
) -> None:
    file = small_checkpoint("vega")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo_vega.safetensors").symlink_to(file)
    encode = captions.encoder(tmp_path, SDXL)
    texts = ["", "a small green star on the top, white background"]
    rows = encode(texts)
    clip = importlib.import_module("comfy.sd").load_checkpoint_guess_config(
        str(file), output_vae=False, output_model=False
    )[1]
    for text, row in zip(texts, rows, strict=True):
        tokens, about = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
        expected = torch.cat([tokens.flatten(), about["pooled_output"].flatten()])
        torch.testing.assert_close(row, expected.float(), rtol=0.05, atol=0.05)


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
    together = clip.encode_from_tokens({"l": sections}).reshape(-1, data.TOKENS, 768)
    for text, row in zip(texts, together, strict=True):
        alone = clip.encode_from_tokens(clip.tokenize(text))[0]
        torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-3)
    assert math.isclose(float(np.abs(together.numpy()).mean()), 0.8, abs_tol=0.3)


@pytest.fixture
def drawn_parts(pack: ModuleType, untrained: tuple, model_files: Path, tmp_path: Path) -> Iterator[tuple]:
    """Model, text encoder and VAE through Load Checkpoint (SpeedLab), and an output folder of the test's own."""
    folder_paths = importlib.import_module("folder_paths")
    file = untrained[0]
    target = model_files / "checkpoints" / SD15.checkpoint
    target.unlink(missing_ok=True)
    target.symlink_to(packed.write_drawn(file.parent / "models", file)[0])
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield pack.NODE_CLASS_MAPPINGS["SpeedLabCheckpointLoader"]().load(SD15.checkpoint, "auto", "contiguous")[:3]
    folder_paths.set_output_directory(before)
    target.unlink()


TEXT = "a big red circle on the left, blue background"
SETTINGS = {
    "negative": "", "width": 64, "height": 64, "batch": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler",
    "scheduler": "normal", "seed": "7",
}  # fmt: skip


def test_benchmark_tells_the_attributes_of_the_model_that_draws(node: Any, drawn_parts: tuple, tmp_path: Path) -> None:
    model, clip, vae = drawn_parts
    axes = {"axis_x": "steps", "values_x": "1, *2", "axis_y": "none", "values_y": "", "warmup": 0, "repeats": 1}

    def run(text: str, given: Any = model, **more: Any) -> tuple[str, list[Any]]:
        bench = node("SpeedLabBenchmark").benchmark(
            model=given, clip=clip, vae=vae, positive=text, plan="", **axes, **SETTINGS, **more
        )
        runs = [json.loads((tmp_path / "speedlab" / "runs" / f"{shown['run_id']}.json").read_text())
                for shown in bench["ui"]["speedlab"]]  # fmt: skip
        return bench["result"][0], runs

    table, records = run(TEXT)
    assert "attributes right" in table
    for record in records:
        image = Image.open(tmp_path / record["artifacts"]["images"][0])
        score = examiner.examine(np.asarray(image.convert("RGB")), world.scene_of(TEXT))
        assert record["quality"]["attributes"] == pytest.approx(score.accuracy)
    # Nobody can tell what would be right in the image of another text.
    table, records = run("a lighthouse on a rocky coast")
    assert "attributes right" not in table
    assert "attributes" not in (records[-1]["quality"] or {})
    # A core loader leaves no source on the model; the graph names its file.
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": SD15.checkpoint}},
        "2": {"class_type": "SpeedLabBenchmark", "inputs": {"model": ["1", 0]}},
    }
    plain = model.clone()
    plain.attachments = {}
    assert "attributes right" in run(TEXT, plain, prompt=prompt, unique_id="2")[0]
    assert "attributes right" not in run(TEXT, plain)[0]


@pytest.mark.full
def test_tune_tells_the_attributes_of_the_model_that_draws(node: Any, drawn_parts: tuple) -> None:
    model, clip, vae = drawn_parts
    _, table, _, _, page = node("SpeedLabTune").find(
        model=model, clip=clip, vae=vae, positive=TEXT, quality="any", budget_minutes=2.0, budget_gb=0.0,
        candidates="dynamic_cfg(0.5)", **SETTINGS,
    )["result"]  # fmt: skip
    assert "attributes right" in table.splitlines()[0] and "attributes right" in Path(page).read_text()
    plans = json.loads(Path(page).with_suffix(".json").read_text())["plans"]
    shares = [look["attributes"] for plan in plans for look in plan["looks"].values()]
    assert shares and all(0.0 <= share <= 1.0 for share in shares)
    assert "random" not in table

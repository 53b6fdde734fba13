"""The trainer of the model that draws, at a few steps of tiny batches, and its packed factors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from speedlab.common.errors import SpeedLabError
from speedlab.measure.drawn import world
from speedlab_tools.synthetic.drawn import factors, latents, packed
from speedlab_tools.synthetic.drawn.factors import FAMILIES, SD15, SDXL, Model
from speedlab_tools.synthetic.train import autoencoder, begin, data, diffusion
from speedlab_tools.synthetic.train.__main__ import PLAN, PLAN_WITH_BASE, STAGES, Plan, main
from speedlab_tools.synthetic.train.net import UNet, embed_whole
from speedlab_tools.synthetic.train.optimiser import orthogonal


def encode(texts: Sequence[str]) -> torch.Tensor:
    """A stand-in for the text encoder's numbers: random ones that follow the text."""
    drawn = [np.random.default_rng(list(text.encode()) or 0).standard_normal(SD15.numbers) for text in texts]
    return torch.from_numpy(np.stack(drawn)).float()


def encode_wider(texts: Sequence[str]) -> torch.Tensor:
    """The same numbers among more: tokens of 2048, and 1280 for the whole text."""
    tokens = torch.zeros(len(texts), 77, 2048)
    tokens[:, :, 100:868] = 2.0 * encode(texts).unflatten(1, (77, 768))
    whole = torch.stack([torch.full((1280,), float(len(text) % 5)) for text in texts])
    return torch.cat([tokens.flatten(1), whole], dim=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captions and four steps of both stages at once."""
    folder = tmp_path_factory.mktemp("trained")
    data.open_pool(folder / "captions", 0, 6, encode)
    train(folder, "decoder", 4)
    train(folder, "unet", 4)
    return folder


def train(folder: Path, stage: str, until: int, *more: str) -> None:
    assert main([stage, *more, "--out", str(folder), "--captions", "6", "--until", str(until), "--batch", "2",
                 "--side", "64", "--fp32"]) == 0  # fmt: skip


def state(folder: Path, stage: str) -> dict:
    return torch.load(folder / f"{stage}.pt", weights_only=True)


@pytest.mark.parametrize("stage", ["decoder", "unet"])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    trained: Path, tmp_path: Path, stage: str
) -> None:
    data.open_pool(tmp_path / "captions", 0, 6, encode)
    for until in (2, 4):
        train(tmp_path, stage, until)
    whole, parts = state(trained, stage), state(tmp_path, stage)
    assert whole["step"] == parts["step"] == 4
    for kept in ("net", "ema"):
        for name, tensor in whole[kept].items():
            torch.testing.assert_close(parts[kept][name], tensor, rtol=1e-4, atol=1e-6)
    assert (trained / f"{stage}.csv").read_text().startswith("step,images,seconds,loss,rate,side,batch")


def test_the_captions_are_encoded_once_and_more_are_added(tmp_path: Path) -> None:
    calls: list[str] = []

    def counting(texts: Sequence[str]) -> torch.Tensor:
        calls.extend(texts)
        return encode(texts)

    first = data.open_pool(tmp_path, 0, 5, counting, batch=2)
    assert len(calls) == 6
    assert calls[0] == ""
    more = data.open_pool(tmp_path, 0, 8, counting, batch=2)
    assert len(calls) == 9
    assert np.array_equal(more.encoded[:6], first.encoded)
    assert torch.equal(torch.from_numpy(np.array(more.encoded[7])), encode([calls[7]])[0].half())
    assert np.array_equal(data.open_pool(tmp_path, 0, 3).encoded, first.encoded[:4])
    with pytest.raises(ValueError, match="another seed"):
        data.open_pool(tmp_path, 1, 5, counting)


def test_a_batch_follows_seed_and_step_alone(tmp_path: Path) -> None:
    pool = data.open_pool(tmp_path, 0, 5, encode)
    one, again, other = (pool.batch(0, step, 4, 64, 0.1) for step in (3, 3, 4))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_what_is_held_out_is_never_trained_on() -> None:
    trained_on = {scene for scene, _ in data.scenes(0, 300)}
    held = {scene for scene, _ in data.scenes(0, 60, held_out=True)}
    assert not trained_on & held
    assert all(data.is_held_out(scene) for scene in held)


def test_the_encoder_in_taesd_s_layout_is_the_arithmetic() -> None:
    from speedlab_tools.synthetic.files import draw

    weights = {name: draw(name, weight, 0, torch.float32, "cpu") for name, weight in latents.encoder().items()}
    rng = world.generator(5)
    pictures = np.stack([world.draw(world.random_scene(rng), rng, 64) for _ in range(3)])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0
    conv = torch.nn.functional.conv2d
    x = conv(x, weights["0.weight"], weights["0.bias"], padding=1)
    for index in range(1, 14):
        if f"{index}.weight" in weights:
            x = conv(x, weights[f"{index}.weight"], stride=2, padding=1)
        else:
            h = x
            for part in (0, 2, 4):
                h = conv(h.relu() if part else h, weights[f"{index}.conv.{part}.weight"],
                         weights[f"{index}.conv.{part}.bias"], padding=1)  # fmt: skip
            x = (h + x).relu()
    x = conv(x, weights["14.weight"], weights["14.bias"], padding=1)
    torch.testing.assert_close(x, torch.from_numpy(latents.encode(pictures)), rtol=1e-3, atol=1e-4)


def test_the_decoder_begins_as_a_mosaic_and_learns(trained: Path) -> None:
    noisy, pictures = autoencoder.batch(0, 0, 1)
    net = autoencoder.decoder()
    with torch.no_grad():
        mosaic = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pictures, 8), scale_factor=8.0)
        assert (net(noisy) - mosaic).abs().mean() < 0.15
    optimiser = torch.optim.Adam(net.parameters(), 1e-4)
    losses = []
    for _ in range(8):
        loss = autoencoder.loss(net, noisy, pictures)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


def test_the_unet_begins_as_the_noise_itself() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = UNet()(x, torch.tensor([900.0, 300.0]), encode(["a", "b"]).unflatten(1, (77, 768)))
    torch.testing.assert_close(predicted, x, rtol=0.2, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_net_has_the_checkpoint_s_names_and_shapes(family: str) -> None:
    model = FAMILIES[family]
    merged = factors.merged(UNet(0, model).state_dict(), model)
    expected = {name: weight.shape for name, weight in factors.unet(model).items()}
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == expected


def test_packing_keeps_the_weights_within_a_hundredth_and_twelve_megabytes(trained: Path, tmp_path: Path) -> None:
    unet, decoder = state(trained, "unet")["ema"], state(trained, "decoder")["ema"]
    file = tmp_path / "factors.safetensors"
    packed.save_packed(file, packed.pack(unet, decoder), step=4, side=64)
    assert file.stat().st_size < 12e6, file.stat().st_size
    tensors, about = packed.load_packed(file)
    assert (about["step"], about["side"]) == ("4", "64")
    again, decoder_again = packed.unpack(tensors)
    for before, after in ((unet, again), (decoder, decoder_again)):
        whole, back = factors.merged(before), factors.merged(after)
        assert whole.keys() == back.keys()
        for name, tensor in whole.items():
            assert (back[name] - tensor).norm() <= 0.015 * tensor.norm() + 1e-3, name
    UNet().load_state_dict(again)
    layout = packed.checkpoint_layout(tensors)
    merged = factors.merged(again)
    for name in ("input_blocks.1.0.in_layers.2.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"):
        built = torch.empty(layout[f"model.diffusion_model.{name}"].shape)
        layout[f"model.diffusion_model.{name}"].adjust(built)
        torch.testing.assert_close(built, merged[name], rtol=1e-4, atol=1e-6)


def test_a_changed_packed_file_is_refused(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    tensors = packed.pack(state(trained, "unet")["ema"], state(trained, "decoder")["ema"])
    packed.save_packed(file, tensors, step=4, side=64)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(SpeedLabError, match="builds another checkpoint"):
        packed.write_drawn(tmp_path / "models", file)
    file.write_bytes(bytes(raw[:1000]))
    with pytest.raises(SpeedLabError, match="cannot be read"):
        packed.write_drawn(tmp_path / "models", file)
    assert not (tmp_path / "models").exists()


def test_from_noise_the_last_timestep_holds_nothing_of_the_image() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, drawn = torch.randn(3, 4, 4, 4, generator=rng), torch.randn(3, 4, 4, 4, generator=rng)
    noise = diffusion.without_signal(clean, drawn)
    t = np.array([999, 500, 0])
    noisy = diffusion.add_noise(clean, noise, t)
    share = torch.from_numpy(diffusion.signal_shares()[t]).float()[:, None, None, None]
    torch.testing.assert_close(noisy[0], (1 - share[0]).sqrt() * drawn[0], rtol=0, atol=1e-5)
    # The noise that is to be predicted gives the clean latent as in every model of the kind.
    torch.testing.assert_close((noisy - (1 - share).sqrt() * noise) / share.sqrt(), clean, rtol=1e-4, atol=1e-4)


def test_a_model_of_somebody_else_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    tensors = packed.pack(state(trained, "unet")["ema"], state(trained, "decoder")["ema"])
    packed.save_packed(file, tensors, step=4, side=64)
    theirs = tmp_path / "models" / "vae_approx" / "taesd_decoder.safetensors"
    theirs.parent.mkdir(parents=True)
    save_file({"1.weight": torch.zeros(1)}, theirs)
    before = theirs.read_bytes()
    with pytest.raises(SpeedLabError, match=r"taesd_decoder.* was not made by this pack"):
        packed.write_drawn(tmp_path / "models", file)
    assert theirs.read_bytes() == before and not (tmp_path / "models" / "checkpoints").exists()


def test_the_average_begins_anew_when_the_noise_changes(trained: Path, tmp_path: Path) -> None:
    for name in ("captions/captions.json", "captions/captions.f16", "unet.csv", "unet.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(trained / name, tmp_path / name)
    argv = ["unet", "--out", str(tmp_path), "--captions", "6", "--batch", "1", "--side", "64", "--fp32"]
    log = (tmp_path / "unet.csv").read_text().replace(",from_noise", "").replace(",64,2,0\n", ",64,2\n")
    (tmp_path / "unet.csv").write_text(log)  # of a version without that column
    for until, averaged in ((5, 4), (6, 4)):
        assert main([*argv, "--until", str(until), "--from-noise"]) == 0
        assert state(tmp_path, "unet")["averaged"] == averaged
    lines = (tmp_path / "unet.csv").read_text().splitlines()
    assert lines[0].endswith(",side,batch,from_noise") and len(lines) == 4
    assert [line.split(",")[5:] for line in lines[1:]] == [["64", "2", "0"], ["64", "1", "1"], ["64", "1", "1"]]


def test_the_average_begins_anew_with_pictures_of_another_size(trained: Path, tmp_path: Path) -> None:
    for name in ("captions/captions.json", "captions/captions.f16", "unet.csv", "unet.pt", "decoder.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(trained / name, tmp_path / name)
    assert main(["unet", "--out", str(tmp_path), "--captions", "6", "--until", "5", "--batch", "1", "--side", "128",
                 "--fp32"]) == 0  # fmt: skip
    before, after = state(trained, "unet"), state(tmp_path, "unet")
    assert (before["averaged"], after["averaged"]) == (0, 4)
    name = "middle_block.1.proj_in.first"
    expected = before["net"][name].lerp(after["net"][name], 1 - 2 / 11)
    torch.testing.assert_close(after["ema"][name], expected, rtol=1e-4, atol=1e-6)
    # Packed are the average, or the last weights; the file says which pictures they know.
    for raw, kept in (((), "ema"), (("--raw",), "net")):
        file = tmp_path / "factors.safetensors"
        assert main(["pack", "--out", str(tmp_path), "--packed", str(file), *raw]) == 0
        tensors, about = packed.load_packed(file)
        assert about["side"] == "128"
        torch.testing.assert_close(tensors["out.2.weight"].float(), after[kept]["out.2.weight"], rtol=1e-3, atol=1e-4)


def test_training_goes_on_from_packed_factors(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    packed.save_packed(
        file, packed.pack(state(trained, "unet")["ema"], state(trained, "decoder")["ema"]), step=4, side=64
    )
    assert load_file(file)
    data.open_pool(tmp_path / "captions", 0, 6, encode)
    assert main(["unet", "--out", str(tmp_path), "--captions", "6", "--until", "5", "--batch", "2", "--side", "64",
                 "--fp32", "--start", str(file)]) == 0  # fmt: skip
    went_on = state(tmp_path, "unet")
    assert (went_on["step"], went_on["begun"]) == (5, 4)
    assert ",1e-05," in (tmp_path / "unet.csv").read_text()  # the rate rises anew


@pytest.mark.parametrize(("plan", "stages"), [(PLAN, {*STAGES}), (PLAN_WITH_BASE, {*STAGES} - {"decoder"})])
def test_the_whole_plan_has_every_stage_and_goes_onwards(plan: Plan, stages: set[str]) -> None:
    assert {stage for stage, _ in plan} == stages
    for stage in ("decoder", "unet"):
        steps = [changes["until"] for name, changes in plan if name == stage]
        assert steps == sorted(steps)
    assert [stage for stage, _ in plan][-2:] == ["pack", "examine"]


def test_packing_without_training_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "--out", str(tmp_path), "--packed", str(tmp_path / "factors.safetensors")]) == 2
    assert "run the stage decoder first" in capsys.readouterr().err


def test_timesteps_follow_the_weight_of_min_snr() -> None:
    drawn = np.concatenate([diffusion.draw_timesteps(64, np.random.default_rng(n)) for n in range(200)])
    share = diffusion.signal_shares()
    snr = share / (1 - share)
    weight = np.minimum(snr, diffusion.MIN_SNR) / snr
    expected = np.add.reduceat(weight, np.arange(0, 1000, 100)) / weight.sum()
    found = np.histogram(drawn, bins=10, range=(0, 1000))[0] / len(drawn)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_the_sampler_finds_what_a_perfect_net_knows() -> None:
    truth = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def perfect(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        share = float(diffusion.signal_shares()[int(t[0])])
        return (x - share**0.5 * truth) / (1 - share) ** 0.5

    found = diffusion.sample(perfect, torch.zeros(2, 77, 768), torch.zeros(1, 77, 768), 8, 10, 3.0, seed=0)
    torch.testing.assert_close(found, truth.expand(2, -1, -1, -1), rtol=1e-3, atol=1e-3)


def test_orthogonal_steps_have_singular_values_near_one() -> None:
    for shape in ((2, 16, 40), (2, 40, 16)):
        given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = orthogonal(given)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5
        assert values.max() < 1.4
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        torch.testing.assert_close(found, left @ right, rtol=0.0, atol=0.3)


@pytest.fixture(scope="module")
def second(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The second model, with a base of four steps."""
    file = tmp_path_factory.mktemp("base") / "factors.safetensors"
    weights = state(trained, "unet")["ema"], state(trained, "decoder")["ema"]
    packed.save_packed(file, packed.pack(*weights), step=4, side=64)
    return replace(SDXL, base=replace(SD15, packed=file))


def captions_of_both(folder: Path, model: Model) -> tuple[data.Pool, data.Pool]:
    assert model.base is not None
    return (
        data.open_pool(folder / "captions", 0, 6, encode_wider, model=model),
        data.open_pool(folder / "captions_sd15", 0, 6, encode, model=model.base),
    )


def test_the_second_model_begins_as_its_base(second: Model, tmp_path: Path) -> None:
    """With as many heads it computes the very same, from encodings in which a matrix finds those of the base."""
    assert second.base is not None
    alike = replace(second, heads=second.base.heads)
    own, theirs = captions_of_both(tmp_path, alike)
    net, base = UNet(0, alike), UNet()
    net.load_state_dict(begin.from_base(net, own, theirs))
    base.load_state_dict(packed.unpack(packed.load_packed(second.base.packed)[0])[0])
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([900.0, 100.0])
    (context, pooled), (theirs_context, _) = own.given(slice(1, 3)), theirs.given(slice(1, 3))
    with torch.no_grad():
        expected = base(x, t, theirs_context)
        found = net(x, t, context, embed_whole(pooled, data.draw_sizes(2, np.random.default_rng(0))))
    assert (expected - x).std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_second_model_trains_and_stores_what_is_its_own(
    second: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FAMILIES, "sdxl", second)
    begun = captions_of_both(tmp_path, second)
    net = UNet(0, second)
    before = begin.from_base(net, *begun)
    for until in (2, 3):
        train(tmp_path, "unet", until, "--family", "sdxl")
    kept = state(tmp_path, "unet")
    assert kept["step"] == 3
    shared = {name for name in before if second.shares(name)}
    assert {name for name, tensor in kept["net"].items() if torch.equal(tensor, before[name])} == shared
    assert "middle_block.0.in_layers.2.first" in shared
    assert not {name for name in shared if ".attn" in name or "label_emb" in name}

    file = tmp_path / "factors.safetensors"
    assert main(["pack", "--out", str(tmp_path), "--packed", str(file), "--family", "sdxl"]) == 0
    assert file.stat().st_size < 8e6
    assert not {name for name in load_file(file) if second.shares(name) or name.startswith("decoder.")}
    tensors, about = packed.load_packed(file, second)
    assert packed.checkpoint_hash(tensors, second) == about["checkpoint"]
    again = packed.unpack(tensors)[0]
    net.load_state_dict(again)
    whole, back = factors.merged(kept["ema"], second), factors.merged(again, second)
    for name, tensor in whole.items():
        assert (back[name] - tensor).norm() <= 0.015 * tensor.norm() + 1e-3, name

    # It goes on from what was packed, and only with the base that it was packed with.
    (tmp_path / "unet.pt").unlink()
    train(tmp_path, "unet", 4, "--family", "sdxl", "--start", str(file))
    assert state(tmp_path, "unet")["begun"] == 3
    assert second.base is not None
    other = tmp_path / "base.safetensors"
    base = load_file(second.base.packed)
    base["out.2.weight"] = base["out.2.weight"] * 2
    save_file(base, other)
    changed = replace(second, base=replace(second.base, packed=other))
    with pytest.raises(SpeedLabError, match="builds another checkpoint"):
        packed.write_drawn(tmp_path / "models", file, model=changed)
    assert main(["decoder", "--out", str(tmp_path), "--family", "sdxl"]) == 2
    assert "has the decoder of the model" in capsys.readouterr().err

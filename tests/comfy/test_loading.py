"""Load Checkpoint, Load LoRA Stack, Load VAE: core's results, and sentences for files that are not what they seem."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from speedlab_tools import synthetic

DEMO = "speedlab_demo_sd15.safetensors"


@pytest.fixture(scope="session")
def loaded(pack, model_files):
    import torch

    with torch.inference_mode():
        return pack.NODE_CLASS_MAPPINGS["SpeedLabCheckpointLoader"]().load(DEMO, "auto", "contiguous")


@pytest.fixture(scope="session")
def lora_files(model_files):
    spec = synthetic.CheckpointSpec(family="sd15", size="small")
    folder = model_files / "loras"
    for name, keys, seed in (("first", "all", 1), ("second", "all", 2), ("half", "partial", 3), ("foreign", "none", 4)):
        synthetic.write_lora(folder / f"{name}.safetensors", spec, seed=seed, keys=keys)
    return folder


@pytest.fixture
def checkpoints(model_files):
    """The checkpoints folder; files that a test puts there are removed again."""
    folder = model_files / "checkpoints"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


def states(model):
    return dict(model.model.diffusion_model.state_dict())


def test_the_parts_equal_cores_loader(loaded, core, model_files):
    import torch

    model, clip, vae, _ = loaded
    core_model, core_clip, core_vae = core.CheckpointLoaderSimple().load_checkpoint(DEMO)
    for ours, theirs in (
        (states(model), states(core_model)),
        (clip.cond_stage_model.state_dict(), core_clip.cond_stage_model.state_dict()),
        (vae.first_stage_model.state_dict(), core_vae.first_stage_model.state_dict()),
    ):
        assert ours.keys() == theirs.keys()
        # SD 1.x files hold no projection and no logit scale; core leaves those unset, whatever the memory held.
        in_file = [key for key in ours if not key.endswith(("text_projection.weight", "logit_scale"))]
        assert all(torch.equal(ours[key], theirs[key]) for key in in_file)


def test_info_tells_what_was_loaded(loaded):
    info = loaded[3]
    for expected in ("SD 1.x", "safetensors", "GB", "MB/s", "unet: weights", "text_encoder", "vae"):
        assert expected in info


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"])
def test_precisions_are_kept_and_sample_finite(node, core, model_files, engine, precision):
    import torch

    model, clip, vae, info = node("SpeedLabCheckpointLoader").load(DEMO, precision, "channels_last")
    short = engine("common.dtypes").short_name
    assert short(model.model_dtype()) == precision
    if precision == "fp32":
        assert short(vae.vae_dtype) == "fp32"
        assert {short(p.dtype) for p in clip.cond_stage_model.parameters()} == {"fp32"}
    cond = node("SpeedLabTextEncode").encode(clip, "a lake")[0]
    sampler = node("SpeedLabProfileSampler")
    latent, record = sampler.sample(
        model, 1, 1, 1.0, "euler", "normal", cond, cond, {"samples": torch.zeros(1, 4, 8, 8)}
    )["result"][:2]
    assert torch.isfinite(latent["samples"]).all()
    unet = record.request["precision"]["unet"]
    assert unet["weight"] == precision
    if precision == "bf16" and engine("common.dtypes").cpu_computes_bf16():
        assert unet["compute"] == "bf16"
    assert unet["compute"] in info
    assert "channels-last" in info


def test_a_pickle_is_named_as_one(node, checkpoints, demo_checkpoint):
    import torch
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(demo_checkpoint)}, checkpoints / "old.ckpt")
    info = node("SpeedLabCheckpointLoader").load("old.ckpt", "auto", "contiguous")[3]
    assert "pickle" in info
    assert "safetensors is safer" in info


@pytest.mark.parametrize("keep", [0, 4, 9, 5000, 0.5, 0.999])
def test_a_truncated_file_is_named(node, checkpoints, demo_checkpoint, engine, keep):
    size = demo_checkpoint.stat().st_size
    with demo_checkpoint.open("rb") as file:
        (checkpoints / "cut.safetensors").write_bytes(file.read(keep if isinstance(keep, int) else int(size * keep)))
    with pytest.raises(engine("common.errors").ModelFileError, match=r"cut\.safetensors") as error:
        node("SpeedLabCheckpointLoader").load("cut.safetensors", "auto", "contiguous")
    assert "Traceback" not in str(error.value)
    assert keep in (0, 4) or "truncated" in str(error.value)


def test_foreign_files_are_refused(node, checkpoints, engine):
    (checkpoints / "picture.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(4096))
    (checkpoints / "text.ckpt").write_text("not a model")
    (checkpoints / "empty.safetensors").write_bytes(b"")
    zipped = io.BytesIO()
    import torch

    torch.save({"state_dict": {"a": torch.zeros(1)}}, zipped)
    (checkpoints / "cut.pt").write_bytes(zipped.getvalue()[:-60])
    for name in ("picture.safetensors", "text.ckpt", "empty.safetensors", "cut.pt"):
        with pytest.raises(engine("common.errors").ModelFileError, match=name.replace(".", r"\.")):
            node("SpeedLabCheckpointLoader").load(name, "auto", "contiguous")


def test_a_lora_among_the_checkpoints_is_recognised(node, checkpoints, lora_files, engine):
    (checkpoints / "lora.safetensors").write_bytes((lora_files / "first.safetensors").read_bytes())
    with pytest.raises(engine("common.errors").ModelFileError, match="looks like a LoRA"):
        node("SpeedLabCheckpointLoader").load("lora.safetensors", "auto", "contiguous")


def test_a_missing_file_is_an_error_that_names_it(node, model_files, engine):
    with pytest.raises(engine("common.errors").ModelFileError, match=r"nothing\.safetensors"):
        node("SpeedLabCheckpointLoader").load("nothing.safetensors", "auto", "contiguous")


def stack(node, model, clip, *choices):
    slots = {f"lora_{n}": "None" for n in range(1, 5)} | {f"strength_{n}": 1.0 for n in range(1, 5)}
    for n, (name, strength) in enumerate(choices, 1):
        slots |= {f"lora_{n}": name, f"strength_{n}": strength}
    return node("SpeedLabLoraStack").apply(model, clip, **slots)


def test_a_stack_equals_chained_lora_loaders(node, core, loaded, lora_files):
    import torch

    model, clip = loaded[:2]
    ours, our_clip = stack(node, model, clip, ("first.safetensors", 0.8), ("second.safetensors", -0.4))
    theirs, their_clip = core.LoraLoader().load_lora(model, clip, "first.safetensors", 0.8, 0.8)
    theirs, their_clip = core.LoraLoader().load_lora(theirs, their_clip, "second.safetensors", -0.4, -0.4)
    key = next(iter(ours.patches))
    assert ours.patches.keys() == theirs.patches.keys()
    assert our_clip.patcher.patches.keys() == their_clip.patcher.patches.keys()
    latents, encoded = [], []
    for patched, text in ((ours, our_clip), (theirs, their_clip)):
        cond = node("SpeedLabTextEncode").encode(text, "a lighthouse")[0]
        encoded.append(cond[0][0])
        latents.append(core.KSampler().sample(patched, 3, 1, 4.0, "euler", "normal", cond, cond,
                                              {"samples": torch.zeros(1, 4, 8, 8)})[0]["samples"])  # fmt: skip
    assert torch.equal(*encoded)
    assert torch.equal(*latents)
    assert key not in model.patches, "the model given stays as it was"


def test_nothing_to_do_returns_the_same_objects(node, loaded, lora_files):
    model, clip = loaded[:2]
    assert stack(node, model, clip) == (model, clip)
    assert stack(node, model, clip, ("first.safetensors", 0.0)) == (model, clip)


def test_matches_are_counted(engine, loaded, lora_files, caplog):
    lora = engine("models.lora")
    model, clip = loaded[:2]
    _, _, (whole,) = lora.apply_stack(model, clip, [lora.LoraChoice("first.safetensors", 1.0)])
    assert whole.matched == whole.total > 10
    _, _, (half,) = lora.apply_stack(model, clip, [lora.LoraChoice("half.safetensors", 1.0)])
    assert 0 < half.matched < half.total
    assert f"{half.matched} of {half.total} modules" in caplog.text


def test_a_lora_for_another_model_is_refused(node, loaded, lora_files, engine):
    model, clip = loaded[:2]
    with pytest.raises(engine("common.errors").ModelFileError, match=r"foreign\.safetensors matches no key"):
        stack(node, model, clip, ("foreign.safetensors", 1.0))
    (lora_files / "cut.safetensors").write_bytes((lora_files / "first.safetensors").read_bytes()[:3000])
    with pytest.raises(engine("common.errors").ModelFileError, match=r"cut\.safetensors"):
        stack(node, model, clip, ("cut.safetensors", 1.0))


def test_a_lora_of_the_same_names_but_another_width_is_refused(node, loaded, lora_files, engine):
    synthetic.write_lora(lora_files / "vega.safetensors", synthetic.CheckpointSpec(family="vega", size="small"))
    model, clip = loaded[:2]
    with pytest.raises(
        engine("common.errors").ModelFileError, match=r"vega\.safetensors was made for another model family"
    ):
        stack(node, model, clip, ("vega.safetensors", 1.0))


def test_the_counts_reach_the_record(node, loaded, lora_files):
    import torch

    model, clip = stack(node, *loaded[:2], ("half.safetensors", 0.5), ("first.safetensors", 1.0))
    cond = node("SpeedLabTextEncode").encode(clip, "x")[0]
    record = node("SpeedLabProfileSampler").sample(
        model, 1, 1, 1.0, "euler", "normal", cond, cond, {"samples": torch.zeros(1, 4, 8, 8)}
    )["result"][1]
    assert [text.split(" at ")[0] for text in record.request["loras"]] == ["half.safetensors", "first.safetensors"]
    assert any("half.safetensors" in warning for warning in record.warnings)
    assert not any("first.safetensors" in warning for warning in record.warnings)


def test_a_file_with_a_unet_alone_keeps_the_precision_asked_for(node, checkpoints, demo_checkpoint, engine):
    from safetensors.torch import load_file, save_file

    prefix = "model.diffusion_model."
    unet = {k.removeprefix(prefix): v for k, v in load_file(demo_checkpoint).items() if k.startswith(prefix)}
    save_file(unet, checkpoints / "bare.safetensors")
    model, clip, _, info = node("SpeedLabCheckpointLoader").load("bare.safetensors", "bf16", "contiguous")
    assert clip is None
    assert engine("common.dtypes").short_name(model.model_dtype()) == "bf16"
    assert "no text encoder" in info


def test_info_blames_the_device_only_where_it_is_the_devices_fault(loaded):
    assert "text_encoder: weights fp16, computes in fp32\n" in loaded[3]


def test_an_empty_file_and_one_that_lacks_tensors_are_told(node, checkpoints, demo_checkpoint, engine):
    from safetensors.torch import load_file, save_file

    (checkpoints / "nothing.ckpt").write_bytes(b"")
    with pytest.raises(engine("common.errors").ModelFileError, match="is empty"):
        node("SpeedLabCheckpointLoader").load("nothing.ckpt", "auto", "contiguous")
    weights = load_file(demo_checkpoint)
    holes = {k: v for k, v in weights.items() if not k.startswith("model.diffusion_model.input_blocks.0.")}
    save_file(holes, checkpoints / "holes.safetensors")
    with pytest.raises(engine("common.errors").ModelFileError, match=r"holes\.safetensors"):
        node("SpeedLabCheckpointLoader").load("holes.safetensors", "auto", "contiguous")


def test_a_text_encoder_that_is_not_there_is_told(node, engine):
    with pytest.raises(engine("common.errors").SpeedLabError, match="no text encoder"):
        node("SpeedLabTextEncode").encode(None, "x")


def test_text_encode_equals_core(node, core, loaded):
    import torch

    for text in ("", "a cat", "a (red:1.3) cat " * 30):
        ours = node("SpeedLabTextEncode").encode(loaded[1], text)[0]
        theirs = core.CLIPTextEncode().encode(loaded[1], text)[0]
        assert torch.equal(ours[0][0], theirs[0][0])
        assert ours[0][1].keys() == theirs[0][1].keys()


def test_a_vae_file_in_the_precision_asked_for(node, model_files, demo_checkpoint, core, engine):
    import torch
    from safetensors.torch import load_file, save_file

    prefix = "first_stage_model."
    weights = {k.removeprefix(prefix): v for k, v in load_file(demo_checkpoint).items() if k.startswith(prefix)}
    save_file(weights, model_files / "vae" / "demo_vae.safetensors")
    theirs = core.VAELoader().load_vae("demo_vae.safetensors")[0]
    ours = node("SpeedLabVAELoader").load("demo_vae.safetensors", "auto")[0]
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours.decode(latent), theirs.decode(latent))
    assert node("SpeedLabVAELoader").load("demo_vae.safetensors", "bf16")[0].vae_dtype == torch.bfloat16
    (model_files / "vae" / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(engine("common.errors").ModelFileError, match=r"bad\.safetensors"):
        node("SpeedLabVAELoader").load("bad.safetensors", "auto")


def test_the_hash_reads_a_little_of_a_large_file_and_tells_files_apart(engine, tmp_path):
    import hashlib

    loading, small, large = engine("models.loading"), tmp_path / "small.bin", tmp_path / "large.bin"
    small.write_bytes(b"weights")
    assert loading.sampled_hash(small) == hashlib.sha256((7).to_bytes(8, "little") + b"weights").hexdigest()
    (tmp_path / "empty.bin").write_bytes(b"")
    assert loading.sampled_hash(tmp_path / "empty.bin") != loading.sampled_hash(small)
    size = 1 << 30
    with large.open("wb") as file:  # a sparse file: a gigabyte that takes no room
        file.truncate(size)
    seen = {loading.sampled_hash(large)}
    offsets = loading._hashed_offsets(size)
    assert (offsets[0], offsets[-1] + loading._HASH_BLOCK) == (0, size)
    assert len(offsets) * loading._HASH_BLOCK < 5_000_000
    for place in (0, offsets[64] + 5, size - 1):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(loading.sampled_hash(large))
    with large.open("ab") as file:
        file.write(b"x")
    seen.add(loading.sampled_hash(large))
    assert len(seen) == 5


def test_a_broken_tiny_vae_pair_is_named(node, engine, model_files):
    """Core reads these files where the name of the pair is chosen as a VAE."""
    folder = model_files / "vae_approx"
    pair = [folder / f"taef1_{part}.safetensors" for part in ("encoder", "decoder")]
    for path in pair:
        path.write_bytes(b"not weights")
    try:
        with pytest.raises(engine("common.errors").ModelFileError, match="taef1_"):
            node("SpeedLabVAELoader").load("taef1", "auto")
    finally:
        for path in pair:
            path.unlink()


def test_memory_that_runs_out_while_loading_is_not_blamed_on_the_file(engine, demo_checkpoint):
    """As torch tells it: the reason stands below a headline about the file's keys."""
    packed = "Error(s) in loading state_dict for AutoencoderKL:\n\tWhile copying 'a': ('CUDA out of memory.',)."
    errors, readable = engine("common.errors"), engine("models.loading").readable
    with (
        pytest.raises(errors.SpeedLabError, match=r"Out of memory while .*not to blame") as caught,
        readable(demo_checkpoint, "checkpoint"),
    ):
        raise RuntimeError(packed)
    assert not isinstance(caught.value, errors.ModelFileError)
    assert engine("common.core").is_out_of_memory(caught.value), "a benchmark's row says oom"
    with pytest.raises(errors.ModelFileError), readable(demo_checkpoint, "checkpoint"):
        raise RuntimeError("Error(s) in loading state_dict for AutoencoderKL: size mismatch")


ODD_NAMES = ("c:odd.safetensors", "C:\\odd.safetensors", "\\odd.safetensors", "..odd..safetensors", "a\\b c.SFT")


@pytest.fixture
def odd_files(model_files, demo_checkpoint, lora_files, taesd_files, comfy):
    """Links of each odd name in each models folder; they go again after the test."""
    if os.name == "nt":
        pytest.skip("no such names on Windows, where they are drives and folders")
    import folder_paths

    vae = model_files / "vae" / "plain.safetensors"
    made = {
        "checkpoints": demo_checkpoint,
        "loras": lora_files / "first.safetensors",
        "vae": vae,
        "vae_approx": next((model_files / "vae_approx").glob("taesd_decoder.*")),
    }
    from safetensors.torch import load_file, save_file

    prefix = "first_stage_model."
    weights = load_file(demo_checkpoint)
    save_file({k[len(prefix) :]: v.contiguous() for k, v in weights.items() if k.startswith(prefix)}, vae)
    paths = [vae]
    for kind, source in made.items():
        for name in ODD_NAMES:
            odd = Path(name)
            path = model_files / kind / (f"{odd.stem}_decoder{odd.suffix}" if kind == "vae_approx" else name)
            path.symlink_to(source)
            paths.append(path)
    folder_paths.filename_list_cache.clear()
    yield
    for path in paths:
        path.unlink()
    folder_paths.filename_list_cache.clear()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_the_lists_offer_loads_whatever_it_is_called(node, core, loaded, odd_files, tiny, name):
    import torch

    model, clip = loaded[:2]
    checkpoint, lora, vae, tiny_vae = (
        node(f"SpeedLab{kind}") for kind in ("CheckpointLoader", "LoraStack", "VAELoader", "TinyVAEDecode")
    )
    assert name in checkpoint.INPUT_TYPES()["required"]["ckpt_name"][0]
    assert name in checkpoint.load(name, "auto", "contiguous")[3]
    assert name in lora.INPUT_TYPES()["required"]["lora_1"][0]
    ours, theirs = stack(node, model, clip, (name, 1.0))[0], core.LoraLoader().load_lora(model, clip, name, 1.0, 1.0)[0]
    assert ours.patches.keys() == theirs.patches.keys()
    assert name in vae.INPUT_TYPES()["required"]["vae_name"][0]
    assert vae.load(name, "fp32")[0].vae_dtype == torch.float32
    stem = Path(name).stem
    assert stem in tiny_vae.INPUT_TYPES()["required"]["decoder"][0]
    assert tiny_vae.decode({"samples": torch.zeros(1, 4, 8, 8)}, stem, 1, 0, tiny.model)[0].shape == (1, 64, 64, 3)


def test_a_file_that_core_lists_from_vae_approx_is_read_as_one(node, model_files, engine):
    """Core's list of VAEs holds every file named like a video TAE; a bad one is told in words."""
    path = model_files / "vae_approx" / "taehv.safetensors"
    path.write_bytes(b"nothing")
    try:
        with pytest.raises(engine("common.errors").ModelFileError, match=r"taehv\.safetensors"):
            node("SpeedLabVAELoader").load("taehv.safetensors", "auto")
    finally:
        path.unlink()

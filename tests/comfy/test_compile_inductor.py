"""inductor for real, on the smallest UNet: its C++ for one image, found again on disk; and Compile VAE's backends."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .tiny_unet import build, fill, relative


@pytest.fixture
def fresh(engine: Any, base_dir: Path) -> Any:
    """Nothing compiled yet in this process."""
    torch._dynamo.reset()
    engine("techniques.compile.backends.dynamo")._functions.clear()
    yield engine("techniques.compile.attach")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "layout, scope", [("level", "auto"), pytest.param("flat", "blocks", marks=pytest.mark.full)]
)  # fmt: skip
def test_real_code_equals_eager_and_is_found_again_on_disk(
    fresh: Any, engine: Any, base_dir: Path, caplog: Any, layout: str, scope: str
) -> None:
    """Of transformers at one size; with `--all` of all blocks at two sizes, and so of any size."""
    from torch._dynamo.utils import counters

    caplog.set_level("INFO")
    compiled = base_dir / "user" / "speedlab" / "compiled"
    for graphs in (*compiled.glob("inductor-*/fxgraph"), *compiled.glob("inductor-*/aotautograd")):
        shutil.rmtree(graphs)  # an earlier test of this process may have kept the same code
    unet = build(layout)
    eager = unet.sample(steps=2)
    model = fresh.attach_compile(unet.model, fresh.CompileConfig(scope=scope))
    assert relative(unet.sample(model, steps=2), eager) < 1e-4
    kept = list(compiled.glob(f"inductor-torch{torch.__version__[:3]}*-cpu-*"))
    assert len(kept) == 1 and any(kept[0].rglob("*.so"))
    torch._dynamo.reset()
    engine("techniques.compile.backends.dynamo")._functions.clear()
    counters.clear()
    assert "kept on disk" not in caplog.text
    again = fresh.attach_compile(unet.model, fresh.CompileConfig(scope=scope))
    assert relative(unet.sample(again, steps=2), eager) < 1e-4
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    assert hits > 0
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert "from code kept on disk" in caplog.text


def test_plain_inductor_on_a_cpu_warns_before(tiny: SimpleNamespace, fresh: Any, caplog: Any) -> None:
    fresh.attach_compile(tiny.model, fresh.CompileConfig())
    assert "plain inductor" in caplog.text and "freeze_weights" in caplog.text
    caplog.clear()
    fresh.attach_compile(tiny.model, fresh.CompileConfig(freeze_weights=True))
    assert "plain inductor" not in caplog.text


@pytest.fixture(scope="module")
def vae(comfy: Any) -> Any:
    """A full VAE of SD 1.x, as ComfyUI builds one from weights."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.inference_mode():
        network = AutoencoderKL(ddconfig=config, embed_dim=4)
        fill(network, 0)
        return comfy.sd.VAE(sd=network.state_dict(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny_vae(comfy: Any) -> Any:
    """A Tiny VAE, as core's Load VAE gives it."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    with torch.inference_mode():
        network = TAESD()
        fill(network, 0)
        state = {**network.state_dict(), "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
        return comfy.sd.VAE(sd=state, dtype=torch.float32)


@pytest.mark.parametrize(
    "which, backend",
    [
        ("vae", "jit_trace"), ("tiny_vae", "onnxruntime"), ("tiny_vae", "jit_trace"),
        pytest.param("vae", "onnxruntime", marks=pytest.mark.full),
        pytest.param("tiny_vae", "inductor", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_a_compiled_vae_decodes_alike(
    node: Any, engine: Any, fresh: Any, request: pytest.FixtureRequest, which: str, backend: str
) -> None:
    plain = request.getfixturevalue(which)
    network, keys = plain.first_stage_model, list(plain.first_stage_model.state_dict())
    (compiled,) = node("SpeedLabCompileVAE").apply(plain, backend, "default")
    assert compiled is not plain and plain.first_stage_model is network
    for size in ((8, 8), (8, 12)):
        latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
        assert relative(compiled.decode(latent), plain.decode(latent)) < 1e-4
        (pictures,) = node("SpeedLabVAEDecode").decode({"samples": latent}, compiled, False, 0, 64, "auto")[:1]
        assert pictures.shape == (1, 8 * size[0], 8 * size[1], 3)
        if which == "vae":
            decoded = engine("vae.decode").decode(compiled, {"samples": latent}, engine("vae.decode").DecodeConfig())
            assert decoded.info["compiled"] == f"compile_vae(backend={backend})"
    assert "decode" not in vars(network)
    assert list(network.state_dict()) == list(compiled.first_stage_model.state_dict()) == keys


def test_a_vae_that_cannot_be_compiled_says_why(node: Any, tiny_vae: Any, engine: Any) -> None:
    with pytest.raises(engine("common.errors").UnavailableError, match="no mode max-autotune"):
        node("SpeedLabCompileVAE").apply(tiny_vae, "jit_trace", "max-autotune")
    with pytest.raises(ValueError, match="tensorrt"):
        node("SpeedLabCompileVAE").apply(tiny_vae, "tensorrt", "default")

"""DeepCache on every UNet layout it claims, and its words where it cannot work."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from types import ModuleType
from typing import Any

import pytest
import torch

from .deepcache_oracle import with_oracle
from .tiny_unet import LAYOUTS, build, relative


@pytest.fixture(scope="module")
def deepcache(pack: ModuleType) -> ModuleType:
    return importlib.import_module("speedlab.techniques.deepcache.attach")


# Three are others with fewer blocks, for what is compiled.
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("slim", "deep", "level")])
def test_layout(deepcache: ModuleType, comfy: ModuleType, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny = build(layout)
    options: dict[str, Any] = {"steps": 5}
    if layout == "inpaint":
        mask = torch.ones(1, 1, 64, 64)
        extra = {"concat_latent_image": torch.randn(1, 4, 8, 8), "concat_mask": mask}
        for side, seed in (("positive", 1), ("negative", 2)):
            tensor, values = tiny.cond(seed)[0]
            options[side] = [[tensor, {**values, **extra}]]
        assert tiny.model.model.concat_keys
    deepest = len(tiny.unet.output_blocks) - (2 if tiny.unet.middle_block is None else 1)
    for branch in (0, deepest):
        ours = tiny.sample(
            deepcache.attach_deepcache(tiny.model, deepcache.DeepCacheConfig(interval=2, branch=branch)), **options
        )
        oracle = tiny.sample(with_oracle(tiny, tiny.model, interval=2, branch=branch), **options)
        assert relative(ours, oracle) < 1e-6
        assert relative(ours, tiny.sample(**options)) > 1e-6
    # Of few steps it warns whatever the model is.
    assert not [record for record in caplog.records if "steps each changes" not in record.getMessage()]


def test_branch_is_clamped_with_a_warning(deepcache: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    tiny = build("sdxl")
    with caplog.at_level(logging.WARNING):
        model = deepcache.attach_deepcache(tiny.model, deepcache.DeepCacheConfig(branch=20))
    assert "20" in caplog.text and "the largest, 8," in caplog.text
    deepest = deepcache.attach_deepcache(tiny.model, deepcache.DeepCacheConfig(branch=8))
    assert torch.equal(tiny.sample(model, steps=4), tiny.sample(deepest, steps=4))


def test_half_precision(deepcache: ModuleType, comfy: ModuleType) -> None:
    tiny = build("sd15")
    tiny.unet.to(torch.bfloat16)
    tiny.unet.dtype = torch.bfloat16
    model = deepcache.attach_deepcache(tiny.model, deepcache.DeepCacheConfig(branch=1))
    assert relative(tiny.sample(model), tiny.sample(with_oracle(tiny, tiny.model, branch=1))) == 0.0


def _flux() -> Any:
    """A Flux model as ComfyUI builds it, with one block of each kind and few channels."""
    import comfy.model_patcher
    import comfy.supported_models

    # Newer ComfyUI asks for a few parameters more; those that this one does not know are left out.
    known = {f.name for f in dataclasses.fields(importlib.import_module("comfy.ldm.flux.model").FluxParams)}
    newer = {"txt_ids_dims": [], "global_modulation": False, "mlp_silu_act": False, "ops_bias": True}
    config = comfy.supported_models.Flux(
        {name: value for name, value in newer.items() if name in known}
        | {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 8,
            "context_in_dim": 8,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
        }
    )
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=cpu), load_device=cpu, offload_device=cpu)


@pytest.mark.parametrize("node", ["DeepCache", "DynamicCFG"])
def test_another_network_is_refused(pack: ModuleType, node: str) -> None:
    nodes = importlib.import_module(f"{pack.__name__}.nodes.accelerate")
    errors = importlib.import_module("speedlab.common.errors")
    flux = _flux()
    on = {
        "DeepCache": (3, 0, 0.0, 1.0, "uniform"),
        "DynamicCFG": ("fixed", 0.75, 0.99),
    }
    off = {"DeepCache": (1, 0, 0.0, 1.0, "uniform"), "DynamicCFG": ("fixed", 1.0, 0.99)}
    technique = getattr(nodes, node)()
    with pytest.raises(errors.UnavailableError) as refusal:
        technique.apply(flux, *on[node])
    assert "Flux" in str(refusal.value) and "SDXL" in str(refusal.value)
    assert technique.apply(flux, *off[node]) == (flux,)


def _video() -> Any:
    """A Stable Video Diffusion model: a UNetModel too, but one that works across frames."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SVD_img2vid(
        {
            "image_size": 32, "in_channels": 8, "out_channels": 4, "legacy": False, "use_spatial_transformer": True,
            "model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 64,
            "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 768,
            "use_temporal_attention": True, "use_temporal_resblock": True, "video_kernel_size": [3, 1, 1],
            "extra_ff_mix_layer": True, "merge_strategy": "learned_with_images",
        }
    )  # fmt: skip
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=cpu), load_device=cpu, offload_device=cpu)


@pytest.mark.parametrize("node", ["DeepCache", "DynamicCFG"])
def test_a_video_model_is_refused(pack: ModuleType, node: str) -> None:
    nodes = importlib.import_module(f"{pack.__name__}.nodes.accelerate")
    on = {"DeepCache": (3, 0, 0.0, 1.0, "uniform"), "DynamicCFG": ("fixed", 0.75, 0.99)}
    with pytest.raises(Exception, match=r"SVD_img2vid with a UNetModel network.*image UNets"):
        getattr(nodes, node)().apply(_video(), *on[node])


def test_node(pack: ModuleType, deepcache: ModuleType) -> None:
    node = importlib.import_module(f"{pack.__name__}.nodes.accelerate").DeepCache
    tiny = build("sd15")
    inputs = node.INPUT_TYPES()
    assert list(inputs["required"]) == [
        "model",
        "cache_interval",
        "cache_branch_id",
        "start_percent",
        "end_percent",
        "schedule",
    ]
    defaults = {name: spec[1]["default"] for name, spec in inputs["required"].items() if name != "model"}
    (model,) = node().apply(tiny.model, **defaults)
    expected = deepcache.attach_deepcache(tiny.model, deepcache.DeepCacheConfig())
    assert torch.equal(tiny.sample(model), tiny.sample(expected))

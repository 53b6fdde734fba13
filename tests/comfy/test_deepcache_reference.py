"""DeepCache against its authors' package: the same weights, latents and timesteps in ComfyUI and in diffusers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from .tiny_unet import CONTEXT, POOLED, TinyUNet, build, relative

CFG, STEPS = 5.0, 12
# The package's formula drops imaginary parts, which numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pair(request: pytest.FixtureRequest, comfy: ModuleType) -> tuple[TinyUNet, Any]:
    """The same random UNet in ComfyUI and in diffusers."""
    tiny = build(request.param)
    return tiny, _in_diffusers(tiny)


def _in_diffusers(tiny: TinyUNet) -> Any:
    import comfy.utils
    from diffusers import UNet2DConditionModel

    config = tiny.model.model.model_config.unet_config
    depths = [config["transformer_depth"][2 * level] for level in range(len(config["channel_mult"]))]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)]
    widths = [config["model_channels"] * mult for mult in config["channel_mult"]]
    per_head = config["num_head_channels"]
    heads = [width // per_head for width in widths] if per_head > 0 else config["num_heads"]
    extra = {}
    if config["adm_in_channels"] is not None:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config["adm_in_channels"],
        }
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        attention_head_dim=heads,
        cross_attention_dim=CONTEXT,
        use_linear_projection=config["use_linear_in_transformer"],
        **extra,
    )
    ours = tiny.unet.state_dict()
    names = comfy.utils.unet_to_diffusers(config)
    needed = unet.state_dict()
    unet.load_state_dict({theirs: ours[name] for theirs, name in names.items() if theirs in needed})
    return unet.eval()


class Schedule:
    """Stands where a pipeline's scheduler does; the package reads `timesteps` alone."""

    def __init__(self, timesteps: torch.Tensor) -> None:
        self.timesteps = timesteps


@torch.no_grad()
def _euler_in_diffusers(
    tiny: TinyUNet, unet: Any, sigmas: torch.Tensor, prepare: Callable[[Any], None]
) -> torch.Tensor:
    """Euler with guidance around the diffusers UNet, from the noise, sigmas and timesteps that ComfyUI has."""
    import comfy.sample

    sampling = tiny.model.model.model_sampling
    timesteps = sampling.timestep(sigmas[:-1]).float()
    prepare(SimpleNamespace(unet=unet, scheduler=Schedule(timesteps)))
    (cond, extra), (uncond, uncond_extra) = tiny.cond(1)[0], tiny.cond(2)[0]
    context = torch.cat([uncond, cond])
    added = {}
    if unet.config.addition_embed_type is not None:
        pooled = torch.cat([uncond_extra["pooled_output"], extra["pooled_output"]])
        size = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(2, 1)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": size}}
        assert pooled.shape[1] == POOLED
    x = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 0)
    x = sampling.noise_scaling(sigmas[0], x, torch.zeros_like(x), True)
    for sigma, following, timestep in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
        scaled = x / (sigma**2 + 1) ** 0.5
        eps = unet(torch.cat([scaled] * 2), timestep, encoder_hidden_states=context, **added).sample
        eps_uncond, eps_cond = eps.chunk(2)
        guided = eps_uncond + CFG * (eps_cond - eps_uncond)
        x = x + guided * (following - sigma)
    return tiny.model.model.process_latent_out(x)


def _sigmas(tiny: TinyUNet, steps: int = STEPS) -> torch.Tensor:
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "normal", steps)
    assert sigmas.shape == (steps + 1,)
    return sigmas


@pytest.fixture
def helper() -> Iterator[Callable[..., Callable[[Any], None]]]:
    """Prepares a pipeline with the package's helper; `full` is a list of full steps instead of its uniform ones."""
    from DeepCache import DeepCacheSDHelper

    enabled = []

    class ListHelper(DeepCacheSDHelper):
        full: frozenset[int] | None = None

        def is_skip_step(self, block_i: int, layer_i: int, blocktype: str = "down") -> bool:
            if self.full is not None:
                if self.cur_timestep in self.full:
                    return False
                self.start_timestep = self.cur_timestep - 1  # so that the uniform rule below calls it a cached step
            return super().is_skip_step(block_i, layer_i, blocktype)

    def prepare_with(interval: int, branch: int, full: frozenset[int] | None = None) -> Callable[[Any], None]:
        def prepare(pipe: Any) -> None:
            caching = ListHelper(pipe=pipe)
            caching.full = full
            caching.set_params(cache_interval=interval, cache_branch_id=branch)
            caching.enable()
            enabled.append(caching)

        return prepare

    yield prepare_with
    for caching in enabled:
        caching.disable()


def test_stock_agrees(pair: tuple[TinyUNet, Any], helper: Any) -> None:
    tiny, unet = pair
    reference = _euler_in_diffusers(tiny, unet, _sigmas(tiny), lambda pipe: None)
    stock = tiny.sample(steps=STEPS, cfg=CFG)
    assert relative(stock, reference) < 5e-6
    cached = _euler_in_diffusers(tiny, unet, _sigmas(tiny), helper(3, 3))
    assert relative(stock, cached) > 1e-3, "caching changes so little here that the tests below prove nothing"


@pytest.mark.parametrize(("interval", "branch"), [(2, 0), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3), (5, 0), (5, 1)])
def test_uniform(pair: tuple[TinyUNet, Any], pack: ModuleType, helper: Any, interval: int, branch: int) -> None:
    deepcache = importlib.import_module("speedlab.techniques.deepcache.attach")
    tiny, unet = pair
    reference = _euler_in_diffusers(tiny, unet, _sigmas(tiny), helper(interval, branch))
    config = deepcache.DeepCacheConfig(interval=interval, branch=branch)
    assert relative(tiny.sample(deepcache.attach_deepcache(tiny.model, config), steps=STEPS, cfg=CFG), reference) < 1e-5


@pytest.mark.parametrize("branch", [0, 2])
def test_nonuniform(
    pair: tuple[TinyUNet, Any], pack: ModuleType, helper: Any, published_formula: Any, branch: int
) -> None:
    deepcache = importlib.import_module("speedlab.techniques.deepcache.attach")
    tiny, unet = pair
    full, _ = published_formula(STEPS, 4, center=5, pow=1.4)
    reference = _euler_in_diffusers(tiny, unet, _sigmas(tiny), helper(3, branch, frozenset(int(s) for s in full)))
    config = deepcache.DeepCacheConfig(interval=3, branch=branch, schedule="nonuniform", center=5, power=1.4)
    assert relative(tiny.sample(deepcache.attach_deepcache(tiny.model, config), steps=STEPS, cfg=CFG), reference) < 1e-5


@pytest.fixture(scope="session")
def published_formula(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[int], float]]:
    """The package's own function, out of a module that today's diffusers can no longer import: in one of its own."""
    spec = importlib.util.find_spec("DeepCache")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "sd" / "pipeline_stable_diffusion.py"
    text = source.read_text(encoding="utf-8")
    (function,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "sample_from_quad_center"
    )
    alone = tmp_path_factory.mktemp("published") / "published_formula.py"
    alone.write_text(f"import numpy as np\n\n{ast.get_source_segment(text, function)}\n", encoding="utf-8")
    found = importlib.util.spec_from_file_location(alone.stem, alone)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    formula: Callable[..., tuple[list[int], float]] = module.sample_from_quad_center
    return formula


@pytest.mark.parametrize("steps", [4, 10, 12, 20, 25, 30, 50])
def test_nonuniform_list(published_formula: Any, steps: int) -> None:
    schedule = importlib.import_module("speedlab.techniques.deepcache.schedule")
    for interval, center, power in itertools.product((2, 3, 5, 8), (0, 5, 10, 15, 25), (1.2, 1.4, 2.0)):
        count = -(-steps // interval)
        ours = schedule.nonuniform_steps(steps, count, center, power)
        try:
            theirs = published_formula(steps, count, center=center, pow=power)[0]
        except ValueError:
            assert ours is None
        else:
            assert ours == tuple(sorted(int(step) for step in theirs))

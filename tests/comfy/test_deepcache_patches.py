"""DeepCache together with what else users put on a model: each pair against a plain implementation of DeepCache."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from .deepcache_oracle import with_oracle
from .tiny_unet import TinyUNet, build, fill, relative

EXACT = 1e-6
BRANCH = 3  # two levels of the UNet run on cached steps, with attention, a downsampler and an upsampler


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("sd15")


@pytest.fixture(scope="module")
def attach(pack: ModuleType) -> Callable[..., Any]:
    deepcache = importlib.import_module("speedlab.techniques.deepcache.attach")
    return lambda model, **options: deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(**options))


def _agrees(tiny: TinyUNet, attach: Any, patch: Callable[[Any], Any], **options: Any) -> None:
    """Patched before and after DeepCache, batched and split, and the patch matters."""
    oracle = tiny.sample(with_oracle(tiny, patch(tiny.model), branch=BRANCH), **options)
    before = tiny.sample(attach(patch(tiny.model), branch=BRANCH), **options)
    after = tiny.sample(patch(attach(tiny.model, branch=BRANCH)), **options)
    assert relative(before, oracle) < EXACT
    assert relative(after, oracle) < EXACT
    assert relative(tiny.sample(attach(tiny.model, branch=BRANCH), **options), oracle) > 1e-4, "the patch does nothing"
    with tiny.split():
        assert relative(tiny.sample(attach(patch(tiny.model), branch=BRANCH), **options), oracle) < 2e-5


def _lora(model: Any) -> Any:
    import comfy.sd

    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if name.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "out_layers.3.weight")):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            out, size = weight.shape[0], weight[0].numel()
            state[f"{key}.lora_up.weight"] = 0.3 * torch.randn(out, 2, generator=generator)
            state[f"{key}.lora_down.weight"] = size**-0.5 * torch.randn(2, size, generator=generator)
    return comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)[0]


def _by_place(model: Any) -> Any:
    """An attention patch as IPAdapter sets it: different at each layer, told apart by block and running number."""

    def output_patch(out: torch.Tensor, extra: dict) -> torch.Tensor:
        kind, number = extra["block"]
        return out * (1.0 + 0.05 * number + 0.03 * extra["transformer_index"] + (0.5 if kind == "output" else 0.0))

    def replacement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict) -> torch.Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        scale = torch.tensor([1.0 if which == 0 else 0.7 for which in extra["cond_or_uncond"]])
        rows = scale.repeat_interleave(q.shape[0] // len(scale))[:, None, None]
        return optimized_attention(q, k, v, extra["n_heads"]) * rows * (1.0 + extra["original_shape"][-1] / 16)

    clone = model.clone()
    clone.set_model_attn1_output_patch(output_patch)
    for place in (("input", 1), ("input", 4), ("middle", 0), ("output", 3), ("output", 9), ("output", 11)):
        clone.set_model_attn2_replace(replacement, *place)
    return clone


def _block_patches(model: Any) -> Any:
    """Input and output block patches that write in place, as FreeU does, and tell the blocks apart."""

    def on_input(h: torch.Tensor, extra: dict) -> torch.Tensor:
        h *= 1.0 + 0.01 * extra["block"][1]
        return h

    def on_output(h: torch.Tensor, skip: torch.Tensor, extra: dict) -> tuple[torch.Tensor, torch.Tensor]:
        h[:, : h.shape[1] // 2] *= 1.0 + 0.02 * extra["block"][1]
        skip *= 0.95
        return h, skip

    clone = model.clone()
    clone.set_model_input_block_patch(on_input)
    clone.set_model_output_block_patch(on_output)
    return clone


def _node(module: str, name: str, *values: Any) -> Callable[[Any], Any]:
    def patch(model: Any) -> Any:
        node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        if hasattr(node, "execute"):
            return node.execute(model, *values).args[0]
        return getattr(node(), node.FUNCTION)(model, *values)[0]

    return patch


PATCHES: dict[str, Callable[[Any], Any]] = {
    "lora": _lora,
    "attention by place": _by_place,
    "block patches": _block_patches,
    "freeu": _node("nodes_freelunch", "FreeU", 1.3, 1.4, 0.9, 0.2),
    "freeu v2": _node("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2),
    "perturbed attention": _node("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    "rescale cfg": _node("nodes_model_advanced", "RescaleCFG", 0.7),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patch(tiny: TinyUNet, attach: Any, name: str) -> None:
    # 8x8 latents are a single pixel in the middle block, where self-attention has nothing to choose from.
    _agrees(tiny, attach, PATCHES[name], size=(16, 16))


def test_self_attention_guidance(tiny: TinyUNet, attach: Any) -> None:
    patch = _node("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0)
    # Too large for the difference of two runs of one node: it keeps attention maps between its runs.
    ours = tiny.sample(attach(patch(tiny.model), branch=BRANCH), size=(16, 16))
    assert relative(ours, tiny.sample(attach(tiny.model, branch=BRANCH), size=(16, 16))) > 1e-4
    assert torch.isfinite(ours).all()


def test_hooks(tiny: TinyUNet, attach: Any) -> None:
    """A LoRA hook on one of two conds: each has weights of its own within one evaluation."""
    import comfy.hooks

    state = {}
    for name, weight in tiny.unet.state_dict().items():
        if name.endswith("attn2.to_v.weight"):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            state[f"{key}.lora_up.weight"] = torch.ones(weight.shape[0], 2)
            state[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1]) * 0.1
    hooks = comfy.hooks.create_hook_lora(state, 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(tiny.cond(1), hooks)
    options = {"positive": [*hooked, *tiny.cond(3)]}
    model = attach(tiny.model, branch=BRANCH)
    oracle = tiny.sample(with_oracle(tiny, tiny.model, branch=BRANCH), **options)
    assert relative(tiny.sample(model, **options), oracle) < EXACT
    assert relative(tiny.sample(model, positive=[*tiny.cond(1), *tiny.cond(3)]), oracle) > 1e-4


@pytest.fixture(scope="module")
def control_net(tiny: TinyUNet) -> Any:
    """A real ControlNet of the tiny UNet's layout."""
    import comfy.cldm.cldm
    import comfy.controlnet

    config = dict(tiny.model.model.model_config.unet_config)
    config.pop("out_channels")
    config = {key: list(value) if isinstance(value, list) else value for key, value in config.items()}
    network = comfy.cldm.cldm.ControlNet(**{**config, "hint_channels": 3, "device": torch.device("cpu")})
    fill(network, 5)
    return comfy.controlnet.ControlNet(network.eval(), load_device=torch.device("cpu"))


def _controlled(cond: list, control: Any, **percent: Any) -> list:
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    applied = control.copy().set_cond_hint(hint, 0.6, **percent)
    return [[tensor, {**extra, "control": applied, "control_apply_to_uncond": True}] for tensor, extra in cond]


def _without_residuals_on_cached_steps(model: Any) -> Any:
    """What a pack does that forgets the residuals: on cached steps the UNet gets none."""
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor: Any, x: Any, t: Any, context: Any, y: Any, control: Any, options: dict, **kwargs: Any) -> Any:
        sigmas = options["sample_sigmas"].tolist()
        step = sigmas.index(min(sigmas, key=lambda sigma: abs(sigma - float(options["sigmas"][0]))))
        return executor(x, t, context, y, control if step % 3 == 0 else None, options, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return clone


@pytest.mark.parametrize("branch", [0, 3])
def test_control_net(tiny: TinyUNet, attach: Any, control_net: Any, branch: int) -> None:
    options = {"positive": _controlled(tiny.cond(1), control_net)}
    model = attach(tiny.model, branch=branch)
    ours = tiny.sample(model, **options)
    assert relative(ours, tiny.sample(with_oracle(tiny, tiny.model, branch=branch), **options)) < EXACT
    assert relative(ours, tiny.sample(model)) > 1e-3
    forgetful = _without_residuals_on_cached_steps(tiny.model)
    assert relative(tiny.sample(attach(forgetful, branch=branch), **options), ours) > 1e-3
    with tiny.split():
        assert relative(tiny.sample(model, **options), ours) < 2e-5


def test_two_control_nets_and_a_range(tiny: TinyUNet, attach: Any, control_net: Any) -> None:
    first = _controlled(tiny.cond(1), control_net)
    second = control_net.copy().set_cond_hint(torch.ones(1, 3, 64, 64), 0.5, (0.2, 0.6))
    second.set_previous_controlnet(first[0][1]["control"])
    options = {"positive": [[first[0][0], {**first[0][1], "control": second}]]}
    ours = tiny.sample(attach(tiny.model, branch=BRANCH), **options)
    assert relative(ours, tiny.sample(with_oracle(tiny, tiny.model, branch=BRANCH), **options)) < EXACT


def test_residuals_of_input_blocks(tiny: TinyUNet, attach: Any) -> None:
    """T2I adapters add to input blocks, some of them and not to others."""
    import comfy.controlnet

    class Adapter(comfy.controlnet.ControlBase):
        def get_control(self, x: torch.Tensor, t: Any, cond: Any, count: int, options: dict) -> dict:
            rows, size = x.shape[0], x.shape[-1]
            level = [torch.full((rows, 32, size, size), 0.3 + index) for index in range(3)]
            deeper = [torch.full((rows, 64, size // 2, size // 2), 0.2)]
            order = [None, level[0], level[1], None, *deeper]
            return self.control_merge({"input": order[::-1], "output": [None] * 11 + [level[2]]}, None, x.dtype)

        def copy(self) -> Adapter:
            copied = Adapter()
            self.copy_to(copied)
            return copied

    options = {"positive": _controlled(tiny.cond(1), Adapter())}
    for branch in (0, 1, 3, 4):
        ours = tiny.sample(attach(tiny.model, branch=branch), **options)
        assert relative(ours, tiny.sample(with_oracle(tiny, tiny.model, branch=branch), **options)) < EXACT
        assert relative(ours, tiny.sample(attach(tiny.model, branch=branch))) > 1e-3


def test_other_wrappers_still_run_on_cached_steps(tiny: TinyUNet, attach: Any) -> None:
    from comfy.patcher_extension import WrappersMP

    def halve(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return executor(*args, **kwargs) * 0.5

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", halve)
        return clone

    _agrees(tiny, attach, patch)


@pytest.mark.parametrize("first", ["deepcache", "easycache"])
def test_easy_cache(tiny: TinyUNet, attach: Any, first: str) -> None:
    def both(threshold: float) -> Any:
        easy = _node("nodes_easycache", "EasyCacheNode", threshold, 0.15, 0.95, False)
        return easy(attach(tiny.model)) if first == "deepcache" else attach(easy(tiny.model))

    assert torch.equal(tiny.sample(both(0.0)), tiny.sample(attach(tiny.model)))  # EasyCache there, but never skipping
    with tiny.counted() as calls:
        assert torch.isfinite(tiny.sample(both(5.0), steps=12)).all()
    assert len(calls) < 12  # both at work

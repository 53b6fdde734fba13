"""What nodes of newer ComfyUIs do to a model: MultiGPU Work Units, SUPIRApply, CFGOverride, dynamic VRAM.

Those that need GPUs or weights are stood in for by what they leave on a model, read in ComfyUI 0.33.0.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import tiny_unet
from .test_memory_plan import plan

SIZE = (16, 16)


@pytest.fixture
def tiny(comfy: Any) -> Any:
    return tiny_unet.build("sd15")


@pytest.fixture(scope="module")
def attached(engine: Any) -> dict[str, Callable[[Any], Any]]:
    """Each technique on a model."""
    deepcache, attention = engine("techniques.deepcache.attach"), engine("techniques.attention.attach")
    precision, compiling = engine("techniques.precision.attach"), engine("techniques.compile.attach")
    memory = SimpleNamespace(plan=engine("memory.plan"))
    return {
        "DeepCache": lambda model: deepcache.attach_deepcache(model, deepcache.DeepCacheConfig()),
        "Attention Backend": lambda model: attention.attach_attention(model, attention.AttentionConfig("sdpa")),
        "Precision": lambda model: precision.attach_precision(
            model, precision.PrecisionConfig(memory_format="channels_last")
        ),
        "Compile Model": lambda model: compiling.attach_compile(model, compiling.CompileConfig("jit_trace")),
        "Memory Plan": lambda model: plan(memory, SimpleNamespace(model=model, clip=None, vae=None), "model").model,
    }


NAMES = ("DeepCache", "Attention Backend", "Precision", "Compile Model", "Memory Plan")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["before", "behind"])
def test_work_units_on_several_gpus_are_refused_by_name(
    tiny: Any, attached: Any, engine: Any, name: str, order: str
) -> None:
    """The node leaves a copy of the model for each further GPU under "multigpu"."""

    def units(model: Any) -> Any:
        clone = model.clone()
        clone.set_additional_models("multigpu", [tiny.model.clone()])
        return clone

    model = attached[name](units(tiny.model)) if order == "before" else units(attached[name](tiny.model))
    with pytest.raises(engine("common.errors").UnavailableError, match=f"{name} and MultiGPU Work Units"):
        tiny.sample(model, steps=1, size=SIZE)
    assert not any({"forward", "_forward"} & vars(part).keys() for part in tiny.unet.modules())


class Follower:
    """As SUPIRApply's object: from the middle block on it counts the output blocks, and joins their inputs itself."""

    def middle(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"h": values["h"]}

    def output_block(self, h: Any, skip: Any, _options: Any) -> tuple[Any, Any]:
        return torch.cat([h, skip], dim=1), None


@pytest.mark.parametrize("order", ["before", "behind"])
def test_a_patch_that_follows_every_block_is_refused_beside_deepcache(
    tiny: Any, attached: Any, engine: Any, order: str
) -> None:
    def followed(model: Any) -> Any:
        clone, follower = model.clone(), Follower()
        clone.set_model_patch(follower.middle, "middle_block_after_patch")
        clone.set_model_output_block_patch(follower.output_block)
        return clone

    apply = attached["DeepCache"]
    model = apply(followed(tiny.model)) if order == "before" else followed(apply(tiny.model))
    with pytest.raises(engine("common.errors").UnavailableError, match=r"DeepCache and Follower.*SUPIRApply"):
        tiny.sample(model, steps=2, size=SIZE)


def test_a_patch_that_joins_a_skip_itself_is_taken_on_cached_steps(tiny: Any, engine: Any) -> None:
    forward = engine("techniques.deepcache.forward")
    x = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(1))
    (context, _), branch = tiny.cond(1)[0], 3
    kept: list[torch.Tensor] = []

    def look(h: Any, skip: Any, options: dict) -> Any:
        if options["block"] == ("output", forward.cut(tiny.unet, branch)):
            kept.append(h.clone())
        return h, skip

    options: dict[str, Any] = {"patches": {"output_block_patch": [look]}}
    expected = tiny.unet(x, torch.ones(1), context, transformer_options=options)
    joined = {"patches": {"output_block_patch": [Follower().output_block]}}
    result = forward.shallow_forward(tiny.unet, branch, kept[0], x, torch.ones(1), context, None, None, joined)
    assert torch.equal(result, expected)


def override(cfg: float, from_step: int = 0) -> Callable[[Any], Any]:
    """What CFGOverride attaches: another CFG of the guider around whatever is further in."""

    def attach(model: Any) -> Any:
        calls: list[int] = []

        def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if len(calls) <= from_step:
                return executor(*args, **kwargs)
            guider = executor.class_obj
            before, guider.cfg = guider.cfg, cfg
            try:
                return executor(*args, **kwargs)
            finally:
                guider.cfg = before

        clone = model.clone()
        clone.add_wrapper("predict_noise", predict_noise)
        # Inside of whatever else is there.
        by_key = clone.wrappers["predict_noise"]
        clone.wrappers["predict_noise"] = {**{k: v for k, v in by_key.items() if k is not None}, None: by_key[None]}
        return clone

    return attach


def test_a_cfg_that_is_set_further_in_is_told_and_counts(
    tiny: Any, engine: Any, node: Any, caplog: pytest.LogCaptureFixture
) -> None:
    guidance = engine("techniques.guidance.dynamic_cfg")

    def dynamic(model: Any) -> Any:
        return guidance.attach_dynamic_cfg(model, guidance.DynamicCFGConfig("fixed", 0.5))

    expected = tiny.sample(override(3.0)(tiny.model), steps=4, size=SIZE)
    with tiny.counted() as calls:
        both = tiny.sample(override(3.0)(dynamic(tiny.model)), steps=4, size=SIZE)
    assert [rows for rows, _ in calls] == [2, 2, 2, 2]
    assert torch.equal(both, expected)
    assert caplog.text.count("another node (such as CFGOverride) sets the CFG") == 1
    latent = {"samples": torch.zeros(1, 4, *SIZE)}
    record = node("SpeedLabProfileSampler").sample(
        override(3.0)(dynamic(tiny.model)), 1, 4, 5.0, "euler", "normal", tiny.cond(1), tiny.cond(2), latent
    )["result"][1]
    assert any("CFGOverride" in text for text in record.warnings)
    assert not any(told.startswith("dynamic_cfg") for told in record.request["accelerators"])


def test_a_cfg_that_is_set_in_some_steps_leaves_the_others(tiny: Any, engine: Any) -> None:
    guidance = engine("techniques.guidance.dynamic_cfg")
    model = guidance.attach_dynamic_cfg(tiny.model, guidance.DynamicCFGConfig("fixed", 0.5))
    with tiny.counted() as calls:
        tiny.sample(override(3.0, from_step=3)(model), steps=4, size=SIZE)
    assert [rows for rows, _ in calls] == [2, 2, 1, 2]


def test_channels_last_under_dynamic_vram_is_told(
    tiny: Any, engine: Any, node: Any, model_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from . import dynamic_patcher

    loading = engine("models.loading")
    monkeypatch.setattr(loading, "is_dynamic", lambda _patcher: True)
    model, _clip, _vae, info = node("SpeedLabCheckpointLoader").load(
        "speedlab_demo_sd15.safetensors", "auto", "channels_last"
    )
    assert "channels_last has no effect: ComfyUI's dynamic VRAM" in info
    assert model.get_attachment(loading.SOURCE).memory_format == "contiguous"
    convolutions = [part.weight for part in model.model.modules() if isinstance(part, torch.nn.Conv2d)]
    assert all(weight.is_contiguous() for weight in convolutions)

    precision = engine("techniques.precision.attach")
    paged = dynamic_patcher.as_dynamic(tiny.model)
    paged.load_device = torch.device("cpu")
    told = precision._why_no_layout(tiny.unet, dynamic=True)
    assert "dynamic VRAM" in told and "memory_format has no effect" in told

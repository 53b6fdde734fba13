"""What nodes of newer ComfyUIs do to a model: MultiGPU Work Units, SUPIRApply, CFGOverride, dynamic VRAM.

Those that need GPUs or weights are stood in for by what they leave on a model, read in ComfyUI 0.33.0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def in_threads(tiny: Any, threaded: bool = True, calls: list[int] | None = None) -> Callable[[Any], Any]:
    """MultiGPU Work Units: each cond in a thread, on a copy of the network, gathered. Innermost, as core is.

    `threaded` False: the same forwards one after the other. `calls` gets the place of each cond that is evaluated.
    """
    other = tiny_unet.build("sd15").model.model

    def calc_cond_batch(executor: Any, model: Any, conds: list, x: Any, timestep: Any, options: dict) -> list:
        other.current_patcher = model.current_patcher
        out = [torch.zeros_like(x) for _ in conds]

        def work(index: int) -> None:
            if calls is not None:
                calls.append(index)
            alone = [cond if place == index else None for place, cond in enumerate(conds)]
            with torch.inference_mode():
                out[index] = executor((model, other)[index % 2], alone, x, timestep, options)[index]

        asked = [index for index, cond in enumerate(conds) if cond is not None]
        if threaded:
            with ThreadPoolExecutor(len(conds)) as pool:
                list(pool.map(work, asked))
        else:
            for index in asked:
                work(index)
        return out

    def attach(model: Any) -> Any:
        clone = model.clone()
        clone.set_additional_models("multigpu", [tiny.model.clone()])
        clone.add_wrapper_with_key("calc_cond_batch", "units", calc_cond_batch)
        return clone

    return attach


GOES_WITH_UNITS = {
    "Forecast": ("techniques.forecast.attach", "attach_forecast", "ForecastConfig", ("fixed",)),
    "Dynamic CFG": ("techniques.guidance.dynamic_cfg", "attach_dynamic_cfg", "DynamicCFGConfig", ("fixed", 0.5)),
    "Dynamic CFG, adaptive": (
        "techniques.guidance.dynamic_cfg", "attach_dynamic_cfg", "DynamicCFGConfig", ("adaptive", 1.0, 0.9)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOES_WITH_UNITS)
def test_what_acts_around_all_conds_goes_with_work_units(tiny: Any, engine: Any, name: str) -> None:
    """The same latents, bit for bit, as the same forwards in one thread give, and fewer forwards than stock."""
    module, attach, config, options = GOES_WITH_UNITS[name]
    module = engine(module)
    model = getattr(module, attach)(tiny.model, getattr(module, config)(*options))
    expected = tiny.sample(in_threads(tiny, threaded=False)(model), steps=12, size=SIZE)
    calls: list[int] = []
    result = tiny.sample(in_threads(tiny, calls=calls)(model), steps=12, size=SIZE)
    assert torch.equal(result, expected)
    assert 12 <= len(calls) < 24, "and it left out what it leaves out"


def test_uncond_in_intervals_goes_with_work_units(tiny: Any, engine: Any) -> None:
    guidance = engine("techniques.guidance.dynamic_cfg")
    config = guidance.DynamicCFGConfig("fixed", 1.0, uncond_interval=2, uncond_from=0.0)
    model = guidance.attach_dynamic_cfg(tiny.model, config)
    expected = tiny.sample(in_threads(tiny, threaded=False)(model), steps=12, size=SIZE)
    assert torch.equal(tiny.sample(in_threads(tiny)(model), steps=12, size=SIZE), expected)


def _profile(tiny: Any, node: Any, model: Any, detail: str = "timing") -> Any:
    latent = {"samples": torch.zeros(1, 4, *SIZE)}
    return node("SpeedLabProfileSampler").sample(
        model, 1, 4, 5.0, "euler", "normal", tiny.cond(1), tiny.cond(2), latent, detail=detail
    )["result"][1]


def test_profile_sampler_counts_the_forwards_of_work_units(tiny: Any, node: Any) -> None:
    record, plain = _profile(tiny, node, in_threads(tiny)(tiny.model)), _profile(tiny, node, tiny.model)
    assert [(step["cond_rows"], step["uncond_rows"]) for step in record.steps] == [(1, 1)] * 4
    assert [step["evals"] for step in record.steps] == [step["evals"] for step in plain.steps]
    assert [text for text in record.warnings if "MultiGPU Work Units" in text and "those of cpu alone" in text]
    assert not [text for text in plain.warnings if "MultiGPU" in text]


@pytest.mark.parametrize("detail", ["kernels", "trace"])
def test_what_is_recorded_on_one_gpu_is_refused_beside_work_units(
    tiny: Any, node: Any, engine: Any, detail: str
) -> None:
    told = f"Profile Sampler's detail {detail} and MultiGPU Work Units .*Set detail to timing"
    with pytest.raises(engine("common.errors").UnavailableError, match=told):
        _profile(tiny, node, in_threads(tiny)(tiny.model), detail)


class SlowRows(int):
    """Rows that take a moment to be added, in which another thread may add its own."""

    def __sub__(self, other: int) -> SlowRows:
        return SlowRows(int(self) - int(other))

    def __add__(self, other: int) -> SlowRows:
        time.sleep(0.002)
        return SlowRows(int(self) + int(other))

    __radd__ = __add__


def test_forwards_in_several_threads_are_all_counted(engine: Any) -> None:
    measure = engine("measure.trace")
    trace = measure.SamplingTrace(
        engine("measure.clock").clock_for(torch.device("cpu")), engine("measure.nvtx").NullEmitter()
    )

    def forward(_number: int) -> None:
        with trace.forward([0], SlowRows(2)):
            pass

    with trace.evaluation(torch.ones(1)), ThreadPoolExecutor(4) as pool:
        list(pool.map(forward, range(20)))
    (evaluation,) = trace.evaluations
    assert (evaluation.cond_rows, evaluation.forwards) == (40, 20)


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

"""What each technique says it left out, in runs of few steps above all, where there is little to leave out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .tiny_unet import build

DEEPCACHE = {
    "cache_interval": 3, "cache_branch_id": 0, "start_percent": 0.0, "end_percent": 1.0, "schedule": "uniform",
}  # fmt: skip


@pytest.fixture
def all_three(node: Any) -> Callable[..., Any]:
    """DeepCache or Forecast, and Dynamic CFG, on a model."""

    def patch(model: Any, *, forecast: bool = False, **deepcache: Any) -> Any:
        if forecast:
            (model,) = node("SpeedLabForecast").apply(model, "fixed", 0.02, 3, 0.0, 1.0)
        else:
            (model,) = node("SpeedLabDeepCache").apply(model, **{**DEEPCACHE, **deepcache})
        return node("SpeedLabDynamicCFG").apply(model, "fixed", 0.75, 0.99)[0]

    return patch


@pytest.fixture(scope="module")
def tiny(comfy: Any) -> Any:
    """A network whose deep blocks do much, as those of a trained one."""
    return build("slim")


@pytest.fixture
def sampled(node: Any, tiny: Any) -> Callable[..., Any]:
    """What Profile Sampler gives: the latent, the record, and the node's text."""

    def run(model: Any, *, steps: int, cfg: float = 5.0, sampler: str = "euler", scheduler: str = "normal") -> Any:
        return node("SpeedLabProfileSampler").sample(
            model, 1, steps, cfg, sampler, scheduler, tiny.cond(1), tiny.cond(2), {"samples": torch.zeros(1, 4, 8, 8)}
        )["result"]

    return run


def _saved(record: Any) -> dict[str, tuple[int, int]]:
    return {its["technique"]: (its["saved"], its["of"]) for its in record.summary["saved"]}


def _distilled(model: Any) -> Any:
    """As an LCM LoRA or checkpoint is used."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, "lcm", False)[0]


def test_samplers_without_a_record_have_it_in_the_log(all_three: Any, tiny: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        tiny.sample(all_three(tiny.model, forecast=True), steps=20)
        tiny.sample(all_three(tiny.model, forecast=True), steps=4, cfg=1.0)
    assert [text for text in caplog.messages if text.startswith("SpeedLab")] == [
        "SpeedLab: dynamic_cfg left out 5 of 20 evaluations of the negative prompt, 25 %",
        "SpeedLab: forecast left out 9 of 20 evaluations, 45 %",
        "SpeedLab: dynamic_cfg left out 0 of 0 evaluations of the negative prompt, 0 %",
        "SpeedLab: forecast left out 0 of 4 evaluations, 0 %",
    ]


def test_twenty_steps(sampled: Any, all_three: Any, tiny: Any) -> None:
    _, record, text, _ = sampled(all_three(tiny.model), steps=20)
    # 13 steps are cached; of them 9 have both rows. Five steps leave out uncond.
    full = [step for step in record.steps if not step["cached"]]
    rows = sum(step["cond_rows"] + step["uncond_rows"] for step in record.steps)
    assert len(full) == 7 and rows == 35
    cached = rows - sum(step["cond_rows"] + step["uncond_rows"] for step in full)
    assert _saved(record) == {"deepcache": (cached, 35), "dynamic_cfg": (5, 20)}
    assert f"deepcache {cached} of 35 rows" in text and "dynamic_cfg 5 of 20 evaluations" in text
    assert not any("steps each changes" in warning for warning in record.warnings)
    _, record, text, _ = sampled(all_three(tiny.model, forecast=True), steps=20)
    assert _saved(record) == {"forecast": (9, 20), "dynamic_cfg": (5, 20)}
    assert "forecast 9 of 20 evaluations, 45 %" in text


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_few_steps_of_a_distilled_model(sampled: Any, all_three: Any, tiny: Any, steps: int, cfg: float) -> None:
    model, rows = _distilled(tiny.model), steps * (1 if cfg == 1.0 else 2)
    how = {"steps": steps, "cfg": cfg, "sampler": "lcm", "scheduler": "sgm_uniform"}
    without = 0 if cfg == 1.0 else steps - int(0.75 * steps)
    _, record, text, _ = sampled(all_three(model), **how)
    saved = _saved(record)
    assert saved["dynamic_cfg"] == (without, steps if cfg != 1.0 else 0)
    assert saved["deepcache"][1] == rows - without
    assert (saved["deepcache"][0] > 0) is (steps > 1)
    warned = [warning for warning in record.warnings if "steps each changes the image much" in warning]
    assert len(warned) == (1 if steps > 1 else 0)
    assert all(warning in text for warning in warned) and "left out: dynamic_cfg" in text
    _, record, text, _ = sampled(all_three(model, forecast=True), **how)
    assert _saved(record)["forecast"] == (0, steps) and f"forecast 0 of {steps} evaluations, 0 %" in text
    assert any("does nothing in runs of fewer than 10 steps" in warning for warning in record.warnings)


@pytest.mark.parametrize("sampler", ["lcm", "euler", "euler_ancestral"])
def test_the_adaptive_schedule_pretends_nothing(sampled: Any, all_three: Any, tiny: Any, sampler: str) -> None:
    """It caches what it measured to be small, and says how little that is; the uniform one misses far more."""
    how = {"steps": 4, "cfg": 1.0, "sampler": sampler, "scheduler": "sgm_uniform"}
    model = _distilled(tiny.model)
    stock = sampled(model, **how)[0]["samples"]
    latent, record, _, _ = sampled(all_three(model, schedule="adaptive"), **how)
    error, of_uniform = (
        float((made["samples"] - stock).norm() / stock.norm()) for made in (latent, sampled(all_three(model), **how)[0])
    )
    assert error <= 0.02 and error < of_uniform / 3
    (cached,) = (its for its in record.summary["saved"] if its["technique"] == "deepcache")
    assert cached["of"] == 4 and cached["saved"] <= 1 and "more rows of the outer blocks" in cached["unit"]
    assert not any("steps each changes" in warning for warning in record.warnings)


def test_a_part_of_a_long_schedule_is_not_few_steps(sampled: Any, all_three: Any, tiny: Any, node: Any) -> None:
    made = node("SpeedLabProfileSampler").sample(
        all_three(tiny.model),
        1,
        6,
        5.0,
        "euler",
        "normal",
        tiny.cond(1),
        tiny.cond(2),
        {"samples": torch.zeros(1, 4, 8, 8)},
        0.3,
    )["result"]
    assert _saved(made[1])["deepcache"][0] > 0
    assert not any("steps each changes" in warning for warning in made[1].warnings)

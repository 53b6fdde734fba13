"""This pack's techniques with ComfyUI's other nodes for models, guidance and schedules, in both orders.

As in `test_composition`: the latent equals one that is made another way, or the pair is refused by a message that names
both, or the technique leaves the run as it is and says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from . import test_composition as matrix
from .deepcache_oracle import with_oracle
from .forecast_oracle import Plain, published_plan, with_forecasts
from .test_composition import DIFFERENT, OURS, SAME, STEPS, STOP_AT, Technique, _core_node, _same
from .tiny_unet import TinyUNet, build, relative

techniques = matrix.techniques
CFG, SIZE = 5.0, (16, 16)
Patch = Callable[[Any], Any]
Sample = Callable[[TinyUNet, Callable[[], Any]], torch.Tensor]


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    """With attention on its upper level, which HyperTile and TomePatchModel change."""
    return build("mini")


@dataclass(frozen=True)
class Other:
    """A node of core's on a model, or another way of sampling.

    `sees_attention`: it reads what deep blocks compute, and so what full steps computed. `aside`: the techniques that
    change nothing beside it, and say so; `refused`: those that say that they cannot be there.
    """

    node: Patch = _same
    sample: Sample | None = None
    sees_attention: bool = False
    aside: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()


def _seeded(model: Any) -> Any:
    """What draws random numbers in attention draws the same ones for a layer at a step, whatever ran before."""

    def seed(q: Any, k: Any, v: Any, extra: dict) -> tuple[Any, Any, Any]:
        torch.manual_seed(int(1000 * float(extra["sigmas"][0])) + extra["block"][1])
        return q, k, v

    clone = model.clone()
    clone.set_model_attn1_patch(seed)
    return clone


def _drawing(module: str, name: str, *values: Any) -> Patch:
    return lambda model: _core_node(module, name, *values)(_seeded(model))


def _perp_neg(model: Any) -> Any:
    empty = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(77))
    return _core_node("nodes_perpneg", "PerpNeg", [[empty, {"pooled_output": None}]], 1.0)(model)


def _guided(
    tiny: TinyUNet, model: Any, sigmas: torch.Tensor, latent: torch.Tensor | None = None, guider: Any = None
) -> torch.Tensor:
    """As SamplerCustomAdvanced runs it, with its own noise at the start alone."""
    from comfy_extras.nodes_custom_sampler import DisableNoise, KSamplerSelect, RandomNoise, SamplerCustomAdvanced

    noise = (RandomNoise.execute(0) if latent is None else DisableNoise.execute()).result[0]
    start = {"samples": torch.zeros(1, 4, *SIZE) if latent is None else latent}
    sampler = KSamplerSelect.execute("euler").result[0]
    if guider is None:
        from comfy_extras.nodes_custom_sampler import CFGGuider

        guider = CFGGuider.execute(model, tiny.cond(1), tiny.cond(2), CFG).result[0]
    with torch.inference_mode():
        made = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, start).result[0]
    return made["samples"]


def _whole(tiny: TinyUNet, steps: int = STEPS) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "normal", steps)


def _advanced(tiny: TinyUNet, make: Callable[[], Any]) -> torch.Tensor:
    return _guided(tiny, make(), _whole(tiny))


def _split(tiny: TinyUNet, make: Callable[[], Any]) -> torch.Tensor:
    """Two runs of as many steps as the others have one after another, on halves of one schedule."""
    from comfy_extras.nodes_custom_sampler import SplitSigmas

    latent = None
    for part in SplitSigmas.execute(_whole(tiny, 2 * STEPS), STEPS).result:
        latent = _guided(tiny, make(), part, latent)
    assert latent is not None
    return latent


def _on(module: str, name: str, *values: Any) -> Sample:
    def sample(tiny: TinyUNet, make: Callable[[], Any]) -> torch.Tensor:
        node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        return _guided(tiny, make(), node.execute(*values, STEPS, 1.0).result[0])

    return sample


def _perp_neg_guided(tiny: TinyUNet, make: Callable[[], Any]) -> torch.Tensor:
    from comfy_extras.nodes_perpneg import PerpNegGuider

    model = make()
    guider = PerpNegGuider.execute(model, tiny.cond(1), tiny.cond(2), tiny.cond(3), CFG, 1.0).result[0]
    return _guided(tiny, model, _whole(tiny), guider=guider)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(f"comfy_extras.{module}") is not None


_UNCOND = frozenset({"Dynamic CFG"})
OTHERS = {
    "HyperTile": Other(_drawing("nodes_hypertile", "HyperTile", 32, 2, 1, True)),
    "TomePatchModel": Other(_drawing("nodes_tomesd", "TomePatchModel", 0.3)),
    "PatchModelAddDownscale": Other(
        _core_node(
            "nodes_model_downscale", "PatchModelAddDownscale", 1, 2.0, 0.0, 0.5, True, "nearest-exact", "nearest-exact"
        )
    ),
    "SelfAttentionGuidance": Other(
        _core_node("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0), sees_attention=True, aside=_UNCOND
    ),
    "CFGZeroStar": Other(_core_node("nodes_cfg", "CFGZeroStar")),
    "APG": Other(_core_node("nodes_apg", "APG", 0.5, 5.0, -0.3)),
    "RescaleCFG": Other(_core_node("nodes_model_advanced", "RescaleCFG", 0.7)),
    "PerpNeg": Other(_perp_neg),
    "PerpNegGuider": Other(sample=_perp_neg_guided, aside=_UNCOND),
    "LazyCache": Other(
        _core_node("nodes_easycache", "LazyCacheNode", 0.6, 0.15, 0.95, False), refused=frozenset({"Forecast"})
    ),
    "SplitSigmas": Other(sample=_split),
    "SamplerCustomAdvanced": Other(sample=_advanced),
    "AlignYourStepsScheduler": Other(sample=_on("nodes_align_your_steps", "AlignYourStepsScheduler", "SD1")),
    "NAGuidance": Other(_core_node("nodes_nag", "NAGuidance", 3.0, 0.5, 1.5), aside=_UNCOND),
    "GITSScheduler": Other(sample=_on("nodes_gits", "GITSScheduler", 1.2)),
}
_NEWER = {"NAGuidance": "nodes_nag"}


def _cond_alone_later(model: Any, sigmas: torch.Tensor) -> Any:
    """From STOP_AT on cond is evaluated alone, and is the result, whatever combines or changes predictions."""
    found: dict[str, torch.Tensor] = {}

    def is_later(sigma: Any) -> bool:
        at = float(sigma.reshape(-1)[0]) * (1 - 1e-5)
        return sum(float(s) >= at for s in sigmas[:-1]) - 1 >= int(STOP_AT * (len(sigmas) - 1))

    def alone(executor: Any, base: Any, conds: list, x: Any, t: Any, *args: Any) -> list:
        if len(conds) != 2 or not is_later(t):
            return executor(base, conds, x, t, *args)
        out = executor(base, [conds[0], None], x, t, *args)
        found["cond"] = out[0].clone()
        return [out[0], out[0]]

    def last(args: dict) -> torch.Tensor:
        return found["cond"] if is_later(args["sigma"]) else args["denoised"]

    clone = model.clone()
    clone.add_wrapper_with_key("calc_cond_batch", "alone", alone)
    clone.set_model_sampler_post_cfg_function(last, disable_cfg1_optimization=True)
    return clone


def _reference(tiny: TinyUNet, name: str, other: Other, sigmas: torch.Tensor) -> Any:
    """The model of one run, with what ours does made another way."""
    model = other.node(tiny.model)
    if name == "DeepCache":
        return with_oracle(tiny, model, interval=3, branch=1, unseen=other.sees_attention)
    if name == "Forecast":
        return with_forecasts(model, Plain(published_plan(STEPS), unseen=other.sees_attention))
    assert name == "Dynamic CFG"
    return _cond_alone_later(model, sigmas)


def _run(tiny: TinyUNet, other: Other, make: Callable[[], Any]) -> torch.Tensor:
    if other.sample is not None:
        return other.sample(tiny, make)
    return tiny.sample(make(), steps=STEPS, size=SIZE)


def _orders(name: str) -> tuple[str, ...]:
    """What is another way of sampling changes no model, so that there is one order."""
    return ("first",) if OTHERS[name].node is _same else ("first", "last")


def _cases() -> list[Any]:
    """Every day each of these nodes with one technique that leaves out work, with `--all` all pairs in both orders."""
    every_day = {
        (("DeepCache", "Dynamic CFG", "Forecast")[number % 3], name, _orders(name)[number // 3 % len(_orders(name))])
        for number, name in enumerate(OTHERS)
    }
    cases = [(ours, name, order) for ours in OURS for name in OTHERS for order in _orders(name)]
    return [pytest.param(*case, marks=() if case in every_day else pytest.mark.full) for case in cases]


@dataclass(frozen=True)
class Known:
    """Images that several tests compare with, each made once."""

    made: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    def image(self, key: tuple[str, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


@pytest.mark.parametrize(("name", "with_what", "order"), _cases())
def test_pair(
    tiny: TinyUNet,
    techniques: dict[str, Technique], known: Known,
    pack: ModuleType, caplog: pytest.LogCaptureFixture, name: str, with_what: str, order: str,
) -> None:  # fmt: skip
    technique, other = techniques[name], OTHERS[with_what]
    if with_what in _NEWER and not _is_there(_NEWER[with_what]):
        return  # nothing to be combined with
    model = other.node(technique.node(tiny.model)) if order == "first" else technique.node(other.node(tiny.model))
    if name in other.refused:
        with pytest.raises(Exception, match=rf"(?s){name}.*{with_what}|{with_what}.*{name}"):
            _run(tiny, other, lambda: model)
        return
    with technique.watch() if technique.watch is not nullcontext else nullcontext() as works:
        made = _run(tiny, other, lambda: model)
        assert works is None or works(), f"{name} did nothing"
    is_split = with_what == "SplitSigmas"
    sigmas = _whole(tiny, 2 * STEPS if is_split else STEPS)
    if with_what.endswith("Scheduler"):
        assert other.sample is not None
        node = importlib.import_module(f"comfy_extras.{_MODULES[with_what]}")
        sigmas = getattr(node, with_what).execute(*_VALUES[with_what], STEPS, 1.0).result[0]
    stock = known.image((with_what,), lambda: _run(tiny, other, lambda: other.node(tiny.model)))
    # What changes no image, and what is left out beside it, gives the image without it.
    reference = stock
    if technique.changes and name not in other.aside:
        key = (name, with_what)
        reference = known.image(key, lambda: _run(tiny, other, lambda: _reference(tiny, name, other, sigmas)))
    assert relative(made, reference) < SAME
    if name in other.aside:
        assert f"{name}: uncond stays on in this run" in caplog.text
    elif technique.changes:
        assert relative(made, stock) > DIFFERENT, f"{name} does nothing"
    if other.node is not _same:
        plain = known.image((), lambda: tiny.sample(steps=STEPS, size=SIZE))
        assert relative(stock, plain) > DIFFERENT, f"{with_what} does nothing"


_MODULES = {"AlignYourStepsScheduler": "nodes_align_your_steps", "GITSScheduler": "nodes_gits"}
_VALUES = {"AlignYourStepsScheduler": ("SD1",), "GITSScheduler": (1.2,)}


def test_the_table_in_the_documents() -> None:
    """It says of each pair what the tests show."""
    page = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
    lines = [line.strip("|").split("|") for line in page.read_text(encoding="utf-8").splitlines()]
    table = [[cell.strip() for cell in line] for line in lines if len(line) == len(OURS) + 1]
    said = {row[0]: row[1:] for row in table if row[0] in OTHERS}
    shown = {
        name: ["refused" if ours in its.refused else "aside" if ours in its.aside else "✓" for ours in OURS]
        for name, its in OTHERS.items()
    }
    assert {name: said.get(name) for name in OTHERS} == shown

"""Dynamic CFG: exact rows, the right image, and a step aside wherever something needs uncond."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from .deepcache_oracle import with_oracle
from .test_composition import _control, _core_node
from .test_forecast import _hooked
from .test_schedule_places import restarting
from .tiny_unet import TinyUNet, build, relative, watched

SAME = 2e-5  # one row alone against the same row in a batch of two
STEPS = 8


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("slim")


@pytest.fixture(scope="module")
def attach(pack: ModuleType) -> Callable[..., Any]:
    dynamic_cfg = importlib.import_module("speedlab.techniques.guidance.dynamic_cfg")
    return lambda model, **options: dynamic_cfg.attach_dynamic_cfg(model, dynamic_cfg.DynamicCFGConfig(**options))


@pytest.fixture(scope="module")
def deepcache(pack: ModuleType) -> Callable[..., Any]:
    module = importlib.import_module("speedlab.techniques.deepcache.attach")
    return lambda model, **options: module.attach_deepcache(model, module.DeepCacheConfig(**options))


def _cond_only_from(model: Any, first: int) -> Any:
    """Stock ComfyUI, which evaluates uncond at every step and from step `first` on uses nothing made with it."""

    def is_guided(args: dict) -> bool:
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"][:-1]
        return int((sigmas >= args["sigma"][0] * (1 - 1e-5)).sum()) <= first

    def post_cfg(args: dict) -> torch.Tensor:
        return args["denoised"] if is_guided(args) else args["cond_denoised"]

    def in_guided(function: Callable) -> Callable:
        return lambda args: function(args) if is_guided(args) else args["conds_out"]

    clone = model.clone()
    before = clone.model_options.get("sampler_pre_cfg_function", [])
    clone.model_options["sampler_pre_cfg_function"] = [in_guided(function) for function in before]
    clone.set_model_sampler_post_cfg_function(post_cfg, disable_cfg1_optimization=True)
    return clone


@pytest.mark.parametrize(
    ("steps", "stop_at", "uncond"), [(20, 0.75, 15), (20, 0.5, 10), (10, 0.0, 0), (7, 0.5, 3), (30, 0.7, 21)]
)
def test_rows(tiny: TinyUNet, attach: Any, steps: int, stop_at: float, uncond: int) -> None:
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, stop_at=stop_at), steps=steps)
    assert [rows for rows, _ in calls] == [2] * uncond + [1] * (steps - uncond)


@pytest.mark.parametrize(
    ("options", "uncond"),
    [
        ({"denoise": 0.5}, 10),  # steps 20 to 39 of 40, uncond up to 30
        ({"denoise": 0.2}, 0),  # steps 80 to 99 of 100
        ({"start_step": 10}, 5),
        ({"start_step": 16}, 0),
        ({"last_step": 12}, 12),
        ({"last_step": 18, "force_full_denoise": True}, 15),
        ({"start_step": 5, "last_step": 18, "force_full_denoise": True}, 10),
    ],
)
@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_rows_of_partial_runs(tiny: TinyUNet, attach: Any, options: dict, uncond: int, sampler: str) -> None:
    """Fractions count the steps of the whole schedule, of which a partial run sees a part."""
    latent = torch.randn(1, 4, 8, 8)
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, stop_at=0.75), steps=20, sampler=sampler, latent=latent, **options)
    assert sum(rows == 2 for rows, _ in calls) == uncond
    assert [rows for rows, _ in calls] == sorted((rows for rows, _ in calls), reverse=True)


def test_rows_of_split_sigmas(tiny: TinyUNet, attach: Any) -> None:
    """The samplers for custom sigmas cut the same way."""
    import comfy.samplers

    model = attach(tiny.model, stop_at=0.75)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 20)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.cond(1), tiny.cond(2))
    guider.set_cfg(5.0)
    with tiny.counted() as calls, torch.inference_mode():
        latent = torch.randn(1, 4, 8, 8)
        guider.sample(latent, latent, comfy.samplers.sampler_object("euler"), sigmas[12:], disable_pbar=True, seed=0)
    assert [rows for rows, _ in calls] == [2] * 3 + [1] * 5


def test_easy_cache_is_refused(tiny: TinyUNet, attach: Any) -> None:
    easy = _node("nodes_easycache", "EasyCacheNode", 0.2, 0.15, 0.95, False)
    for model in (attach(easy(tiny.model)), easy(attach(tiny.model))):
        with pytest.raises(Exception, match="Dynamic CFG and EasyCache"):
            tiny.sample(model)


def test_rows_of_heun(tiny: TinyUNet, attach: Any) -> None:
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, stop_at=0.5), steps=6, sampler="heun")
    assert [rows for rows, _ in calls] == [2] * 5 + [1] * 6  # 1 + 2 + 2 evaluations of steps 0 to 2


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_sde", "uni_pc", "lcm", "euler_ancestral"])
def test_picture(tiny: TinyUNet, attach: Any, sampler: str) -> None:
    ours = tiny.sample(attach(tiny.model, stop_at=0.5), sampler=sampler, batch=2)
    assert relative(ours, tiny.sample(_cond_only_from(tiny.model, 4), sampler=sampler, batch=2)) < SAME
    assert relative(ours, tiny.sample(sampler=sampler, batch=2)) > 1e-4


def test_partial_runs_and_masks(tiny: TinyUNet, attach: Any) -> None:
    latent, mask = torch.randn(1, 4, 9, 13), torch.zeros(1, 1, 9, 13)
    mask[..., :5] = 1.0
    # Of 16, 8 and 8 steps of the whole schedule uncond goes after 12, 6 and 6; the runs begin at 8, 2 and 0.
    for options, first in (({"denoise": 0.5}, 4), ({"start_step": 2}, 4), ({"noise_mask": mask}, 6)):
        ours = tiny.sample(attach(tiny.model, stop_at=0.75), latent=latent, **options)
        assert relative(ours, tiny.sample(_cond_only_from(tiny.model, first), latent=latent, **options)) < SAME


def test_off_is_the_same_object(tiny: TinyUNet, attach: Any) -> None:
    assert attach(tiny.model, stop_at=1.0) is tiny.model
    assert attach(tiny.model, mode="adaptive", similarity=1.0) is tiny.model


def test_input_model_is_untouched(tiny: TinyUNet, attach: Any) -> None:
    before = tiny.sample()
    tiny.sample(attach(tiny.model, stop_at=0.5))
    assert not any(tiny.model.wrappers.values())
    assert "speedlab" not in repr(tiny.model.model_options)
    assert torch.equal(tiny.sample(), before)


def test_no_guidance_is_bit_identical(tiny: TinyUNet, attach: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert torch.equal(tiny.sample(attach(tiny.model, stop_at=0.5), cfg=1.0), tiny.sample(cfg=1.0))
    assert "Dynamic CFG" not in caplog.text


def _similarities(tiny: TinyUNet, batch: int) -> list[float]:
    """What Adaptive Guidance looks at, from stock ComfyUI: the least similar latent of each step."""
    found = []

    def look(args: dict) -> torch.Tensor:
        noises = [(args["input"] - args[name]).flatten(1) for name in ("cond_denoised", "uncond_denoised")]
        found.append(float(torch.nn.functional.cosine_similarity(*noises).min()))
        return args["denoised"]

    clone = tiny.model.clone()
    clone.set_model_sampler_post_cfg_function(look)
    tiny.sample(clone, batch=batch)
    return found


@pytest.mark.parametrize("batch", [1, 2])
def test_adaptive(tiny: TinyUNet, attach: Any, batch: int) -> None:
    seen = _similarities(tiny, batch)
    ordered = sorted(seen[1:-1])
    threshold = (ordered[len(ordered) // 2] + ordered[len(ordered) // 2 - 1]) / 2
    agreed = next(step for step, value in enumerate(seen) if value > threshold)
    with tiny.counted() as calls:
        ours = tiny.sample(attach(tiny.model, mode="adaptive", similarity=threshold), batch=batch)
    guided = agreed + 1
    assert [rows for rows, _ in calls] == [2 * batch] * guided + [batch] * (STEPS - guided)
    assert relative(ours, tiny.sample(_cond_only_from(tiny.model, guided), batch=batch)) < SAME


def test_adaptive_that_never_agrees_is_bit_identical(tiny: TinyUNet, attach: Any) -> None:
    model = attach(tiny.model, mode="adaptive", similarity=0.999999)
    assert torch.equal(tiny.sample(model), tiny.sample())


def _node(module: str, name: str, *values: Any) -> Callable[[Any], Any]:
    def patch(model: Any) -> Any:
        node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        return node.execute(model, *values).args[0]

    return patch


def _custom_cfg(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_sampler_cfg_function(lambda args: args["uncond"] + 3.0 * (args["cond"] - args["uncond"]))
    return clone


def _post_cfg(function: Callable[[dict], torch.Tensor]) -> Callable[[Any], Any]:
    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(function)
        return clone

    return patch


def _by_name(uncond_denoised: torch.Tensor, denoised: torch.Tensor, **_: Any) -> torch.Tensor:
    return denoised + 0.1 * uncond_denoised


def _swallowing(args: dict) -> torch.Tensor:
    try:
        return args["denoised"] + 0.1 * args["uncond_denoised"]
    except Exception:
        return args["denoised"] * 0.0


COMBINE: dict[str, Callable[[Any], Any]] = {
    "mahiro": _node("nodes_mahiro", "Mahiro"),
    "tcfg": _node("nodes_tcfg", "TCFG"),
    "apg": _node("nodes_apg", "APG", 1.0, 2.0, 0.0),
    "custom cfg function": _custom_cfg,
    "reads it by get": _post_cfg(lambda args: args["denoised"] + 0.1 * args.get("uncond_denoised")),
    "takes arguments apart": _post_cfg(lambda args: _by_name(**args)),
    "copies first": _post_cfg(lambda args: dict(args)["uncond_denoised"] * 0.1 + args["denoised"]),
    "copies by method": _post_cfg(lambda args: args.copy()["uncond_denoised"] * 0.1 + args["denoised"]),
    "swallows errors": _post_cfg(_swallowing),
}


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", COMBINE)
def test_what_combines_both_predictions_acts_where_both_are(tiny: TinyUNet, attach: Any, name: str, mode: str) -> None:
    options, first = ({"stop_at": 0.5}, 2) if mode == "fixed" else ({"mode": "adaptive", "similarity": -1.0}, 1)
    patch = COMBINE[name]
    stock = tiny.sample(_cond_only_from(patch(tiny.model), first), size=(16, 16), steps=4)
    for model in (attach(patch(tiny.model), **options), patch(attach(tiny.model, **options))):
        model, notes = with_notes(model)
        with tiny.counted() as calls:
            assert relative(tiny.sample(model, size=(16, 16), steps=4), stock) < SAME
        assert [rows for rows, _ in calls] == [2] * first + [1] * (4 - first)
        assert sum("acts in the steps with uncond alone" in note for note in notes) == 1


def with_notes(model: Any) -> tuple[Any, list[str]]:
    """A clone of `model`, and what the record of its runs would be told."""
    notes: list[str] = []
    run_notes = importlib.import_module("speedlab.patching.notes")
    clone = model.clone()
    clone.model_options["transformer_options"] = {
        **clone.model_options["transformer_options"],
        run_notes.REPORT_NOTE: notes.append,
    }
    return clone, notes


def _own_evaluation(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_sampler_calc_cond_batch_function(
        lambda args: importlib.import_module("comfy.samplers").calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )
    )
    return clone


def _mixing_rows(model: Any) -> Any:
    """As NAGuidance of newer ComfyUIs: attention of the prompt, with that of the negative one beside it."""

    def mix(out: torch.Tensor, extra: dict) -> torch.Tensor:
        if {0, 1} <= set(extra["cond_or_uncond"]):
            chunks = dict(zip(extra["cond_or_uncond"], out.chunk(len(extra["cond_or_uncond"])), strict=True))
            chunks[0].mul_(1.5).sub_(0.5 * chunks[1])
        return out

    clone = model.clone()
    clone.set_model_attn1_output_patch(mix)
    clone.model_options["disable_cfg1_optimization"] = True
    return clone


@pytest.mark.parametrize(
    "options", [{"stop_at": 0.5}, {"mode": "adaptive", "similarity": -1.0}, {"stop_at": 1.0, "uncond_interval": 2}]
)
@pytest.mark.parametrize(
    "patch",
    [_node("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0), _own_evaluation, _mixing_rows],
    ids=["sag", "own evaluation", "mixing rows"],
)
def test_steps_aside(tiny: TinyUNet, attach: Any, patch: Any, options: dict, caplog: pytest.LogCaptureFixture) -> None:
    stock = tiny.sample(patch(tiny.model), size=(16, 16), steps=4)
    with caplog.at_level(logging.WARNING):
        ours = tiny.sample(attach(patch(tiny.model), **options), size=(16, 16), steps=4)
    assert torch.equal(ours, stock)
    assert caplog.text.count("uncond stays on") == 1


# Guided steps of core's schedulers, counted by hand for SD 1.5's sigmas.
@pytest.mark.parametrize(
    ("scheduler", "steps", "both", "lower"),
    [
        ("karras", 20, 9, 14),
        *(pytest.param(*case, marks=pytest.mark.full)
          for case in (("karras", 30, 15, 22), ("normal", 20, 14, 18), ("simple", 30, 22, 28))),
    ],
)  # fmt: skip
def test_rows_of_a_sigma_window(tiny: TinyUNet, attach: Any, scheduler: str, steps: int, both: int, lower: int) -> None:
    for limits, guided in (({"sigma_low": 0.28, "sigma_high": 5.42}, both), ({"sigma_low": 0.28}, lower)):
        for mode in ({"stop_at": 1.0}, {"mode": "adaptive", "similarity": 1.0}):
            with tiny.counted() as calls:
                tiny.sample(attach(tiny.model, **mode, **limits), steps=steps, scheduler=scheduler)
            rows = [rows for rows, _ in calls]
            assert rows.count(2) == guided and len(rows) == steps
            assert rows.index(2) == (0 if guided == lower else next(n for n, count in enumerate(rows) if count == 2))
            assert set(rows[rows.index(2) :][:guided]) == {2}


def test_rows_of_a_window_of_steps(tiny: TinyUNet, attach: Any) -> None:
    model = attach(tiny.model, start_at=0.25)
    for options, expected in (
        ({"steps": 20}, [1] * 5 + [2] * 10 + [1] * 5),
        ({"steps": 6, "sampler": "heun"}, [1] + [2] * 6 + [1] * 4),
        ({"steps": 20, "denoise": 0.5, "latent": torch.randn(1, 4, 8, 8)}, [2] * 10 + [1] * 10),
    ):
        with tiny.counted() as calls:
            tiny.sample(model, **options)
        assert [rows for rows, _ in calls] == expected, options


def _stock_with(model: Any, way_of: Callable[[int], str]) -> Any:
    """Stock ComfyUI evaluating all, in which uncond is then the earlier difference, or as good as missing."""
    import comfy.samplers

    kept: dict[str, Any] = {}

    def evaluate(args: dict) -> list[torch.Tensor]:
        clean = {k: v for k, v in args["model_options"].items() if k != "sampler_calc_cond_batch_function"}
        cond, uncond = comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], clean)
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"][:-1]
        sigma = args["sigma"][0]
        way = way_of(int((sigmas >= sigma * (1 - 1e-5)).sum()) - 1)
        if way == "full":
            kept.update(difference=(cond - uncond) / sigma)
        elif way == "difference":
            uncond = cond - kept["difference"] * sigma
        return [cond, cond if way == "none" else uncond]

    clone = model.clone()
    clone.set_model_sampler_calc_cond_batch_function(evaluate)
    return clone


def _way(step: int, first: int, stop: int, interval: int) -> str:
    if step >= stop:
        return "none"
    return "difference" if step >= first and (step - first + 1) % interval else "full"


@pytest.mark.parametrize(("steps", "interval", "rows"), [(20, 2, 30), (30, 2, 44), (20, 3, 28)])
def test_rows_where_a_difference_stands_for_uncond(
    tiny: TinyUNet, attach: Any, steps: int, interval: int, rows: int
) -> None:
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, stop_at=0.75, uncond_interval=interval), steps=steps)
    ways = [_way(step, steps // 4, int(steps * 0.75), interval) for step in range(steps)]
    assert [number for number, _ in calls] == [2 if way == "full" else 1 for way in ways]
    assert sum(number for number, _ in calls) == rows


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_sde", "uni_pc", "euler_cfg_pp", "euler_ancestral"])
def test_a_difference_stands_for_uncond(tiny: TinyUNet, attach: Any, sampler: str) -> None:
    cfg = 1.5 if "cfg_pp" in sampler else 5.0
    ours = tiny.sample(attach(tiny.model, stop_at=1.0, uncond_interval=2), sampler=sampler, batch=2, cfg=cfg)
    reference = _stock_with(tiny.model, lambda step: _way(step, 2, 8, 2))
    assert relative(ours, tiny.sample(reference, sampler=sampler, batch=2, cfg=cfg)) < SAME
    assert relative(ours, tiny.sample(sampler=sampler, batch=2, cfg=cfg)) > 1e-5


def test_cfg_pp_keeps_a_value_behind_stop_at(tiny: TinyUNet, attach: Any) -> None:
    model, notes = with_notes(attach(tiny.model, stop_at=0.5, uncond_interval=2))
    with tiny.counted() as calls:
        tiny.sample(model, sampler="euler_cfg_pp", cfg=1.5)
    assert [rows for rows, _ in calls] == [2, 2, 1, 2, 1, 1, 1, 1]
    assert sum("uncond stays on" in note for note in notes) == 1


def test_a_difference_of_other_conds_is_not_used(tiny: TinyUNet, attach: Any) -> None:
    """A prompt for a part of the steps alone: where it comes or goes uncond is evaluated."""
    import node_helpers

    early, late = (
        node_helpers.conditioning_set_values(tiny.cond(n), {"start_percent": start, "end_percent": end})
        for n, start, end in ((1, 0.0, 0.5), (3, 0.5, 1.0))
    )
    sigmas = importlib.import_module("comfy.samplers").calculate_sigmas(
        tiny.model.get_model_object("model_sampling"), "normal", 8
    )
    middle = tiny.model.get_model_object("model_sampling").percent_to_sigma(0.5)
    changes = int((sigmas[:-1] >= middle).sum())
    model, notes = with_notes(attach(tiny.model, stop_at=1.0, uncond_from=0.0, uncond_interval=8))
    for positive in ([*early, *late], _control(tiny, (0.0, 0.5))(tiny.cond(1))):
        notes.clear()
        with tiny.counted() as calls:
            tiny.sample(model, positive=positive)
        rows = [number for number, _ in calls]
        assert 0 < changes < 8
        assert [n for n, number in enumerate(rows) if number == 2] == [0, changes, 7]
        assert len(notes) == 1 and "that act change during this run" in notes[0]


def test_a_hook_with_keyframes_leaves_uncond_on(tiny: TinyUNet, attach: Any) -> None:
    model, notes = with_notes(attach(tiny.model, stop_at=1.0, uncond_interval=2))
    positive = _hooked(tiny, 1.0, 0.2)
    assert torch.equal(tiny.sample(model, positive=positive), tiny.sample(positive=positive))
    assert sum("a LoRA hook with keyframes" in note for note in notes) == 1


def _karras(tiny: TinyUNet) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "karras", 8)


def _restarted(tiny: TinyUNet, model: Any, sigmas: torch.Tensor) -> tuple[list, list[str]]:
    """The calls and the notes of a run of steps 0 to 5, then 3 and on again."""
    import comfy.samplers

    model, notes = with_notes(model)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.cond(1), tiny.cond(2))
    guider.set_cfg(5.0)
    latent = torch.zeros(1, 4, 8, 8)
    with tiny.counted() as calls, torch.inference_mode():
        guider.sample(latent + 1.0, latent, restarting(range(3, 6)), sigmas, disable_pbar=True, seed=0)
    return calls, notes


@pytest.mark.parametrize(
    "options", [{"stop_at": 1.0, "uncond_from": 0.0, "uncond_interval": 10}, {"mode": "adaptive", "similarity": -1.0}]
)
def test_nothing_of_before_a_restart_is_used(tiny: TinyUNet, attach: Any, options: dict) -> None:
    calls, notes = _restarted(tiny, attach(tiny.model, **options), _karras(tiny))
    assert [n for n, (rows, _) in enumerate(calls) if rows == 2] == [0, 6]  # 0 to 5, then 3 again
    assert notes == ["Dynamic CFG: this sampler goes back to steps that it had left, and evaluates uncond there."]


def test_nothing_of_before_a_restart_outside_of_the_window_is_used(tiny: TinyUNet, attach: Any) -> None:
    """The step that the sampler goes back to has no uncond, and the one after it no difference of before."""
    sigmas = _karras(tiny)
    window = {"sigma_high": float(sigmas[3] + sigmas[4]) / 2, "uncond_from": 0.0, "uncond_interval": 10}
    calls, _ = _restarted(tiny, attach(tiny.model, stop_at=1.0, **window), sigmas)
    assert [n for n, (rows, _) in enumerate(calls) if rows == 2] == [4, 7]  # 0 to 5, then 3 again


@pytest.mark.parametrize("options", [{"stop_at": 1.0, "uncond_interval": 2}, {"mode": "adaptive"}])
def test_a_prediction_that_is_no_number(
    tiny: TinyUNet, attach: Any, options: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """Of uncond, at step 3, and nothing else: nothing that it gave stands for another one, or ends the guidance."""
    seen: list[bool] = []

    def broken(executor: Any, *args: Any) -> Any:
        out = executor(*args)
        return [out[0], out[1] * float("nan")] if len(seen) == 3 else out

    def repaired(args: dict) -> torch.Tensor:
        seen.append(bool(torch.isfinite(args["denoised"]).all()))
        return torch.where(torch.isfinite(args["denoised"]), args["denoised"], args["cond_denoised"])

    model = tiny.model.clone()
    model.add_wrapper_with_key("calc_cond_batch", "broken", broken)
    model.set_model_sampler_post_cfg_function(repaired)
    with tiny.counted() as calls, caplog.at_level(logging.WARNING):
        tiny.sample(attach(model, similarity=0.999999, **options))
    assert [n for n, finite in enumerate(seen) if not finite] == [3]
    assert caplog.text.count("held NaN or infinity") == 1
    if "uncond_interval" in options:
        assert [rows for rows, _ in calls] == [2, 2, 1, 2, 2, 2, 1, 2]


@pytest.mark.parametrize("options", [{"uncond_from": 0.0, "uncond_interval": 2}, {"mode": "adaptive"}])
def test_a_repeat_that_gives_numbers_leaves_nothing_to_tell(
    tiny: TinyUNet, attach: Any, options: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """As Attention Backend repeats an evaluation with SDPA."""
    calls: list[bool] = []

    def broken(executor: Any, *args: Any) -> Any:
        calls.append(True)
        return [out * float("nan") if len(calls) == 1 else out for out in executor(*args)]

    def repeated(executor: Any, *args: Any) -> Any:
        out = executor(*args)
        return out if torch.isfinite(out).all() else executor(*args)

    model = tiny.model.clone()
    model.add_wrapper_with_key("calc_cond_batch", "broken", broken)
    model.add_wrapper_with_key("predict_noise", "repeated", repeated)
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(tiny.sample(attach(model, stop_at=1.0, similarity=0.999999, **options))).all()
    assert len(calls) == STEPS + 1
    assert "NaN" not in caplog.text


GOES_ON = {
    "apg": _core_node("nodes_apg", "APG", 0.5, 5.0, -0.3),
    "tcfg": _core_node("nodes_tcfg", "TCFG"),
    "rescale": _core_node("nodes_model_advanced", "RescaleCFG", 0.7),
    "perturbed": _core_node("nodes_pag", "PerturbedAttentionGuidance", 3.0),
}


@pytest.mark.parametrize("name", GOES_ON)
def test_what_combines_both_predictions_goes_on_where_a_difference_stands(
    tiny: TinyUNet, attach: Any, name: str
) -> None:
    patch, options = GOES_ON[name], {"stop_at": 1.0, "uncond_interval": 2, "uncond_from": 0.2}
    how = {"size": (16, 16), "steps": 5}
    expected = tiny.sample(_stock_with(patch(tiny.model), lambda step: _way(step, 1, 5, 2)), **how)
    for model in (attach(patch(tiny.model), **options), patch(attach(tiny.model, **options))):
        assert relative(tiny.sample(model, **how), expected) < SAME


@pytest.mark.parametrize(("sampler", "evaluations"), [("dpmpp_sde", 2), ("seeds_3", 3)])
def test_a_sigma_window_begins_and_ends_with_a_step(
    tiny: TinyUNet, attach: Any, sampler: str, evaluations: int
) -> None:
    """Its evaluations between two sigmas are guided as the step's first is; image to image counts by sigma too."""
    window = {"stop_at": 1.0, "sigma_low": 0.28, "sigma_high": 5.42}
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, **window), steps=10, sampler=sampler, scheduler="karras")
    assert [rows for rows, _ in calls] == [
        *[1] * 3 * evaluations, *[2] * 4 * evaluations, *[1] * (2 * evaluations + 1)
    ]  # fmt: skip
    with tiny.counted() as calls:
        tiny.sample(
            attach(tiny.model, **window), steps=5, scheduler="karras", denoise=0.5, latent=torch.ones(1, 4, 8, 8)
        )
    assert [rows for rows, _ in calls] == [2, 2, 1, 1, 1]


def test_windows_and_differences_with_deepcache(tiny: TinyUNet, attach: Any, deepcache: Any) -> None:
    options = {"stop_at": 0.9, "start_at": 0.2, "uncond_interval": 2, "uncond_from": 0.3}
    oracle = tiny.sample(with_oracle(tiny, attach(tiny.model, **options), branch=1), steps=12)
    for model in (
        attach(deepcache(tiny.model, branch=1), **options),
        deepcache(attach(tiny.model, **options), branch=1),
    ):
        assert relative(tiny.sample(model, steps=12), oracle) < 1e-6


@pytest.mark.parametrize(
    "sampler", ["euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp"]
)
def test_cfg_pp(tiny: TinyUNet, attach: Any, sampler: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours = tiny.sample(attach(tiny.model, stop_at=0.5), sampler=sampler, cfg=1.5)
    assert torch.equal(ours, tiny.sample(sampler=sampler, cfg=1.5))
    assert caplog.text.count("cfg_pp") == 1


def test_perturbed_attention_goes_on(tiny: TinyUNet, attach: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It reads cond alone, so it composes: its term stays, CFG's goes."""
    patch = _node("nodes_pag", "PerturbedAttentionGuidance", 3.0)
    reference = tiny.sample(patch(_cond_only_from(tiny.model, 4)), size=(16, 16))
    for model in (attach(patch(tiny.model), stop_at=0.5), patch(attach(tiny.model, stop_at=0.5))):
        assert relative(tiny.sample(model, size=(16, 16)), reference) < SAME
    assert "Dynamic CFG" not in caplog.text


def _guided(guider: Any, tiny: TinyUNet, **options: Any) -> torch.Tensor:
    import comfy.samplers

    latent = torch.zeros(1, 4, 8, 8)
    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "normal", 6)
    with torch.inference_mode():
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0, **options)


@pytest.mark.parametrize("kind", ["Guider_PerpNeg", "Guider_DualCFG"])
def test_other_guiders(tiny: TinyUNet, attach: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    modules = {"Guider_PerpNeg": "nodes_perpneg", "Guider_DualCFG": "nodes_custom_sampler"}

    def run(model: Any) -> torch.Tensor:
        guider = getattr(importlib.import_module(f"comfy_extras.{modules[kind]}"), kind)(model)
        guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
        guider.set_cfg(5.0, 1.0) if kind == "Guider_PerpNeg" else guider.set_cfg(5.0, 2.0)
        return _guided(guider, tiny)

    with caplog.at_level(logging.WARNING):
        ours = run(attach(tiny.model, stop_at=0.5))
    assert torch.equal(ours, run(tiny.model))
    assert caplog.text.count(kind) == 1


@pytest.mark.parametrize("error", ["interrupt", "failure"])
def test_guider_is_restored(tiny: TinyUNet, attach: Any, error: str) -> None:
    import comfy.model_management
    import comfy.samplers

    raised = comfy.model_management.InterruptProcessingException if error == "interrupt" else RuntimeError

    def fail(args: dict) -> torch.Tensor:
        raise raised("stop")

    model = attach(tiny.model, stop_at=0.0)
    model.set_model_sampler_post_cfg_function(fail)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.cond(1), tiny.cond(2))
    guider.set_cfg(5.0)
    with pytest.raises(raised):
        _guided(guider, tiny)
    assert guider.cfg == 5.0
    assert "speedlab_run_states" not in repr(model.model_options)


def test_differences_are_let_go_when_a_run_is_cancelled(tiny: TinyUNet, attach: Any, living: Any) -> None:
    import comfy.model_management

    runs = living(importlib.import_module("speedlab.techniques.guidance.dynamic_cfg").Run)
    model = attach(tiny.model, stop_at=1.0, uncond_interval=2)
    expected, kept = tiny.sample(model), []

    def stop(step: int, *_: Any) -> None:
        kept.extend(run.difference._kept for run in runs())
        if step == 4:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(model, callback=stop)
    assert kept and not any(kept)
    assert torch.equal(tiny.sample(model), expected)


@pytest.mark.parametrize("options", [{"stop_at": 0.5}, {"mode": "adaptive", "similarity": 0.5}])
def test_timing_decides_no_bits(
    tiny: TinyUNet, attach: Any, pack: ModuleType, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """No layer is computed in another way, however fast that would be here; Precision does it where it is asked to."""
    conv_as_matmul = importlib.import_module("speedlab.techniques.cpu.conv_as_matmul")
    monkeypatch.setattr(conv_as_matmul, "_FEWEST_WEIGHTS", 1)
    latents = []
    for most in (0, 1 << 30):
        monkeypatch.setattr(conv_as_matmul, "most_pixels_here", lambda most=most: most)
        seen: list[int] = []
        with tiny.counted() as calls:
            latents.append(tiny.sample(watched(attach(tiny.model, **options), lambda: _layers_changed(tiny), seen)))
        assert {rows for rows, _ in calls} == {1, 2} and not any(seen)
    assert torch.equal(*latents)


def _layers_changed(tiny: TinyUNet) -> int:
    return sum("forward" in vars(part) for part in tiny.unet.modules())


def test_every_latent_of_a_batch_has_to_agree(pack: ModuleType) -> None:
    module = importlib.import_module("speedlab.techniques.guidance.dynamic_cfg")
    run = module.Run(module.DynamicCFGConfig("adaptive", similarity=0.9))
    noisy, apart = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for uncond, converged in ((apart, False), (alike, True)):
        predictions = {"input": noisy, "cond_denoised": alike, "uncond_denoised": uncond, "model_options": {}}
        module._compare(run, None, predictions)
        assert run.converged is converged


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_sde"])
def test_with_deepcache(tiny: TinyUNet, attach: Any, deepcache: Any, sampler: str, mode: str) -> None:
    """Both orders, batched and split: the plain implementation of DeepCache under Dynamic CFG is the reference."""
    options = {"stop_at": 0.5} if mode == "fixed" else {"mode": "adaptive", "similarity": -1.0}
    oracle = tiny.sample(with_oracle(tiny, attach(tiny.model, **options), branch=1), sampler=sampler)
    for model in (
        attach(deepcache(tiny.model, branch=1), **options),
        deepcache(attach(tiny.model, **options), branch=1),
    ):
        assert relative(tiny.sample(model, sampler=sampler), oracle) < 1e-6
        with tiny.split():
            assert relative(tiny.sample(model, sampler=sampler), oracle) < SAME


def test_rows_with_deepcache(tiny: TinyUNet, attach: Any, deepcache: Any) -> None:
    with tiny.counted() as calls:
        tiny.sample(deepcache(attach(tiny.model, stop_at=0.75), interval=3), steps=20)
    assert calls == [(2 if step < 15 else 1, step % 3 == 0) for step in range(20)]


def test_the_record_knows_the_options(tiny: TinyUNet, attach: Any, deepcache: Any, pack: ModuleType) -> None:
    patching = importlib.import_module("speedlab.patching.wrappers")
    notes = patching.accelerators(attach(deepcache(tiny.model), stop_at=0.5))
    assert [note.name for note in notes] == ["deepcache", "dynamic_cfg"]
    assert notes[1].describe() == "dynamic_cfg(mode=fixed, stop_at=0.5)"
    model = attach(tiny.model, mode="adaptive", start_at=0.1, sigma_high=5.42, uncond_interval=3)
    assert patching.accelerators(model)[0].describe() == (
        "dynamic_cfg(mode=adaptive, similarity=0.99, start_at=0.1, sigma_high=5.42, uncond_interval=3, "
        "uncond_from=0.25)"
    )


def test_node(tiny: TinyUNet, pack: ModuleType, attach: Any) -> None:
    node = importlib.import_module(f"{pack.__name__}.nodes.accelerate").DynamicCFG
    inputs = node.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "mode", "stop_at", "similarity"]
    defaults = {name: spec[1]["default"] for name, spec in inputs.items() if name != "model"}
    (model,) = node().apply(tiny.model, **defaults)
    assert torch.equal(tiny.sample(model), tiny.sample(attach(tiny.model)))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "other"},
        {"stop_at": 1.5},
        {"mode": "adaptive", "similarity": 1.5},
        {"start_at": -0.1},
        {"sigma_low": float("nan")},
        {"uncond_interval": 0},
    ],
)
def test_bad_values(tiny: TinyUNet, attach: Any, options: dict) -> None:
    with pytest.raises(ValueError, match=r"it must|choose one of|must be above"):
        attach(tiny.model, **options)


def test_differences_with_forecast(tiny: TinyUNet, attach: Any, pack: ModuleType) -> None:
    """In both orders; Forecast continues no uncond but the model's own, from the last two steps that it evaluated."""
    module = importlib.import_module("speedlab.techniques.forecast.attach")
    config, options = module.ForecastConfig(mode="fixed"), {"stop_at": 1.0, "uncond_interval": 2, "uncond_from": 0.0}
    planned, expected = {4, 6, 8, 9, 11, 12, 14, 15, 17}, []
    for step in range(20):
        rows = 2 if step == 0 or step % 2 else 1
        if step in planned and all(before == 2 or rows == 1 for before in expected[-2:]):
            continue
        expected.append(rows)
    results = []
    for model in (
        attach(module.attach_forecast(tiny.model, config), **options),
        module.attach_forecast(attach(tiny.model, **options), config),
    ):
        with tiny.counted() as calls:
            results.append(tiny.sample(model, steps=20))
        assert [rows for rows, _ in calls] == expected
    assert torch.equal(*results)


def test_a_range_of_sigmas_that_holds_none_is_said(tiny: TinyUNet, attach: Any, pack: ModuleType) -> None:
    errors = importlib.import_module("speedlab.common.errors")
    with pytest.raises(errors.SpeedLabError, match=r"sigma_high is 0\.28 and sigma_low 5\.42.*no limit"):
        attach(tiny.model, sigma_low=5.42, sigma_high=0.28)
    with pytest.raises(errors.SpeedLabError, match=r"start_at is 0\.8 and stop_at 0\.75.*below stop_at"):
        attach(tiny.model, start_at=0.8)

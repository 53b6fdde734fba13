"""DeepCache under every way of sampling: each run is compared with a plain implementation on ComfyUI's full forward."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from .deepcache_oracle import with_oracle
from .tiny_unet import TinyUNet, build, relative

Attach = Callable[..., Any]
EXACT = 1e-6


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build("sd15")


@pytest.fixture(scope="module")
def deepcache(pack: ModuleType) -> ModuleType:
    return importlib.import_module("speedlab.techniques.deepcache.attach")


@pytest.fixture(scope="module")
def attach(deepcache: ModuleType) -> Attach:
    return lambda model, **options: deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(**options))


def _region(tiny: TinyUNet, seed: int, **entries: Any) -> list:
    tensor, extra = tiny.cond(seed)[0]
    return [[tensor, {**extra, **entries}]]


def _regions(tiny: TinyUNet) -> list:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1.0
    return [
        *_region(tiny, 1),
        *_region(tiny, 3, area=(8, 4, 0, 4), strength=0.8),
        *_region(tiny, 4, area=(8, 4, 0, 0), strength=0.8),  # same shape as the one before, another cond
        *_region(tiny, 5, mask=mask, mask_strength=1.0),
        *_region(tiny, 6, start_percent=0.4, end_percent=0.8),
    ]


def test_what_is_kept_is_a_copy(pack: ModuleType) -> None:
    """A CUDA graph overwrites what it returned, and a cached step may write to what it is given."""
    features = importlib.import_module("speedlab.techniques.deepcache.features")
    run = features.Run(features.DeepCacheConfig())
    made = torch.ones(2, 3, 4, 4)
    run.store(["cond", "uncond"], features.Evaluation(0, 0), made)
    made.zero_()
    for _ in range(2):
        given = run.recall(["cond", "uncond"], features.Evaluation(1, 0))
        assert torch.equal(given, torch.ones(2, 3, 4, 4))
        given.zero_()


def test_features_from_before_a_sampler_went_back_are_of_another_image(pack: ModuleType) -> None:
    """Noise came on top: steps 0, 1 and 2 were evaluated, and step 1, a cached one, comes again."""
    features = importlib.import_module("speedlab.techniques.deepcache.features")
    position = importlib.import_module("speedlab.patching.position")
    for went_back in (False, True):
        run = features.Run(features.DeepCacheConfig(interval=4))
        run.store(["cond"], features.Evaluation(0, 0), torch.ones(1, 3, 4, 4))
        with run.evaluating(position.Position(1, 8, position.Part(0, 8), 2, went_back, 1.0)):
            assert (run.recall(["cond"], run.current) is None) is went_back


CASES: dict[str, Callable[[TinyUNet], dict[str, Any]]] = {
    "euler": lambda tiny: {},
    "ancestral": lambda tiny: {"sampler": "euler_ancestral"},
    "heun": lambda tiny: {"sampler": "heun"},
    "heunpp2": lambda tiny: {"sampler": "heunpp2", "scheduler": "karras"},
    "dpmpp_sde": lambda tiny: {"sampler": "dpmpp_sde", "scheduler": "karras"},
    "dpmpp_2m": lambda tiny: {"sampler": "dpmpp_2m", "scheduler": "karras"},
    "unipc": lambda tiny: {"sampler": "uni_pc"},
    "lcm": lambda tiny: {"sampler": "lcm", "scheduler": "sgm_uniform", "cfg": 1.5},
    "ddim": lambda tiny: {"sampler": "ddim", "scheduler": "ddim_uniform"},
    "img2img": lambda tiny: {"latent": torch.randn(1, 4, 8, 8), "denoise": 0.6},
    "start_at_step": lambda tiny: {"latent": torch.randn(1, 4, 8, 8), "start_step": 3, "last_step": 7},
    "inpaint": lambda tiny: {
        "latent": torch.randn(1, 4, 8, 8),
        "noise_mask": (torch.arange(64) % 8 > 3).float().reshape(1, 1, 8, 8),
    },
    "batch": lambda tiny: {"batch": 2},
    "odd size": lambda tiny: {"size": (9, 13)},
    "no guidance": lambda tiny: {"cfg": 1.0},
    "regions": lambda tiny: {"positive": _regions(tiny)},
    "regions in a batch": lambda tiny: {"positive": _regions(tiny), "batch": 2},
    "prompts of other lengths": lambda tiny: {"negative": _longer(tiny)},
}


def _longer(tiny: TinyUNet) -> list:
    tensor, extra = tiny.cond(2)[0]
    return [[torch.cat([tensor, tensor], dim=1), extra]]


@pytest.mark.parametrize("case", CASES)
def test_like_the_plain_implementation(tiny: TinyUNet, attach: Attach, case: str) -> None:
    torch.manual_seed(0)
    options = CASES[case](tiny)
    model = attach(tiny.model, interval=3, branch=1)
    ours = tiny.sample(model, **options)
    assert relative(ours, tiny.sample(with_oracle(tiny, tiny.model, branch=1), **options)) < EXACT
    assert relative(ours, tiny.sample(**options)) > 1e-4, "nothing was cached"
    with tiny.split():
        assert relative(tiny.sample(model, **options), ours) < 2e-5


@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({"interval": 2}, {0, 2, 4, 6, 8}),
        ({"interval": 3}, {0, 3, 6, 9}),
        ({"interval": 20}, {0}),
        ({"interval": 3, "start": 0.35}, {0, 1, 2, 3, 6, 9}),
        ({"interval": 3, "end": 0.5}, {0, 3, 5, 6, 7, 8, 9}),
        ({"interval": 2, "start": 0.2, "end": 0.7}, {0, 1, 2, 4, 6, 7, 8, 9}),
        ({"interval": 2, "start": 0.31, "end": 0.39}, set(range(10))),
        ({"interval": 3, "schedule": "nonuniform", "center": 3}, {0, 3, 4, 6}),
    ],
)
def test_full_steps(tiny: TinyUNet, attach: Attach, options: dict, full: set[int]) -> None:
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, **options), steps=10)
    assert len(calls) == 10
    assert {step for step, (_, deep) in enumerate(calls) if deep} == full


@pytest.mark.parametrize(
    ("options", "run", "full"),
    [
        ({"interval": 3}, {"start_step": 4}, {0, 3}),
        ({"interval": 3, "start": 0.5}, {"start_step": 4}, {0, 1, 4}),
        ({"interval": 2, "end": 0.5}, {"denoise": 0.5}, set(range(5))),  # steps 5 to 9 of 10
        ({"interval": 2, "start": 0.7}, {"denoise": 0.5}, {0, 1, 2, 4}),
    ],
)
def test_full_steps_of_partial_runs(tiny: TinyUNet, attach: Attach, options: dict, run: dict, full: set[int]) -> None:
    """A window counts the steps of the whole schedule; the first step of a run that lies in it is a full one."""
    steps = 5 if "denoise" in run else 10
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, **options), steps=steps, latent=torch.randn(1, 4, 8, 8), **run)
    assert {step for step, (_, deep) in enumerate(calls) if deep} == full


def test_all_evaluations_of_a_step_are_alike(tiny: TinyUNet, attach: Attach) -> None:
    with tiny.counted() as calls:
        tiny.sample(attach(tiny.model, interval=3), steps=6, sampler="heun")
    # Heun's second look at step i is at the sigma of step i + 1, to which it belongs.
    steps = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [deep for _, deep in calls] == [step % 3 == 0 for step in steps]


def test_window(tiny: TinyUNet, attach: Attach) -> None:
    ours = tiny.sample(attach(tiny.model, interval=2, start=0.2, end=0.7), steps=10)
    assert relative(ours, tiny.sample(with_oracle(tiny, tiny.model, interval=2, first=2, end=7), steps=10)) < EXACT


def test_off_is_the_same_object(tiny: TinyUNet, attach: Attach) -> None:
    assert attach(tiny.model, interval=1) is tiny.model
    assert attach(tiny.model, start=0.5, end=0.5) is tiny.model
    assert attach(tiny.model, start=0.8, end=0.2) is tiny.model


def test_window_without_a_step_is_bit_identical(tiny: TinyUNet, attach: Attach) -> None:
    model = attach(tiny.model, start=0.31, end=0.39)
    assert torch.equal(tiny.sample(model, steps=10), tiny.sample(steps=10))


def test_input_model_is_untouched(tiny: TinyUNet, attach: Attach) -> None:
    before = tiny.sample()
    patched = attach(tiny.model, interval=3)
    tiny.sample(patched)
    assert patched is not tiny.model
    assert not any(tiny.model.wrappers.values())
    assert "speedlab" not in repr(tiny.model.model_options)
    assert torch.equal(tiny.sample(), before)


def test_last_attached_wins(tiny: TinyUNet, attach: Attach) -> None:
    twice = attach(attach(tiny.model, interval=2, branch=3), interval=5)
    assert torch.equal(tiny.sample(twice), tiny.sample(attach(tiny.model, interval=5)))


def test_clones_do_not_share_features(tiny: TinyUNet, attach: Attach) -> None:
    model = attach(tiny.model, interval=3)
    expected = tiny.sample(model)
    tiny.sample(model.clone(), seed=7)
    assert torch.equal(tiny.sample(model), expected)


def test_chained_samplers_are_isolated(tiny: TinyUNet, attach: Attach) -> None:
    model = attach(tiny.model, interval=3)
    first = tiny.sample(model, steps=8)
    second = tiny.sample(model, latent=first, denoise=0.5, steps=8)
    for fresh, options in ((first, {}), (second, {"latent": first, "denoise": 0.5})):
        other = build("sd15")
        assert torch.equal(other.sample(attach(other.model, interval=3), steps=8, **options), fresh)


@pytest.mark.parametrize("error", ["interrupt", "failure"])
def test_nothing_is_left(tiny: TinyUNet, attach: Attach, deepcache: ModuleType, living: Any, error: str) -> None:
    import comfy.model_management

    runs = living(deepcache.Run)
    raised = comfy.model_management.InterruptProcessingException if error == "interrupt" else RuntimeError
    model = attach(tiny.model, interval=3)
    expected = tiny.sample(model)

    def stop(step: int, *_: Any) -> None:
        if step == 4:
            raise raised("stop")

    with pytest.raises(raised):
        tiny.sample(model, callback=stop)
    gc.collect()
    assert all(not run._entries and run.current is None for run in runs())
    assert "speedlab_run_states" not in repr(model.model_options)
    assert torch.equal(tiny.sample(model), expected)


def test_features_live_as_long_as_the_run(tiny: TinyUNet, attach: Attach, deepcache: ModuleType, living: Any) -> None:
    seen, runs = [], living(deepcache.Run)

    def look(step: int, *_: Any) -> None:
        seen.append(sum(len(run._entries) for run in runs()))

    tiny.sample(attach(tiny.model, interval=3), callback=look)
    gc.collect()
    assert seen == [2] * 8  # cond and uncond, never more
    assert not runs()


def test_cached_evaluations_are_reported(tiny: TinyUNet, attach: Attach, pack: ModuleType) -> None:
    reporting = importlib.import_module("speedlab.patching.notes")
    reports: list[int] = []
    model = attach(tiny.model, interval=4)
    model.model_options["transformer_options"][reporting.REPORT_CACHED] = lambda: reports.append(1)
    tiny.sample(model, steps=8)
    assert len(reports) == 6


def test_the_record_knows_the_options(tiny: TinyUNet, attach: Attach, pack: ModuleType) -> None:
    patching = importlib.import_module("speedlab.patching.wrappers")
    (note,) = patching.accelerators(attach(tiny.model, interval=4, branch=2))
    assert note.name == "deepcache"
    assert (note.options["cache_interval"], note.options["cache_branch_id"]) == (4, 2)
    assert patching.accelerators(tiny.model) == ()

"""Accelerate: nothing but the other nodes one behind the other, whatever the preset, with a VAE for core's decoder."""

from __future__ import annotations

import importlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .test_worker_thread import in_worker

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
EXACT = [("SpeedLabAttention", ("auto",)), ("SpeedLabPrecision", (*("keep",) * 5, "off", "auto", "auto", "auto"))]
CFG = ("SpeedLabDynamicCFG", ("fixed", 0.75, 0.99))
BY_HAND: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    "exact": EXACT,
    "balanced": [*EXACT, ("SpeedLabForecast", ("adaptive", 0.02, 3, 0.0, 1.0))],
    "fast": [*EXACT, ("SpeedLabDeepCache", (3, 0, 0.0, 1.0, "uniform", 15, 1.4, "extrapolate")), CFG],
    "custom": [("SpeedLabAttention", ("split",)), ("SpeedLabDeepCache", (2, 1, 0.0, 1.0, "uniform"))],
    "tuned": [("SpeedLabForecast", ("fixed", 0.02, 2, 0.0, 1.0))],
}
CUSTOM = "mine=attention(split)+deepcache(2,cache_branch_id=1)"


@pytest.fixture
def keep(engine: Any, tiny: Any, output: Path) -> Any:
    """Keeps a tuned plan for the tiny model, with these changes to what it is for."""
    tuned, environment = engine("plans.tuned"), engine("measure.environment").environment

    def write(
        plan: str, versions: dict[str, str] | None = None, made: float = 1.0, settings: Any = None, **changes: Any
    ) -> Path:
        env = environment(tiny.model.load_device)
        wanted = {
            "device": env["device"], "family": "SD 1.x", "width": 64, "height": 64, "batch": 1, "sampler": "euler",
            "scheduler": "normal", **changes,
        }  # fmt: skip
        settings = settings or ({"steps": 16} if "steps" in plan else {})
        kept = tuned.TunedPlan(tuned.TunedFor(**wanted), plan.split("|")[0], settings, versions or {}, {}, made)
        return tuned.keep(engine("measure.store").RunStore(output), kept)

    return write


@pytest.fixture
def accelerate(node: Any, output: Path) -> Any:
    def run(model: Any, preset: str, custom: str = "", compile: bool = False, **parts: Any) -> Any:
        return node("SpeedLabAccelerate").apply(model, preset, custom, compile, **parts)

    return run


def sampled(core: Any, tiny: Any, model: Any, cfg: float = 5.0) -> torch.Tensor:
    latent = tiny.latent(1, 8, 8)
    out = core.KSampler().sample(model, 3, STEPS, cfg, "euler", "normal", tiny.cond(1), tiny.cond(2), latent)
    return out[0]["samples"]


def stacked(node: Any, model: Any, nodes: list[tuple[str, tuple[Any, ...]]]) -> Any:
    for node_id, values in nodes:
        made = node(node_id)
        model = getattr(made, made.FUNCTION)(model, *values)[0]
    return model


@pytest.mark.parametrize("preset", BY_HAND)
def test_a_preset_gives_the_bits_of_the_nodes_stacked_by_hand(
    accelerate: Any, node: Any, core: Any, tiny: Any, keep: Any, preset: str
) -> None:
    keep("forecast(mode=fixed,max_skip=2)")
    before = json.dumps(sorted(map(str, tiny.model.wrappers))), dict(tiny.model.attachments)
    made = in_worker(lambda: accelerate(tiny.model, preset, CUSTOM))
    ours = in_worker(lambda: sampled(core, tiny, made["result"][0]))
    by_hand = stacked(node, tiny.model, BY_HAND[preset])
    assert torch.equal(ours, sampled(core, tiny, by_hand))
    if preset != "exact":
        assert not torch.equal(ours, sampled(core, tiny, tiny.model))
    assert (json.dumps(sorted(map(str, tiny.model.wrappers))), dict(tiny.model.attachments)) == before
    assert made["result"][1] is None and made["result"][2] is None


@pytest.mark.parametrize("preset", BY_HAND)
def test_with_clip_and_vae_too_a_preset_gives_the_bits_of_the_nodes_by_hand(
    accelerate: Any, node: Any, core: Any, loaded: Any, keep: Any, preset: str
) -> None:
    keep("forecast(mode=fixed,max_skip=2)")
    model, clip, vae = loaded
    by_hand, by_hand_clip = stacked(node, model, BY_HAND[preset]), clip
    if preset not in ("custom", "tuned"):
        by_hand, by_hand_clip = node("SpeedLabMemoryPlan").plan(by_hand, "auto", 0.0, clip)["result"][:2]

    def latent(model: Any, clip: Any) -> torch.Tensor:
        texts = [core.CLIPTextEncode().encode(clip, text)[0] for text in ("a tree", "")]
        empty = core.EmptyLatentImage().generate(64, 64, 1)[0]
        return core.KSampler().sample(model, 3, STEPS, 5.0, "euler", "normal", *texts, empty)[0]["samples"]

    made = in_worker(lambda: accelerate(model, preset, CUSTOM, clip=clip, vae=vae))["result"]
    assert torch.equal(latent(*made[:2]), latent(by_hand, by_hand_clip))


def test_the_line_that_comes_out_gives_the_same_again_as_custom(
    accelerate: Any, core: Any, tiny: Any, engine: Any
) -> None:
    model, _, _, line = accelerate(tiny.model, "fast")["result"]
    again = accelerate(tiny.model, "custom", line)["result"]
    assert again[3] == line
    assert torch.equal(sampled(core, tiny, model), sampled(core, tiny, again[0]))
    assert engine("plans.plan_text").parse_plan(line).techniques


def test_stock_gives_back_what_was_put_in(accelerate: Any, tiny: Any) -> None:
    assert accelerate(tiny.model, "custom", "stock")["result"] == (tiny.model, None, None, "stock")


def test_a_refusal_is_that_of_the_nodes(accelerate: Any, core: Any, tiny: Any) -> None:
    model = accelerate(tiny.model, "custom", "deepcache(2)+forecast(0.02)")["result"][0]
    with pytest.raises(Exception, match=r"(?s)(DeepCache.*Forecast|Forecast.*DeepCache)"):
        sampled(core, tiny, model)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "custom takes one plan line"),
        ("deepcache(2)\nforecast", "there are 2"),
        ("deepcach(2)", "Did you mean deepcache"),
        ("deepcache(0)", "out of range"),
        ("deepcache(2", "parenthesis"),
        ("settings(steps=5)", "Set them there"),
        ("attention(sage4)", "no choice"),
        ("weights(bf16)", "Load Checkpoint"),
    ],
)
def test_a_line_that_cannot_be_applied_is_told(accelerate: Any, tiny: Any, line: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        accelerate(tiny.model, "custom", line)


def test_compile_adds_the_fastest_backend_that_can_run(
    accelerate: Any, node: Any, core: Any, tiny: Any, engine: Any
) -> None:
    options = engine("techniques.compile.attach").fastest_here(tiny.model, False)
    model, *_, line = accelerate(tiny.model, "custom", "dynamic_cfg(0.75)", compile=True)["result"]
    assert line == "dynamic_cfg(0.75)+" + "compile(" + ",".join(f"{k}={v}" for k, v in options.items()) + ")"
    frozen = options.get("freeze_weights") == "true"
    compiled = ("SpeedLabCompileModel", (options["backend"], "auto", "default", "auto", "error", frozen))
    by_hand = stacked(node, tiny.model, [CFG, compiled])
    assert torch.equal(sampled(core, tiny, model), sampled(core, tiny, by_hand))
    # A program of the whole network has no place for another attention, nor for DeepCache.
    for preset in ("exact", "fast"):
        line = accelerate(tiny.model, preset, compile=True)["result"][3]
        assert line.endswith("compile(backend=inductor,freeze_weights=true)")
    own = accelerate(tiny.model, "custom", "compile(jit_trace)", compile=True)
    assert own["result"][3] == "compile(jit_trace)" and "compiles by itself" in own["ui"]["text"][0]


def test_without_a_tuned_plan_it_is_an_error_that_says_to_run_tune(accelerate: Any, tiny: Any, keep: Any) -> None:
    with pytest.raises(Exception, match=r"no tuned plan for SD 1\.x on .*: run Tune"):
        accelerate(tiny.model, "tuned")
    keep("deepcache(2)", device="another card")
    with pytest.raises(Exception, match=r"run Tune .*SD 1\.x on another card are for others"):
        accelerate(tiny.model, "tuned")


def test_a_tuned_plan_is_chosen_by_size_and_sampler(accelerate: Any, node: Any, tiny: Any, keep: Any) -> None:
    keep("deepcache(2)")
    keep("deepcache(4)", made=2.0, width=128)
    keep("deepcache(5)", made=3.0, sampler="dpmpp_2m")
    (keep("deepcache(6)").parent / "broken.json").write_text("{")
    keep("deepcache(2)")

    def graph(sampler: str = "euler", width: int = 64) -> dict[str, Any]:
        return {
            "1": {"class_type": "SpeedLabAccelerate", "inputs": {}},
            "2": {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": 64, "batch_size": 1}},
            "3": {"class_type": "KSampler", "inputs": {
                "model": ["1", 0], "latent_image": ["2", 0], "sampler_name": sampler, "scheduler": "normal"}},
        }  # fmt: skip

    def line(**changes: Any) -> str:
        return accelerate(tiny.model, "tuned", prompt=graph(**changes), unique_id="1")["result"][3]

    assert [line(), line(width=128), line(sampler="dpmpp_2m")] == ["deepcache(2)", "deepcache(4)", "deepcache(5)"]
    with pytest.raises(Exception, match=r"with .*width 256.*There are plans for 64x64, batch 1, .*128x64"):
        line(width=256)
    # Where nothing tells what is sampled, the newest one.
    assert accelerate(tiny.model, "tuned")["result"][3] == "deepcache(5)"
    # A value may come from a node of its own, and core's custom samplers have sampler and schedule from two.
    prompt = graph(width=["4", 0])
    prompt["4"] = {"class_type": "PrimitiveInt", "inputs": {"value": 128}}
    assert accelerate(tiny.model, "tuned", prompt=prompt, unique_id="1")["result"][3] == "deepcache(4)"
    prompt = graph()
    prompt["3"] = {"class_type": "SamplerCustom", "inputs": {
        "model": ["1", 0], "latent_image": ["2", 0], "sampler": ["4", 0], "sigmas": ["5", 0]}}  # fmt: skip
    prompt["4"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}}
    prompt["5"] = {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "normal", "steps": 4}}
    assert accelerate(tiny.model, "tuned", prompt=prompt, unique_id="1")["result"][3] == "deepcache(5)"
    prompt["5"] = {"class_type": "AlignYourStepsScheduler", "inputs": {"steps": 4}}
    with pytest.raises(Exception, match=r"with .*scheduler ays"):
        accelerate(tiny.model, "tuned", prompt=prompt, unique_id="1")
    # Where the plan's own settings were followed it is still that plan's sampler.
    keep("deepcache(3)", made=4.0, settings={"sampler": "dpmpp_2m", "scheduler": "ays(model_type=SD1)"})
    assert accelerate(tiny.model, "tuned", prompt=prompt, unique_id="1")["result"][3] == "deepcache(3)"
    # An older one that was found for this very sampler is nearer.
    keep("deepcache(4)", made=1.0, sampler="dpmpp_2m", scheduler="ays(model_type=SD1)")
    assert accelerate(tiny.model, "tuned", prompt=prompt, unique_id="1")["result"][3] == "deepcache(4)"


def test_a_stale_plan_and_what_it_needs_beside_it_are_said(
    accelerate: Any, node: Any, tiny: Any, keep: Any, engine: Any, output: Path
) -> None:
    cls = type(node("SpeedLabAccelerate"))
    assert cls.IS_CHANGED(preset="fast") == ""
    # Without a server nothing tells what samples behind it, so that it is never taken from the cache.
    first, second = (cls.IS_CHANGED(preset="tuned") for _ in range(2))
    assert math.isnan(first) and first is not second, "the same NaN is the same key"
    keep("deepcache(2)|steps", {"torch": "1.0"})
    text = accelerate(tiny.model, "tuned")["ui"]["text"][0]
    assert "stale, measured with torch 1.0" in text and "Set steps 16 on the sampler" in text
    state, store = engine("plans.tuned").state, engine("measure.store").RunStore(output)
    before = state(store)
    time.sleep(0.01)
    keep("deepcache(3)")
    assert state(store) != before
    keep("deepcach(3)")
    with pytest.raises(Exception, match=r"The tuned plan deepcach\(3\) cannot be applied: .* Run Tune again"):
        accelerate(tiny.model, "tuned")


@pytest.mark.parametrize(
    "odd",
    [{"plan": None}, {"made": "now"}, {"made": "5"}, {"versions": 3}, {"versions": []}, {"settings": []},
     {"figures": []}, []],
)  # fmt: skip
def test_a_file_that_is_no_tuned_plan_is_passed_over(accelerate: Any, tiny: Any, keep: Any, odd: Any) -> None:
    path = keep("deepcache(2)")
    text = {**json.loads(path.read_text()), "made": 9.0, **odd} if odd else odd
    path.with_name("odd.json").write_text(json.dumps(text))
    assert accelerate(tiny.model, "tuned")["result"][3] == "deepcache(2)"


@pytest.fixture
def latent() -> dict[str, torch.Tensor]:
    return {"samples": torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(1))}


def test_clip_and_vae_are_placed_and_the_tiny_decoder_is_in_the_vae(
    accelerate: Any, node: Any, core: Any, loaded: Any, latent: Any
) -> None:
    model, clip, vae = loaded
    out, placed, tiny, line = accelerate(model, "fast", clip=clip, vae=vae)["result"]
    assert line.endswith("+memory_plan(auto)+tiny")
    names = [one.name for one in importlib.import_module("speedlab.patching.wrappers").accelerators(out)]
    assert "memory_plan" in names and placed is not clip
    by_node = node("SpeedLabTinyVAEDecode").decode(latent, "auto", 1, 0, model)[0]
    assert torch.equal(core.VAEDecode().decode(tiny, latent)[0], by_node)
    assert torch.equal(core.VAEDecodeTiled().decode(tiny, latent, 512)[0], by_node)
    # That node has settings of its own, and decodes the same network in one piece.
    whole = node("SpeedLabVAEDecode").decode(latent, tiny, False, 0, 64, "auto")[0]
    assert torch.allclose(whole, by_node, atol=1e-4)
    assert not torch.equal(core.VAEDecode().decode(vae, latent)[0], by_node)
    assert torch.equal(tiny.encode(by_node), vae.encode(by_node))
    for behind in (lambda: node("SpeedLabCompileVAE").apply(tiny, "jit_trace", "default"),
                   lambda: node("SpeedLabMemoryPlan").plan(model, "model", 0.0, clip, tiny)):  # fmt: skip
        with pytest.raises(Exception, match="VAE of Accelerate, which decodes by tiny"):
            behind()


def test_the_options_of_the_full_decoder_are_in_the_vae(
    accelerate: Any, node: Any, core: Any, loaded: Any, latent: Any
) -> None:
    model, clip, vae = loaded
    line = "full(tile_size=64,overlap=16)"
    _, _, tiled, told = accelerate(model, "custom", line, vae=vae)["result"]
    assert told == line
    latent = {"samples": latent["samples"][:1]}
    by_node = node("SpeedLabVAEDecode").decode(latent, vae, False, 64, 16, "auto")[0]
    assert torch.equal(core.VAEDecode().decode(tiled, latent)[0], by_node)
    assert not torch.equal(core.VAEDecode().decode(vae, latent)[0], by_node)
    assert accelerate(model, "exact", clip=clip, vae=vae)["result"][3].endswith("+memory_plan(auto)")


def test_without_a_vae_the_decoder_is_left_out_and_said(accelerate: Any, tiny: Any) -> None:
    done = accelerate(tiny.model, "fast")
    assert "tiny is left out: no VAE is connected" in done["ui"]["text"][0]
    assert "tiny" not in done["result"][3] and "memory_plan" not in done["result"][3]


def test_the_documents_and_the_node_have_the_table(engine: Any, node: Any) -> None:
    presets = engine("plans.plan_text").PRESETS
    pages = [ROOT / name for name in ("README.md", "README.zh.md")]
    pages += [ROOT / "js" / "docs" / name for name in ("SpeedLabAccelerate.md", "SpeedLabAccelerate/zh.md")]
    tooltip = type(node("SpeedLabAccelerate")).INPUT_TYPES()["required"]["preset"][1]["tooltip"]
    chinese = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    translated = chinese["SpeedLabAccelerate"]["inputs"]["preset"]["tooltip"]
    for name, line in presets.items():
        assert f"{name}: {line}." in tooltip and f"{name}\uff1a{line}\u3002" in translated
        for page in pages:
            assert f"| `{name}` | `{line}`" in page.read_text(encoding="utf-8"), page

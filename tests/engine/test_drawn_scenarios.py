"""What changes where the pack has the weights of the model that draws: checkpoint, captions, sizes, files beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from speedlab.common.errors import SpeedLabError
from speedlab.measure.drawn import world
from speedlab_tools import demo
from speedlab_tools.bench import models
from speedlab_tools.cli.arguments import parse
from speedlab_tools.client import files
from speedlab_tools.drawn_files import CHECKPOINTS, beside
from speedlab_tools.scenarios import drawn
from speedlab_tools.scenarios.catalog import SCENARIOS
from speedlab_tools.scenarios.overrides import Overrides, adapt
from speedlab_tools.scenarios.scenario import STOCK, Scenario
from speedlab_tools.synthetic.train import data

SIDE = 256
CHECKPOINT = CHECKPOINTS["sd15"]
REFINER = "speedlab_demo_drawn_sdxl_refiner.safetensors"


def weights(path: Path, side: int) -> None:
    header = json.dumps({"__metadata__": {"side": str(side), "step": "3", "checkpoint": "0"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of weights of SD 1.5 that says its side, none of SDXL's, and demo files that are only named."""
    path = tmp_path / "factors.safetensors"
    weights(path, SIDE)
    monkeypatch.setattr(drawn, "FACTORS", {"sd15": path, "sdxl": tmp_path / "factors_sdxl.safetensors"})

    def demo_drawn(family: str) -> list[Path]:
        tiny = {"sd15": "taesd", "sdxl": "taesdxl"}[family]
        names = [CHECKPOINTS[family], f"{tiny}_encoder.safetensors", f"{tiny}_decoder.safetensors"]
        return [tmp_path / name for name in names]

    monkeypatch.setattr(models, "demo_drawn", demo_drawn)
    monkeypatch.setattr(models, "demo_drawn_refiner", lambda base: base.with_name(REFINER))
    monkeypatch.setattr(models, "demo_drawn_vae", lambda base, name: base.with_name(f"drawn_{name}"))
    monkeypatch.setattr(models, "demo_vae", lambda name: tmp_path / f"random_{name}")
    monkeypatch.setattr(models, "demo_checkpoint", lambda family: tmp_path / f"random_{family}.safetensors")
    monkeypatch.setattr(models, "demo_controlnet", lambda size: tmp_path / f"{size}_controlnet.safetensors")
    monkeypatch.setattr(
        models, "demo_lora", lambda family, kind, size: tmp_path / f"{family}_{size}_{kind}.safetensors"
    )
    monkeypatch.setattr(models, "demo_tiny_vae", lambda family: [tmp_path / f"tiny_{family}_decoder.safetensors"])
    monkeypatch.setattr(models, "model_folders", list)
    return path


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_weights_that_are_cut_off_or_another_file_are_named(there: Path, keep: int) -> None:
    there.write_bytes(there.read_bytes()[:keep] if keep >= 0 else b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SpeedLabError, match=r"factors\.safetensors cannot be read .*get it again"):
        drawn.side()


def chosen(*ids: str, more: tuple[str, ...] = ()) -> models.ModelChoice:
    return models.choose_models(parse("bench", [*ids, *more])[0], [SCENARIOS[name] for name in ids])


def test_scenarios_of_sd15_draw_and_the_others_stay(there: Path) -> None:
    choice = chosen("txt2img-default", "sdxl-tiny-vae")
    assert choice.checkpoints == {
        "txt2img-default": CHECKPOINT, "sdxl-tiny-vae": "random_sdxl.safetensors"
    }  # fmt: skip
    assert [path.name for path in choice.files["vae_approx"]] == [
        "taesd_encoder.safetensors", "taesd_decoder.safetensors", "tiny_sdxl_decoder.safetensors"
    ]  # fmt: skip
    assert models.DRAWS in choice.notes and models.NOISE in choice.notes
    assert models.NOISE not in chosen("txt2img-default").notes
    given = there.with_name("own.safetensors")
    given.write_bytes(_one_tensor())
    own = chosen("txt2img-default", more=("--checkpoint", str(given)))
    assert own.checkpoints == {"txt2img-default": "own.safetensors"} and models.DRAWS not in own.notes


def test_scenarios_of_sdxl_draw_where_their_weights_are_there(there: Path) -> None:
    checkpoint = CHECKPOINTS["sdxl"]
    plain = SCENARIOS["sdxl-tiny-vae"]
    assert adapt(plain, Overrides(), checkpoint).settings == plain.settings
    weights(drawn.FACTORS["sdxl"], SIDE // 2)
    choice = chosen("txt2img-default", "sdxl-tiny-vae")
    assert choice.checkpoints == {"txt2img-default": CHECKPOINT, "sdxl-tiny-vae": checkpoint}
    assert [path.name for path in choice.files["vae_approx"]] == [
        "taesd_encoder.safetensors", "taesd_decoder.safetensors",
        "taesdxl_encoder.safetensors", "taesdxl_decoder.safetensors",
    ]  # fmt: skip
    assert models.DRAWS in choice.notes and models.NOISE not in choice.notes
    after = adapt(plain, Overrides(), checkpoint).settings
    assert (after.width, after.height, after.cfg) == (SIDE // 2, SIDE // 2, drawn.CFG)
    assert all(world.scene_of(prompt.text) is not None for prompt in after.prompts)
    there.unlink()  # what the second model begins with
    assert chosen("sdxl-tiny-vae").checkpoints == {"sdxl-tiny-vae": "random_sdxl.safetensors"}


def _one_tensor() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def test_files_beside_the_checkpoint_are_of_its_layout(there: Path) -> None:
    choice = chosen("sd15-controlnet", "sd15-lora-stack", "sdxl-tiny-vae")
    assert choice.others["controlnet"] == "drawn_controlnet.safetensors"
    assert choice.demo_loras["sd15"] == {
        "lora": "sd15_drawn_lora.safetensors",
        "lora_2": "sd15_drawn_lora_2.safetensors",
    }


def test_the_model_that_draws_is_its_own_refiner_where_it_is_there(there: Path) -> None:
    random = chosen("sdxl-refiner-ensemble")
    assert random.others == {"refiner": "random_refiner.safetensors"}
    assert any("random weights (random_refiner" in note for note in random.notes)
    weights(drawn.FACTORS["sdxl"], SIDE)
    choice = chosen("sdxl-refiner-ensemble")
    assert choice.others == {"refiner": REFINER}
    assert [path.name for path in choice.files["checkpoints"]] == [CHECKPOINTS["sdxl"], REFINER]
    assert any(f"the model that draws once more ({REFINER})" in note for note in choice.notes)


def test_a_vae_by_the_scenario_s_name_is_that_of_the_model_that_draws(there: Path) -> None:
    assert chosen("sdxl-vae-fp16-fix").files["vae"] == [there.with_name("random_sdxl.vae.safetensors")]
    weights(drawn.FACTORS["sdxl"], SIDE)
    choice = chosen("sdxl-vae-fp16-fix")
    assert choice.files["vae"] == [there.with_name("drawn_sdxl.vae.safetensors")] and "vae" not in choice.others
    assert not any("noise" in note for note in choice.notes)


def test_refiner_and_vae_are_links_under_names_of_their_own(tmp_path: Path) -> None:
    base = tmp_path / "checkpoints" / CHECKPOINTS["sdxl"]
    vae = tmp_path / "vae" / beside(base.name, "vae")
    for path in (base, vae):
        path.parent.mkdir()
        path.write_bytes(_one_tensor())
    for _ in range(2):
        refiner, other = files.demo_drawn_refiner(base), files.demo_drawn_vae(base, "other.safetensors")
        assert refiner.name == REFINER and refiner.samefile(base)
        assert other.name == "other.safetensors" and other.samefile(vae)
    assert files.link_model(refiner, tmp_path / "models") == REFINER  # not the name of what it leads to


@pytest.mark.parametrize(
    "scenario", [one for one in SCENARIOS.values() if one.family == "sd15"], ids=lambda one: one.id
)
def test_every_text_becomes_a_caption_and_equal_ones_stay_equal(there: Path, scenario) -> None:
    wanted = adapt(scenario, Overrides(), CHECKPOINT)
    before, after = scenario.settings, wanted.settings
    assert all(world.scene_of(prompt.text) is not None and prompt.negative == "" for prompt in after.prompts)
    assert [prompt.name for prompt in after.prompts] == [prompt.name for prompt in before.prompts]
    assert len({prompt.text for prompt in after.prompts}) == len({prompt.text for prompt in before.prompts})
    assert (after.width, after.height, after.cfg, after.steps) == (SIDE, SIDE, drawn.CFG, before.steps)
    texts = [
        node.inputs["text"]
        for node in wanted.graph().nodes
        if node.class_type in ("SpeedLabTextEncode", "CLIPTextEncode")
    ]
    assert all(not text or world.scene_of(text) for text in texts if isinstance(text, str))
    assert adapt(scenario, Overrides(width=512, steps=7), CHECKPOINT).settings.width == 512
    assert adapt(scenario, Overrides(), "own.safetensors").settings == before


@pytest.mark.parametrize(
    "scenario", [one for one in SCENARIOS.values() if one.family == "sdxl"], ids=lambda one: one.id
)
def test_every_text_of_sdxl_becomes_a_caption_too(there: Path, scenario: Scenario) -> None:
    weights(drawn.FACTORS["sdxl"], SIDE)
    wanted = adapt(scenario, Overrides(), CHECKPOINTS["sdxl"])
    assert all(world.scene_of(prompt.text) for prompt in wanted.settings.prompts)
    texts = [node.inputs.get("text") for node in wanted.graph().nodes if node.class_type.endswith("TextEncode")]
    assert all(not text or world.scene_of(text) for text in texts if isinstance(text, str))


def test_the_demo_draws_what_it_asks_for(there: Path) -> None:
    args = parse("demo", [])[0]
    settings = demo.settings_of(args, True, "sd15")
    assert (settings.width, settings.height, settings.cfg) == (SIDE, SIDE, drawn.CFG)
    assert world.scene_of(settings.prompts[0].text) is not None
    assert demo.settings_of(args, True, None).width == demo.CPU_SIDE
    assert demo.settings_of(parse("demo", ["--width", "512", "--seed", "4"])[0], False, "sd15").width == 512


def test_the_captions_are_of_scenes_that_nothing_was_trained_on() -> None:
    scenes = [world.scene_of(text) for text in drawn.CAPTIONS]
    assert len(set(scenes)) == len(drawn.CAPTIONS)
    assert all(scene is not None and data.is_held_out(scene) for scene in scenes)


def test_the_demo_tells_what_each_image_shows(there: Path, make_record, tmp_path: Path) -> None:
    text, other = drawn.CAPTIONS[1:3]
    runs = []
    for plan, shown in ((STOCK, text), (demo.PLANS[-1], other)):
        path = tmp_path / f"{plan.name}.png"
        scene = world.scene_of(shown)
        assert scene is not None
        Image.fromarray(world.draw(scene, world.generator(1), SIDE)).save(path)
        request = {"checkpoint": {"name": CHECKPOINT}, "prompt": text}
        runs.append(demo.DemoRun(plan, make_record(request=request), (path,)))
    asked, stock, fast = demo.attributes_of(demo.Result(tuple(runs), 1))
    assert text in asked and stock.strip() == "stock: 6 of 6"
    assert "of 6 (" in fast and "background" in fast
    own = [replace(run, record=run.record.changed(request={"checkpoint": {"name": "own"}})) for run in runs]
    assert demo.attributes_of(demo.Result(tuple(own), 1)) == []

"""Every node keeps the contract: id, display name, tooltips, outputs, help page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FOUNDATION = {
    "SpeedLabCheckpointLoader": (["ckpt_name", "precision", "memory_format"], ["model", "clip", "vae", "info"]),
    "SpeedLabLoraStack": (["model", "clip", "lora_1", "lora_2", "lora_3", "lora_4", "strength_1", "strength_2",
                           "strength_3", "strength_4"], ["model", "clip"]),
    "SpeedLabVAELoader": (["vae_name", "precision"], ["vae"]),
    "SpeedLabTextEncode": (["clip", "text"], ["conditioning"]),
    "SpeedLabTinyVAEDecode": (["samples", "decoder", "slice_size", "tile_size", "model"], ["image"]),
    "SpeedLabVAEDecode": (["samples", "vae", "slicing", "tile_size", "overlap", "precision"], ["image"]),
    "SpeedLabProfileSampler": (["model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative",
                                "latent_image", "denoise", "detail", "warmup", "repeats", "nvtx"],
                               ["latent", "profile", "summary", "chart"]),
    "SpeedLabProfileReport": (["profile", "images"], ["images", "report", "chart", "json_path"]),
    "SpeedLabCompareImages": (["image_a", "image_b"], ["psnr", "ssim", "diff", "report"]),
    "SpeedLabCompareLatents": (["samples_a", "samples_b"], ["relative_error", "max_abs", "report"]),
}  # fmt: skip


def node_classes(pack):
    return pack.NODE_CLASS_MAPPINGS.items()


def inputs_of(cls):
    types = cls.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def test_the_foundation_nodes_are_there_with_their_inputs_and_outputs(pack, model_files):
    for node_id, (inputs, outputs) in FOUNDATION.items():
        cls = pack.NODE_CLASS_MAPPINGS[node_id]
        assert list(inputs_of(cls)) == inputs, node_id
        assert list(cls.RETURN_NAMES) == outputs, node_id


def test_every_node_tells_what_it_is(pack, model_files):
    for node_id, cls in node_classes(pack):
        assert node_id.startswith("SpeedLab")
        assert pack.NODE_DISPLAY_NAME_MAPPINGS[node_id].endswith(" (SpeedLab)")
        assert cls.CATEGORY.startswith("SpeedLab/")
        assert cls.DESCRIPTION.endswith(".")
        assert cls.__doc__
        assert callable(getattr(cls, cls.FUNCTION))
        assert len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES) == len(cls.OUTPUT_TOOLTIPS)


def test_every_input_has_a_tooltip(pack, model_files):
    for node_id, cls in node_classes(pack):
        for name, spec in inputs_of(cls).items():
            assert spec[1]["tooltip"].strip(), f"{node_id}.{name}"


def test_every_node_is_found_by_other_words_than_its_name(pack, model_files):
    for node_id, cls in node_classes(pack):
        words = cls.SEARCH_ALIASES
        assert words and len(set(words)) == len(words), node_id
        assert all(word == word.lower().strip() for word in words)


def test_every_node_has_a_help_page_that_names_its_inputs(pack, model_files):
    for node_id, cls in node_classes(pack):
        page = ROOT / "js" / "docs" / f"{node_id}.md"
        assert page.is_file(), page
        text = page.read_text(encoding="utf-8")
        for name in inputs_of(cls):
            if not name[-1].isdigit():
                assert name in text, f"{page.name} does not mention {name}"


def test_ksamplers_inputs_come_first_with_the_same_names_order_and_ranges(pack, core, model_files):
    ours = pack.NODE_CLASS_MAPPINGS["SpeedLabProfileSampler"].INPUT_TYPES()["required"]
    theirs = core.KSampler.INPUT_TYPES()["required"]
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, spec in theirs.items():
        assert ours[name][0] == spec[0]
        for limit in ("min", "max", "default", "step", "round"):
            assert ours[name][1].get(limit) == spec[1].get(limit), (name, limit)


def test_the_pack_brings_no_optional_package_to_start_up(pack, comfy):
    """In a fresh process that has what ComfyUI imports anyway, the pack adds none of the heavy or optional ones."""
    import json
    import os

    script = f"""
import importlib.util, json, sys
sys.path.insert(0, {os.environ.get("SPEEDLAB_COMFYUI") or os.environ.get("COMFYUI_PATH")!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
import folder_paths, nodes
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("a_pack", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["a_pack"] = module
spec.loader.exec_module(module)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    added = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    allowed = {"a_pack"} | set(sys.stdlib_module_names)
    assert added <= allowed, f"start-up imports {sorted(added - allowed)}"


def test_no_node_is_registered_outside_of_comfyui():
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("a_pack", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(hasattr(module, "NODE_CLASS_MAPPINGS"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_the_requirements_never_touch_torch():
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    wanted = [*re.findall(r'"([^"]+)"', listed), *(ROOT / "requirements.txt").read_text().splitlines()]
    assert "filelock>=3.12" in wanted
    assert not any(line.strip().startswith("torch") for line in wanted)


@pytest.mark.parametrize(
    "line", [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
)
def test_requirements_and_pyproject_name_the_same_packages(line):
    assert f'"{line}"' in (ROOT / "pyproject.toml").read_text()

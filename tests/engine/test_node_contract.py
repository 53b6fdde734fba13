"""The contract of the last release: every kind of breach is seen, every kind of growth is allowed."""

from __future__ import annotations

import copy
import json

import pytest

from speedlab import __version__
from speedlab_tools.contract import CONTRACT, breaches, contract_from_info, contract_text, read_contract

INFO = {
    "input": {
        "required": {
            "model": ("MODEL", {"tooltip": "x"}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 100}),
            "mode": (["fast", "slow"], {"default": "fast"}),
        },
        "optional": {"share": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0})},
    },
    "output": ["MODEL", "STRING"],
    "output_name": ["model", "info"],
    "output_node": True,
}


def contract(info):
    return {"SpeedLabX": contract_from_info("SpeedLabX", info)}


def changed(change):
    info = copy.deepcopy(INFO)
    change(info)
    return info


def replaced(section, before, after, spec=None):
    """The section with an input renamed or given another spec, in the same place."""

    def change(info):
        entries = info["input"][section]
        info["input"][section] = {
            (after if name == before else name): (spec if name == before and spec else value)
            for name, value in entries.items()
        }

    return change


BREACHES = {
    "input 'seed' is gone": replaced("required", "seed", "noise"),
    "new input 'noise' is not optional": replaced("required", "seed", "noise"),
    "input 'model' was MODEL and is CLIP": replaced("required", "model", "model", ("CLIP", {})),
    "the default of 'seed' was 0 and is 1": replaced(
        "required", "seed", "seed", ("INT", {"default": 1, "min": 0, "max": 100})
    ),
    "'seed' began at 0 and begins at 1": replaced(
        "required", "seed", "seed", ("INT", {"default": 0, "min": 1, "max": 100})
    ),
    "'seed' ended at 100 and ends at 99": replaced(
        "required", "seed", "seed", ("INT", {"default": 0, "min": 0, "max": 99})
    ),
    "input 'seed' has other widgets": replaced(
        "required", "seed", "seed", ("INT", {"default": 0, "min": 0, "max": 100, "control_after_generate": False})
    ),
    "'mode' has no choice slow any more": replaced("required", "mode", "mode", (["fast"], {"default": "fast"})),
    "input 'share' was optional and is required": lambda info: info["input"].update(
        required={**info["input"]["required"], **info["input"]["optional"]}, optional={}
    ),
    "inputs stand in the order seed, model, mode, share": lambda info: info["input"].update(
        required={name: info["input"]["required"][name] for name in ("seed", "model", "mode")}
    ),
    "do not stand behind the old ones": lambda info: info["input"].update(
        optional={"extra": ("INT", {"default": 1}), **info["input"]["optional"]}
    ),
    "output 1 was info STRING and is gone": lambda info: (info["output"].pop(), info["output_name"].pop()),
    "output 0 was model MODEL and is model CLIP": lambda info: info["output"].__setitem__(0, "CLIP"),
    "no output node any more": lambda info: info.update(output_node=False),
}


@pytest.mark.parametrize("words", list(BREACHES))
def test_every_breach_is_named(words):
    lines = breaches(contract(INFO), contract(changed(BREACHES[words])))
    assert any(line.startswith("SpeedLabX: ") and words in line for line in lines), lines


def test_a_node_that_is_gone_is_named():
    assert breaches(contract(INFO), {}) == ["SpeedLabX is gone: workflows that hold it do not load any more"]


def grow(info):
    info["input"]["optional"]["later"] = ("INT", {"default": 3})
    info["input"]["required"]["mode"] = (["fast", "slow", "slowest"], {"default": "fast"})
    info["input"]["required"]["seed"] = ("INT", {"default": 0, "min": -1, "max": 200})
    info["output"].append("IMAGE")
    info["output_name"].append("chart")


def test_growth_is_no_breach():
    present = {**contract(changed(grow)), "SpeedLabNew": contract_from_info("SpeedLabNew", INFO)}
    assert breaches(contract(INFO), present) == []


def test_the_file_reads_back_what_was_written(tmp_path):
    path = tmp_path / "contract.json"
    path.write_text(contract_text("1.2.3", contract(INFO).values()), encoding="utf-8")
    assert read_contract(path) == contract(INFO)
    assert json.loads(path.read_text())["version"] == "1.2.3"


def test_choices_of_files_and_of_core_are_no_part_of_it():
    spec = {"required": {"ckpt_name": (["a.safetensors"], {}), "decoder": (["auto", "b.sft"], {}),
                         "scheduler": (["normal"], {}), "sampler_name": (["euler"], {})}}  # fmt: skip
    node = contract_from_info("X", {"input": spec, "output": [], "output_name": [], "output_node": False})
    assert {name: limits.choices for name, limits in node.limits.items()} == {
        "ckpt_name": None, "decoder": ("auto",), "scheduler": None, "sampler_name": None}  # fmt: skip


def test_the_committed_contract_is_of_a_release_not_after_this_one():
    released = json.loads(CONTRACT.read_text(encoding="utf-8"))["version"]
    assert [int(part) for part in released.split(".")] <= [int(part) for part in __version__.split(".")]

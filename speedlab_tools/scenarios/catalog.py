"""The table of benchmark scenarios. A row makes `workflows/api/<id>.json` and `bench <id>`, and a workflow of its own
unless it is a variant of one.

To add one: a row here (a new graph shape goes to `graphs.py`), then `python -m speedlab_tools workflows`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from .catalog_accelerate import ACCELERATE_SCENARIOS
from .catalog_bench import BENCH_SCENARIOS
from .catalog_compile import COMPILE_SCENARIOS
from .catalog_memory import MEMORY_SCENARIOS
from .graphs import load_behind_accelerate, text_to_image
from .scenario import (
    A100,
    CHECKPOINT_ANY,
    CHECKPOINT_SDXL,
    LIGHTHOUSE,
    RTX_3090,
    S0_SETTINGS,
    S1_SETTINGS,
    STOCK,
    TINY_VAE,
    TINY_VAE_SDXL,
    Published,
    Scenario,
    Settings,
)

_TABLE = (
    Scenario(
        id="txt2img-default", source="S0", title="Text to image, the plain case",
        shows="What one image costs: each step, text encoding, decoding and peak memory.", family="sd15",
        files=(CHECKPOINT_ANY,), settings=S0_SETTINGS, published=(Published("3.72 s, 0.147 s a step, 7.4 GB", A100),),
        plan=STOCK, build=partial(text_to_image, load=load_behind_accelerate),
    ),
    Scenario(
        id="profile-nvtx", source="S0", title="Profile of 20 steps with NVTX ranges",
        shows="The time of every step as a table and a chart. Each step, evaluation and forward is an NVTX range in "
        "the domain 'speedlab', so that Nsight Systems shows the same steps on its time line.",
        family="sd15", files=(CHECKPOINT_ANY,), settings=Settings(prompts=(LIGHTHOUSE,), warmup=1, chart=True),
        published=(Published("20 identical steps; half precision GEMM, fused attention and additions lead", A100),),
        plan=STOCK, build=text_to_image,
    ),
    Scenario(
        id="sdxl-tiny-vae", source="S1", title="SDXL with a Tiny VAE",
        shows="Four prompts, decoded by TAESDXL instead of the full VAE: a large saving of memory and time in the "
        "decode at a small loss of detail.",
        family="sdxl", files=(CHECKPOINT_SDXL, TINY_VAE_SDXL), settings=S1_SETTINGS,
        published=(
            Published("a large memory saving (fp16 with the full VAE: about 14 s an image, 11.24 GB)", RTX_3090),
        ),
        plan=TINY_VAE, build=text_to_image,
    ),
    *ACCELERATE_SCENARIOS,
    *BENCH_SCENARIOS,
    *MEMORY_SCENARIOS,
    *COMPILE_SCENARIOS,
)  # fmt: skip

# What ComfyUI's template browser shows, each with an image: `workflows/<name>.json`, by scenario. The browser knows no
# title but the file's name, so that says what a user wants. All others are in `workflows/scenarios`.
TEMPLATES: Mapping[str, str] = MappingProxyType({
    "txt2img-default": "See where time goes - one image",
    "profile-nvtx": "See where time goes - Nsight time line",
    "sd15-cpu-onnxruntime": "Same image, faster - on a CPU",
    "sdxl-torch-compile": "Same image, faster - compiled",
    "sdxl-deepcache": "Similar image, much faster - DeepCache",
    "sdxl-fastest-deepcache": "Similar image, much faster - all together",
    "sdxl-under-8gb": "Less VRAM - SDXL in 8, 6 or 4 GB",
    "sdxl-vae-tiling": "Less VRAM - 4096x4096 in tiles",
    "sdxl-staged-batch": "Less VRAM - several prompts in stages",
    "sdxl-refiner-ensemble": "More detail - base and refiner",
    "sweep-steps": "Compare settings - number of steps",
    "xy-grid": "Compare settings - any two",
})  # fmt: skip
ALL = "all"
SCENARIOS: Mapping[str, Scenario] = MappingProxyType({entry.id: entry for entry in _TABLE})


class UnknownScenarioError(ValueError):
    """An id that the table does not hold; the message lists close matches and every id."""


def find(scenario_id: str) -> Scenario:
    """The scenario with that id; UnknownScenarioError otherwise."""
    if scenario_id in SCENARIOS:
        return SCENARIOS[scenario_id]
    close = difflib.get_close_matches(scenario_id, SCENARIOS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UnknownScenarioError(f"there is no scenario '{scenario_id}'.{hint} The scenarios are: {', '.join(SCENARIOS)}")

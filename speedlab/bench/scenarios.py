"""The table of benchmark scenarios. A row makes `workflows/<id>.json`, `workflows/api/<id>.json` and `bench <id>`.

To add one: a row here (a new graph shape goes to `recipes.py`), then `python -m speedlab.bench workflows`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from .catalog_compile import compile_scenarios
from .plans import STOCK, TINY_VAE
from .recipes import text_to_image
from .scenario import NeededFile, Prompt, Published, Scenario, Settings

CHECKPOINT_SDXL = NeededFile(
    kind="checkpoint",
    folder="models/checkpoints",
    default="sd_xl_base_1.0.safetensors",
    where="SDXL base 1.0 by Stability AI, on Hugging Face as stabilityai/stable-diffusion-xl-base-1.0",
)
CHECKPOINT_ANY = NeededFile(
    kind="checkpoint",
    folder="models/checkpoints",
    default="sd_xl_base_1.0.safetensors",
    where="any SD 1.x, SD 2.x or SDXL checkpoint; the published figures were taken with an SDXL one",
)
TINY_VAE_SDXL = NeededFile(
    kind="tiny_vae",
    folder="models/vae_approx",
    default="taesdxl_decoder.safetensors",
    where="TAESDXL by madebyollin, on GitHub as madebyollin/taesd",
)

LIGHTHOUSE = Prompt(
    name="lighthouse",
    text="a lighthouse on a rocky coast at dawn, soft light, long exposure of the sea, photograph",
    seed=20230711,
    negative="text, watermark, blurry",
)
# The four prompts and seeds of S1, fixed in each of its scenarios; it uses no negative prompt.
FOUR_PROMPTS = (
    Prompt(
        "portrait",
        "3/4 shot, candid photograph of a beautiful 30 year old redhead woman with messy dark hair, peacefully "
        "sleeping in her bed, night, dark, light from window, dark shadows, masterpiece, uhd, moody",
        877866765,
    ),
    Prompt(
        "interior",
        "futuristic living room with big windows, brown sofas, coffee table, plants, cyberpunk city, concept art, "
        "earthy colors",
        5567822456,
    ),
    Prompt("macro", "macro shot of a bee collecting nectar from lavender flowers", 2257899453),
    Prompt("3d", "3d rendered isometric fiji island beach, 3d tile, polygon, cartoony, mobile game", 987867834),
)

S0_SETTINGS = Settings(prompts=(LIGHTHOUSE,), width=512, height=512, steps=20, cfg=8.0)
S1_SETTINGS = Settings(prompts=FOUR_PROMPTS, width=1024, height=1024, steps=50, cfg=5.0)
A100 = "A100-PCIE-40GB"
RTX_3090 = "RTX 3090"

_TABLE = (
    Scenario(
        id="txt2img-default",
        source="S0",
        title="Text to image, the plain case",
        shows="What one picture costs: each step, text encoding, decoding and peak memory.",
        family="sd15",
        files=(CHECKPOINT_ANY,),
        settings=S0_SETTINGS,
        published=(Published("3.72 s, 0.147 s a step, 7.4 GB", A100),),
        plan=STOCK,
        build=text_to_image,
    ),
    Scenario(
        id="profile-nvtx",
        source="S0",
        title="Profile of 20 steps with NVTX ranges",
        shows="The time of every step as a table and a chart. Each step, evaluation and forward is an NVTX range in "
        "the domain 'speedlab', so that Nsight Systems shows the same steps on its time line.",
        family="sd15",
        files=(CHECKPOINT_ANY,),
        settings=Settings(prompts=(LIGHTHOUSE,), warmup=1, chart=True),
        published=(Published("20 identical steps; half precision GEMM, fused attention and additions lead", A100),),
        plan=STOCK,
        build=text_to_image,
    ),
    Scenario(
        id="sdxl-tiny-vae",
        source="S1",
        title="SDXL with a Tiny VAE",
        shows="Four prompts, decoded by TAESDXL instead of the full VAE: a large saving of memory and time in the "
        "decode at a small loss of detail.",
        family="sdxl",
        files=(CHECKPOINT_SDXL, TINY_VAE_SDXL),
        settings=S1_SETTINGS,
        published=(
            Published("a large memory saving (fp16 with the full VAE: about 14 s an image, 11.24 GB)", RTX_3090),
        ),
        plan=TINY_VAE,
        build=text_to_image,
    ),
    *compile_scenarios(CHECKPOINT_SDXL, S1_SETTINGS),
)

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

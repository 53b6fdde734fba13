"""Scenarios of sweeps, precision and quality: settings, prompts and published figures as their sources give them."""

from __future__ import annotations

from dataclasses import replace

from .graphs import sweep, text_to_image_in
from .scenario import (
    A100,
    ASTRONAUT,
    CHECKPOINT_ANY,
    CHECKPOINT_SD15,
    CHECKPOINT_SDXL,
    LIGHTHOUSE,
    RTX_3090,
    S0_SETTINGS,
    S1_SETTINGS,
    STOCK,
    Published,
    Scenario,
    Settings,
)

S0_SWEEP = replace(S0_SETTINGS, warmup=1, repeats=5)
S0_LARGE = replace(S0_SWEEP, width=1024, height=1024)
S1_SWEEP = replace(S1_SETTINGS, warmup=1, repeats=5)
S2_SETTINGS = Settings(
    prompts=(ASTRONAUT,), width=512, height=512, steps=50, cfg=7.5, sampler="ddim", warmup=1, repeats=5
)

BENCH_SCENARIOS = (
    Scenario(
        id="sweep-batch", source="S0", title="Batch size",
        shows="How time, memory and throughput grow with the number of images made at once.", family="sd15",
        files=(CHECKPOINT_ANY,), settings=S0_SWEEP,
        published=(
            Published("batch 1, 2, 4, 8, 16, 32: 3.72, 3.94, 4.83, 7.64, 12.00, 23.35 s", A100),
            Published("a step 0.147, 0.161, 0.205, 0.297, 0.481, 0.925 s", A100),
            Published("7.4, 7.6, 8.8, 9.6, 18.3, 27.6 GB", A100),
        ),
        plan=STOCK, build=sweep("batch", "1, 2, 4, 8, 16, 32"),
    ),
    Scenario(
        id="sweep-resolution", source="S0", title="Resolution",
        shows="How time and memory grow with the size of the image, at batch 4.", family="sd15",
        files=(CHECKPOINT_ANY,), settings=replace(S0_SWEEP, batch=4),
        published=(
            Published("512x512, 768x768, 1280x768, 1024x1024: 4.83, 9.01, 12.52, 12.29 s", A100),
            Published("a step 0.205, 0.357, 0.492, 0.534 s", A100),
            Published("8.8, 13.6, 14.7, 18.3 GB", A100),
        ),
        plan=STOCK, build=sweep("resolution", "512x512, 768x768, 1280x768, 1024x1024"),
    ),
    Scenario(
        id="sweep-steps", source="S0", title="Number of steps",
        shows="Time grows with the steps, the image changes less and less: the contact sheet shows from where on.",
        family="sd15", files=(CHECKPOINT_ANY,), settings=S0_LARGE,
        published=(
            Published("1, 2, 4, 8, 16, 32, 64 steps, minimum: 0.85, 0.63, 1.06, 2.44, 3.91, 7.65, 13.41 s", A100),
            Published("maximum: 1.07, 1.37, 2.01, 3.28, 4.35, 8.45, 14.16 s", A100),
            Published("black before 8 steps", A100),
        ),
        plan=STOCK, build=sweep("steps", "1, 2, 4, 8, 16, 32, *64"),
    ),
    Scenario(
        id="sweep-cfg", source="S0", title="CFG",
        shows="Guidance costs the same whatever its strength; only the image changes.", family="sd15",
        files=(CHECKPOINT_ANY,), settings=replace(S0_LARGE, steps=64),
        published=(Published("CFG 7, 8, 11: 14.82, 14.16, 14.76 s", A100),), plan=STOCK,
        build=sweep("cfg", "7, *8, 11"),
    ),
    Scenario(
        id="sweep-prompt-length", source="S0", title="Length of the prompt",
        shows="What a long prompt costs: 8, 77, 154 and 231 tokens, start and end of each chunk of 77 included.",
        family="sd15", files=(CHECKPOINT_ANY,), settings=S0_SWEEP,
        published=(Published("almost no effect on speed", A100),), plan=STOCK,
        build=sweep("prompt_tokens", "8, 77, 154, 231"),
    ),
    Scenario(
        id="sdxl-baseline-fp32", source="S1", title="SDXL in fp32",
        shows="Four prompts with nothing optimised: what every other SDXL scenario is compared with.", family="sdxl",
        files=(CHECKPOINT_SDXL,), settings=replace(S1_SETTINGS, warmup=1, repeats=5),
        published=(Published("no figure given; fp16 takes about 14 s an image and 11.24 GB", RTX_3090),),
        plan=replace(STOCK, name="fp32"), build=text_to_image_in("fp32"),
    ),
    Scenario(
        id="sdxl-fp16", source="S1", title="SDXL in fp16", shows="Four prompts in half precision.", family="sdxl",
        files=(CHECKPOINT_SDXL,), settings=replace(S1_SETTINGS, warmup=1, repeats=5),
        published=(Published("about 14 s an image, 11.24 GB", RTX_3090),), plan=replace(STOCK, name="fp16"),
        build=text_to_image_in("fp16"), variant_of="sdxl-baseline-fp32",
    ),
    Scenario(
        id="sdxl-fewer-steps", source="S1", title="SDXL with fewer steps",
        shows="Time and quality of 50, 30, 25, 20 and 15 steps, compared with 50 on the same four seeds.",
        family="sdxl", files=(CHECKPOINT_SDXL,), settings=S1_SWEEP,
        published=(Published("25 to 30 steps hold; -40 % time", RTX_3090),), plan=STOCK,
        build=sweep("steps", "*50, 30, 25, 20, 15"),
    ),
    Scenario(
        id="sd15-precision", source="S2", title="SD 1.5 in fp32 and fp16",
        shows="Time and memory of full and half precision. The checkpoint is loaded again for each.", family="sd15",
        files=(CHECKPOINT_SD15,), settings=S2_SETTINGS,
        published=(
            Published("-40 % time with fp16", "Ampere GPUs"),
            Published("-52 % time with fp16", "RTX 8000"),
            Published("7.7 GB in fp32, 4.5 GB in fp16", "NVIDIA GPUs"),
        ),
        plan=STOCK, build=sweep("precision", "*fp32, fp16"),
    ),
    Scenario(
        id="sd15-throughput", source="S2", title="SD 1.5, the largest batch",
        shows="The batch is doubled until memory is full, then the largest that fits is searched: images a minute, and "
        "where more images at once gain nothing. A CPU stops at 80 % of its free RAM.",
        family="sd15", files=(CHECKPOINT_SD15,), settings=replace(S2_SETTINGS, repeats=2),
        published=(
            Published("batch 28 fits; 2.5 times an RTX 3080", "A100 80GB"),
            Published("batch 1: 1.85 s an image, 33 % over an RTX 3080", "A100 80GB"),
        ),
        plan=STOCK, build=sweep("batch", "1, 2, 4, max"),
    ),
    Scenario(
        id="sd15-precision-quality", source="S2", title="SD 1.5: does fp16 change the image?",
        shows="The same latent and prompt in fp32 and fp16 for up to 100 steps: both images, their difference, PSNR "
        "and SSIM by the number of steps. Images and differences lie in output/speedlab/images.",
        family="sd15", files=(CHECKPOINT_SD15,), settings=replace(S2_SETTINGS, repeats=1),
        published=(Published("the difference shrinks with the steps", "NVIDIA GPUs"),), plan=STOCK,
        build=sweep("steps", "5, 10, 20, 30, 50, 100", "precision", "*fp32, fp16"),
    ),
    Scenario(
        id="xy-grid", source="S4", title="A grid of any two axes",
        shows="Steps against CFG, with time, memory and quality in each cell. Choose any other two axes on the node.",
        family="sd15", files=(CHECKPOINT_ANY,), settings=Settings(prompts=(LIGHTHOUSE,), warmup=1, repeats=3),
        published=(Published("no figure given", "any"),), plan=STOCK,
        build=sweep("steps", "10, *20, 30", "cfg", "5, *8, 11"),
    ),
)  # fmt: skip

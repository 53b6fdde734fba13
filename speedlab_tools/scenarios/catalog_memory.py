"""Scenarios of memory plans, base and refiner, the fastest plans within a budget, decoding and staged batches."""

from __future__ import annotations

from dataclasses import replace

from .graphs import sliced_batches, staged_batch, text_to_image, tiled_image
from .memory_graphs import Build, PlanOptions, RefinerVariant, ensemble, prompts_of, refined, text_to_image_within
from .scenario import (
    CHECKPOINT_SDXL,
    FOUR_PROMPTS,
    HUGGING_FACE,
    RTX_3090,
    S1_SETTINGS,
    TINY_VAE_SDXL,
    NeededFile,
    Plan,
    Published,
    Scenario,
    Settings,
    Technique,
)

REFINER_SDXL = NeededFile(
    kind="refiner", folder="models/checkpoints", default="sd_xl_refiner_1.0.safetensors",
    where="SDXL refiner 1.0 by Stability AI, on Hugging Face as stabilityai/stable-diffusion-xl-refiner-1.0",
    url=f"{HUGGING_FACE}/stabilityai/stable-diffusion-xl-refiner-1.0/resolve/main/sd_xl_refiner_1.0.safetensors",
)  # fmt: skip

VAE_FP16_FIX = NeededFile(
    kind="vae",
    folder="models/vae",
    default="sdxl.vae.safetensors",
    where="SDXL VAE FP16 fix by madebyollin, on Hugging Face as madebyollin/sdxl-vae-fp16-fix",
    url=f"{HUGGING_FACE}/madebyollin/sdxl-vae-fp16-fix/resolve/main/sdxl.vae.safetensors",
)
_ONE_PROMPT = replace(S1_SETTINGS, prompts=FOUR_PROMPTS[:1])

# What the fastest plans stand on. A compiled model cannot be streamed, so those within a budget go without.
_FAST = (Technique("Dynamic CFG", "SpeedLabDynamicCFG", {"stop_at": 0.75}),)
_COMPILE = Technique("Compile", "SpeedLabCompileModel", {"backend": "inductor", "on_failure": "eager"})
_DEEPCACHE = Technique("DeepCache", "SpeedLabDeepCache", {"cache_interval": 3})
_30_STEPS = replace(S1_SETTINGS, steps=30)

_FASTEST = Plan("Compile + CFG off at 75 % + Tiny VAE", (_COMPILE, *_FAST), "tiny")
_FASTEST_DEEPCACHE = Plan("Compile + DeepCache + CFG off at 75 % + Tiny VAE", (_COMPILE, _DEEPCACHE, *_FAST), "tiny")
_WITHIN = Plan("DeepCache + CFG off at 75 % + Tiny VAE", (_DEEPCACHE, *_FAST), "tiny")
_LARGEST_GB = 8
_NO_COMPILE = " Compile Model is not part of this plan."
# The first image of all holds the compiling; a run before each measured one keeps it out of the times.
_COMPILED_30_STEPS = replace(_30_STEPS, warmup=1)

_STEPS = (50, 40, 30, 20)
_HAND_OVERS = tuple(
    RefinerVariant(f"{steps} steps, {handoff:g}", steps, handoff=handoff) for handoff in (0.9, 0.8) for steps in _STEPS
)
# At denoise 0.3 these are the last 3 of 10 steps and the last 6 of 20.
_DENOISE = 0.3
_REFINED = tuple(
    RefinerVariant(f"{steps} steps, then {refine} of {whole}", steps, refine=refine)
    for refine, whole in ((3, 10), (6, 20))
    for steps in _STEPS
)


def _offload(name: str, options: PlanOptions, plan: Plan, title: str, shows: str, *published: Published) -> Scenario:
    files = (CHECKPOINT_SDXL, TINY_VAE_SDXL) if plan.decoder == "tiny" else (CHECKPOINT_SDXL,)
    settings = S1_SETTINGS if plan.techniques == () else _30_STEPS
    return Scenario(
        id=name, source="S1", title=title, shows=shows, family="sdxl", files=files, settings=settings,
        published=published, plan=plan, build=text_to_image_within(options),
    )  # fmt: skip


def _within(budget: float, published: str, memory_plan: str) -> Scenario:
    plan = replace(_WITHIN, name=f"{_WITHIN.name}, {memory_plan}")
    scenario = _offload(
        f"sdxl-under-{budget:g}gb",
        PlanOptions("auto", budget),
        plan,
        f"SDXL under {budget:g} GB",
        f"Four prompts under a budget of {budget:g} GB, with the fastest plan that fits: the Memory Plan node tells "
        f"its prediction and which way of offloading it picked. On a larger GPU start ComfyUI with --reserve-vram to "
        f"leave it {budget:g} GB.{_NO_COMPILE}",
        Published(published, RTX_3090),
    )
    return scenario if budget == _LARGEST_GB else replace(scenario, variant_of=f"sdxl-under-{_LARGEST_GB}gb")


def _fastest(name: str, plan: Plan, shows: str, *published: Published) -> Scenario:
    return Scenario(
        id=name, source="S1", title=f"SDXL, {plan.name}", shows=shows, family="sdxl",
        files=(CHECKPOINT_SDXL, TINY_VAE_SDXL), settings=_COMPILED_30_STEPS, published=published, plan=plan,
        build=text_to_image,
    )  # fmt: skip


def _two_models(
    name: str, title: str, shows: str, plan: str, rows: tuple[RefinerVariant, ...], build: Build, *published: Published
) -> Scenario:
    settings: Settings = replace(S1_SETTINGS, prompts=prompts_of(rows, FOUR_PROMPTS[0]))
    return Scenario(
        id=name, source="S1", title=title, shows=shows, family="sdxl", files=(CHECKPOINT_SDXL, REFINER_SDXL),
        settings=settings, published=published, plan=Plan(plan), build=build,
    )  # fmt: skip


MEMORY_SCENARIOS = (
    _offload(
        "sdxl-model-offload",
        PlanOptions("model"),
        Plan("model offload"),
        "SDXL with model offload",
        "Four prompts; text encoders, UNet and VAE are on the device one at a time.",
        Published("half the memory, a little slower", RTX_3090),
    ),
    _offload(
        "sdxl-sequential-offload",
        PlanOptions("sequential"),
        Plan("sequential offload + Tiny VAE", decoder="tiny"),
        "SDXL with sequential offload",
        "Four prompts; weights are streamed to the device layer by layer while the layer before computes, two layers "
        "at most are there at once. Decoded by a Tiny VAE, for the least memory.",
        Published("0.68 GB; with a full VAE that runs in fp16 2.56 GB; slow", RTX_3090),
        Published("under 3 GB on SD 1.5", "Titan RTX"),
    ),
    _two_models(
        "sdxl-refiner-ensemble",
        "SDXL base and refiner as an ensemble",
        "One prompt, handed over to the refiner after 90 % and after 80 % of 50, 40, 30 and 20 steps: one schedule of "
        "noise for both models.",
        "base to refiner",
        _HAND_OVERS,
        ensemble(_HAND_OVERS),
        Published("best at 0.9; 17.38 GB together", RTX_3090),
    ),
    _two_models(
        "sdxl-refiner-img2img",
        "SDXL base, then refiner as image to image",
        "One prompt, finished by the base in 50, 40, 30 and 20 steps; then the refiner takes it at denoise 0.3 through "
        "the last 3 of 10 steps, or the last 6 of 20. Base and refiner have a report each.",
        "base, then refiner",
        _REFINED,
        refined(_REFINED, _DENOISE),
    ),
    _fastest(
        "sdxl-fastest",
        _FASTEST,
        "Four prompts with every technique that costs little quality: a compiled UNet, CFG off after 75 % of the "
        "steps, Tiny VAE, 30 steps. Where the model cannot be compiled it runs as it is, and the record says so.",
        Published("4.0 s and 6.91 GB, with OneDiff", RTX_3090),
        Published("2.7 s, with OneDiff", "A100"),
        Published("2.0 s, with OneDiff", "H100"),
    ),
    _fastest(
        "sdxl-fastest-deepcache",
        _FASTEST_DEEPCACHE,
        "Four prompts with DeepCache and CFG off after 75 % of the steps together, which the source found impossible, "
        "on a compiled UNet, with Tiny VAE and 30 steps.",
        Published("none: it could not combine the two", RTX_3090),
    ),
    _within(_LARGEST_GB, "6.91 GB", "within 8 GB"),
    _within(6, "5.6 GB and 12.6 s: model offload, VAE FP16 fix, Tiny VAE", "within 6 GB"),
    _within(4, "0.68 GB, slow: sequential offload, Tiny VAE", "within 4 GB"),
    Scenario(
        id="sdxl-staged-batch", source="S1", title="SDXL as a staged batch",
        shows="All four prompts are encoded, then the text encoders are freed; all are sampled, then the UNet is "
        "freed; all are decoded. Only one part of the model is on the GPU at a time, and each is loaded once.",
        family="sdxl", files=(CHECKPOINT_SDXL,), settings=S1_SETTINGS,
        published=(Published("5.77 GB, no time lost", RTX_3090),), plan=Plan("staged batch"), build=staged_batch,
    ),
    Scenario(
        id="sdxl-vae-fp16-fix", source="S1", title="SDXL with a VAE that runs in fp16",
        shows="Four prompts, decoded by a VAE that stays finite in half precision. SDXL's own VAE does not: it "
        "would turn black, and VAE Decode would take a safer, larger precision.",
        family="sdxl", files=(CHECKPOINT_SDXL, VAE_FP16_FIX), settings=S1_SETTINGS,
        published=(Published("-15 % memory", RTX_3090),), plan=Plan("VAE FP16 fix"), build=text_to_image,
    ),
    Scenario(
        id="sdxl-vae-slicing", source="S1", title="SDXL with sliced decoding",
        shows="One prompt in batches of 1, 2, 8 and 32, each decoded one image at a time: the memory of decoding "
        "does not grow with the batch.",
        family="sdxl", files=(CHECKPOINT_SDXL,), settings=replace(_ONE_PROMPT, batch=32),
        published=(Published("constant VAE memory", RTX_3090),), plan=Plan("VAE slicing"), build=sliced_batches,
    ),
    Scenario(
        id="sdxl-vae-tiling", source="S1", title="SDXL at 4096x4096 with tiled decoding",
        shows="One image of 4096x4096, decoded in tiles of 1024 pixels that blend into each other over 128.",
        family="sdxl", files=(CHECKPOINT_SDXL,), settings=replace(_ONE_PROMPT, width=4096, height=4096),
        published=(Published("fits where full decode is out of memory", RTX_3090),), plan=Plan("VAE tiling"),
        build=tiled_image,
    ),
)  # fmt: skip

"""Scenarios of the techniques that cut the work itself: caching, guidance, attention, precision, samplers."""

from __future__ import annotations

from dataclasses import replace

from .graphs import ALONE, Variant, in_variants, prompts_for, with_control
from .scenario import (
    ASTRONAUT,
    CHECKPOINT_SD15,
    CHECKPOINT_SDXL,
    HUGGING_FACE,
    RTX_3090,
    S1_SETTINGS,
    NeededFile,
    Plan,
    Prompt,
    Published,
    Scenario,
    Settings,
    Technique,
)

_S2 = Settings(prompts=(ASTRONAUT,), width=512, height=512, steps=50, cfg=7.5)
# A general guide names no settings but these: 20 to 30 steps, CFG 7.
_S4 = Settings(prompts=(replace(ASTRONAUT, negative="blurry"),), steps=25, cfg=7.0)
_CONTROL = Settings(
    prompts=(Prompt("control", "a bottle of honey on a wooden table, soft light, photograph", 2023, "blurry"),),
    steps=20,
    cfg=7.0,
)


def _one(name: str, node: str, **options: object) -> Variant:
    return Variant(Plan(name, (Technique(name, node, options),)))


def _deepcache(branch: int) -> Variant:
    return _one(f"DeepCache 3, branch {branch}", "SpeedLabDeepCache", cache_interval=3, cache_branch_id=branch)


def _scenario(
    name: str, source: str, title: str, shows: str, settings: Settings, variants: tuple[Variant, ...],
    *published: Published,
) -> Scenario:  # fmt: skip
    sdxl = source == "S1"
    return Scenario(
        id=name, source=source, title=title, shows=shows, family="sdxl" if sdxl else "sd15",
        files=(CHECKPOINT_SDXL if sdxl else CHECKPOINT_SD15,),
        settings=replace(settings, prompts=prompts_for(variants, settings.prompts)),
        published=published, plan=variants[0].plan, build=in_variants(variants, settings),
    )  # fmt: skip


def _precision(name: str, weights: str, **options: str) -> Variant:
    return Variant(
        Plan(name, (Technique("Precision", "SpeedLabPrecision", dict(options)),) if options else ()), weights
    )


def _sampler(name: str, sampler: str, scheduler: str, steps: int) -> Variant:
    return Variant(Plan(name), sampler=sampler, scheduler=scheduler, steps=steps)


_LCM = Technique("LCM steps", "ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": False})
_FORECAST = Technique("Forecast", "SpeedLabForecast", {"mode": "adaptive", "tolerance": 0.02})
_CACHE = Technique("DeepCache", "SpeedLabDeepCache", {"cache_interval": 3, "schedule": "adaptive"})
_GUIDANCE = Technique("Dynamic CFG", "SpeedLabDynamicCFG", {"stop_at": 0.75})


def _few_steps(family: str, title: str, checkpoint: NeededFile, lora: NeededFile, side: int) -> Scenario:
    """30 plain steps and what this pack leaves out of them, beside 8 and 4 steps of a distilled model."""

    def distilled(name: str, steps: int, *more: Technique) -> Variant:
        return Variant(
            Plan(name, (_LCM, *more)), sampler="lcm", scheduler="sgm_uniform", steps=steps, cfg=1.0, lora=True
        )

    variants = (
        ALONE,
        Variant(Plan("Forecast + Dynamic CFG", (_FORECAST, _GUIDANCE))),
        Variant(Plan("DeepCache adaptive + Dynamic CFG", (_CACHE, _GUIDANCE))),
        distilled("LCM, 8 steps", 8),
        distilled("LCM, 4 steps", 4),
        distilled("LCM, 8 steps, DeepCache adaptive + Dynamic CFG", 8, _CACHE, _GUIDANCE),
    )
    settings = Settings(prompts=(replace(ASTRONAUT, negative="blurry"),), width=side, height=side, steps=30, cfg=7.0)
    return Scenario(
        id=f"{family}-few-steps", source="S4", title=title,
        shows="One prompt: 30 plain steps, the same with Forecast or DeepCache and with Dynamic CFG, and 8 and 4 steps "
        "with an LCM LoRA at CFG 1. The last row puts the techniques on few steps: its report says what they leave "
        "out there, which is nothing or next to it.",
        family=family, files=(checkpoint, lora),
        settings=replace(settings, prompts=prompts_for(variants, settings.prompts)),
        published=(Published("none", "the guide gives no figure"),), plan=variants[0].plan,
        build=in_variants(variants, settings),
    )  # fmt: skip


_LCM_FILE = "pytorch_lora_weights.safetensors"  # published under this name for both families


def _lcm(repository: str) -> NeededFile:
    """An LCM LoRA, named as its repository is, so that both families' files can lie in one folder."""
    return NeededFile(
        kind="lora", folder="models/loras", default=f"{repository}.safetensors",
        where=f"the LCM LoRA on Hugging Face as latent-consistency/{repository}. A browser saves it as `{_LCM_FILE}`: "
        "rename it",
        url=f"{HUGGING_FACE}/latent-consistency/{repository}/resolve/main/{_LCM_FILE}",
    )  # fmt: skip


CONTROLNET = NeededFile(
    kind="controlnet",
    folder="models/controlnet",
    default="control_v11p_sd15_canny_fp16.safetensors",
    where="ControlNet 1.1 canny for SD 1.5 by lllyasviel (any ControlNet that fits the checkpoint will do), in fp16 on "
    "Hugging Face as comfyanonymous/ControlNet-v1-1_fp16_safetensors",
    url=f"{HUGGING_FACE}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_canny_fp16.safetensors",
)
CONTROL_IMAGE = NeededFile(
    kind="image", folder="input", default="example.png", where="ComfyUI brings it; pick an image of yours"
)

ACCELERATE_SCENARIOS = (
    _scenario(
        "sdxl-deepcache", "S1", "SDXL with DeepCache",
        "One prompt: stock, then DeepCache with interval 3 at branch 0, which caches most, and at higher branches, "
        "which keep more of the image. Cached steps are marked in the report.",
        replace(S1_SETTINGS, prompts=S1_SETTINGS.prompts[:1]), (ALONE, _deepcache(0), _deepcache(2), _deepcache(4)),
        Published("less than half the time; a higher branch looks better", RTX_3090),
    ),
    _scenario(
        "sdxl-cfg-off", "S1", "SDXL without CFG at the end",
        "Four prompts: stock, then the negative prompt left out for the last 50 % and for the last 25 % of the steps. "
        "The report counts the rows that were saved.",
        S1_SETTINGS,
        (ALONE, *(_one(f"CFG off at {at:.0%}", "SpeedLabDynamicCFG", stop_at=at) for at in (0.5, 0.75))),
        Published("last 50 %: -25 % time; last 25 %: -12.5 %", RTX_3090),
    ),
    _scenario(
        "sdxl-tf32", "S1", "SDXL and TF32",
        "Four prompts: fp16 with TF32 in cuDNN as it is and switched off, fp32 without and with TF32 in matrix "
        "products. Only NVIDIA GPUs from Ampere on have TF32.",
        S1_SETTINGS,
        (
            _precision("fp16", "fp16"),
            _precision("fp16, cuDNN TF32 off", "fp16", cudnn_tf32="off"),
            _precision("fp32, TF32 off", "fp32", tf32="off"),
            _precision("fp32, TF32 on", "fp32", tf32="on"),
        ),
        Published("-7 % memory with cuDNN TF32 off", RTX_3090),
        Published("fp32 with TF32 lies between fp32 and fp16", "A100"),
    ),
    _scenario(
        "sdxl-channels-last", "S1", "SDXL in channels-last layout",
        "Four prompts, with convolution weights laid out as usual and channels last.",
        S1_SETTINGS, (ALONE, _precision("channels last", "auto", memory_format="channels_last")),
        Published("no gain on SDXL", RTX_3090),
        Published("3.61 s to 3.30 s on SD 1.5, 50 steps", "Titan RTX"),
    ),
    _scenario(
        "sdxl-freeu", "S1", "SDXL with FreeU",
        "Four prompts, without and with ComfyUI's FreeU: a change of quality, not of speed.",
        S1_SETTINGS, (ALONE, _one("FreeU", "FreeU", b1=1.3, b2=1.4, s1=0.9, s2=0.2)),
        Published("quality, not speed", RTX_3090),
    ),
    _scenario(
        "sd15-autocast", "S2", "Half precision with and without autocast",
        "One prompt: the model in fp16, and the model in fp32 under autocast to fp16.",
        _S2, (_precision("fp16", "fp16"), _precision("fp32, autocast fp16", "fp32", autocast="fp16")),
        Published("half precision without autocast is 25 % faster than with it", "A100, RTX 3090, RTX 8000"),
    ),
    _scenario(
        "sd15-sliced-attention", "S2", "Sliced attention",
        "One prompt: attention by PyTorch's SDPA, and in slices, which needs less memory.",
        _S2,
        (
            _one("Attention sdpa", "SpeedLabAttention", backend="sdpa"),
            _one("Attention split", "SpeedLabAttention", backend="split"),
        ),
        Published("3.2 GB, about 10 % slower", "A100, RTX 3090, RTX 8000"),
    ),
    Scenario(
        id="sd15-controlnet", source="S4", title="ControlNet with DeepCache and Dynamic CFG",
        shows="Edges of an image steer the result. DeepCache and Dynamic CFG are on: the ControlNet's residuals reach "
        "the blocks they belong to on cached steps too. Control, true image and result are shown side by side.",
        family="sd15", files=(CHECKPOINT_SD15, CONTROLNET, CONTROL_IMAGE), settings=_CONTROL,
        published=(Published("none", "the guide gives no figure"),),
        plan=Plan(
            "DeepCache + Dynamic CFG",
            (
                Technique("DeepCache", "SpeedLabDeepCache", {"cache_interval": 3}),
                Technique("Dynamic CFG", "SpeedLabDynamicCFG", {"stop_at": 0.75}),
            ),
        ),
        build=with_control,
    ),
    _few_steps("sd15", "SD 1.5 in few steps", CHECKPOINT_SD15, _lcm("lcm-lora-sdv1-5"), 512),
    _few_steps("sdxl", "SDXL in few steps", CHECKPOINT_SDXL, _lcm("lcm-lora-sdxl"), 1024),
    _scenario(
        "sd15-samplers", "S4", "Samplers and their steps",
        "One prompt by eight samplers, each with the number of steps that suits it: time and image.",
        _S4,
        (
            _sampler("Euler", "euler", "normal", 25),
            _sampler("Euler a", "euler_ancestral", "normal", 25),
            _sampler("Heun", "heun", "normal", 25),
            _sampler("LMS", "lms", "normal", 25),
            _sampler("DPM++ 2M Karras", "dpmpp_2m", "karras", 25),
            _sampler("UniPC", "uni_pc", "normal", 25),
            _sampler("DPM++ SDE Karras", "dpmpp_sde", "karras", 10),
            _sampler("DDIM", "ddim", "ddim_uniform", 12),
        ),
        Published("20-30 steps for most, 8-12 for DPM++ SDE Karras, 10-15 for DDIM", "the guide gives no times"),
    ),
)  # fmt: skip

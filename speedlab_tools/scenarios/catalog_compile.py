"""Scenarios of compiled models. A warm-up run before the measured ones keeps cold and warm times apart.

The record has the cold one as first evaluation, with its excess over a warm one, and the warm ones as runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .graphs import Rung, side_by_side, switched_loras, text_to_image
from .scenario import (
    ASTRONAUT,
    CHECKPOINT_SD15,
    CHECKPOINT_SDXL,
    RTX_3090,
    S1_SETTINGS,
    NeededFile,
    Plan,
    Published,
    Scenario,
    Settings,
    Technique,
)


def compiled(backend: str, **options: Any) -> Technique:
    """Compile Model with a backend."""
    return Technique("Compile", "SpeedLabCompileModel", {"backend": backend, **options})


_LORA_1 = NeededFile("lora", "models/loras", "lora_1.safetensors", "any LoRA for SD 1.x")
_LORA_2 = NeededFile("lora_2", "models/loras", "lora_2.safetensors", "another LoRA for SD 1.x")
_ASTRONAUT = replace(ASTRONAUT, seed=2023, negative="")


def _sdxl(
    id: str, title: str, shows: str, published: tuple[Published, ...], technique: Technique, *packages: str,
    variant_of: str = "",
) -> Scenario:  # fmt: skip
    return Scenario(
        id=id, source="S1", title=title, shows=shows, family="sdxl", files=(CHECKPOINT_SDXL,),
        settings=replace(S1_SETTINGS, warmup=1), published=published, plan=Plan(title, (technique,)),
        build=text_to_image, packages=packages, variant_of=variant_of,
    )  # fmt: skip


_PLAIN = Settings(prompts=(_ASTRONAUT,), steps=50, cfg=7.5, sampler="ddim", scheduler="ddim_uniform", warmup=1)
_CHANNELS_LAST = {"precision": "fp16", "memory_format": "channels_last"}
_TRACED = compiled("jit_trace")
_WHOLE, _EFFICIENT = (Technique("Attention", "SpeedLabAttention", {"backend": name}) for name in ("split", "sdpa"))

COMPILE_SCENARIOS = (
    _sdxl(
        "sdxl-torch-compile",
        "SDXL with torch.compile",
        "Four prompts on a compiled UNet with CUDA graphs. The first prompt's first evaluation holds all the "
        "compiling; the others find it done.",
        (Published("torch.compile, reduce-overhead, fullgraph; compile time apart; no figure", RTX_3090),),
        compiled("inductor", mode="reduce-overhead"),
    ),
    _sdxl(
        "sdxl-onediff",
        "SDXL with OneDiff",
        "Four prompts on a UNet compiled by OneDiff, which needs the packages onediff and nexfort.",
        (Published("45 % less time, no extra memory", RTX_3090),),
        compiled("onediff_nexfort"),
        "onediff",
        "nexfort",
    ),
    _sdxl(
        "sdxl-stable-fast",
        "SDXL with Stable Fast",
        "Four prompts on a UNet compiled by stable-fast, which has to be installed.",
        (Published("the first image 19 s, the next ones far faster", RTX_3090),),
        compiled("stable_fast"),
        "sfast",
        variant_of="sdxl-onediff",
    ),
    _sdxl(
        "sdxl-tensorrt",
        "SDXL with TensorRT",
        "Four prompts on an engine built by torch-tensorrt, which has to be installed. The first evaluation holds "
        "the building of the engine.",
        (Published("8 s against 14 s; half an hour to build", RTX_3090),),
        compiled("tensorrt"),
        "torch_tensorrt",
        variant_of="sdxl-onediff",
    ),
    Scenario(
        id="sd15-cpu-onnxruntime", source="S2", title="SD 1.5 on a CPU with ONNX Runtime",
        shows="The same image with PyTorch and with ONNX Runtime, on the CPU.", family="sd15",
        files=(CHECKPOINT_SD15,), settings=replace(_PLAIN, steps=20, sampler="euler", scheduler="normal"),
        published=(Published("40 % to 50 % less time", "CPU"),), plan=Plan("PyTorch and ONNX Runtime"),
        packages=("onnx", "onnxruntime", "onnxscript"),
        build=side_by_side(
            (
                Rung("PyTorch", {"precision": "fp32"}),
                Rung("ONNX Runtime", {"precision": "fp32"}, (compiled("onnxruntime"),)),
            )
        ),
    ),
    Scenario(
        id="sd15-ladder", source="S3", title="SD 1.5, one step after the other",
        shows="The same image five times: plain, in fp16, channels last, with a traced UNet, and with "
        "memory-efficient attention in place of whole attention matrices.",
        family="sd15", files=(CHECKPOINT_SD15,), settings=_PLAIN,
        published=(Published("9.50, 3.61, 3.30, 3.21, 2.63 s", "Titan RTX"),), plan=Plan("ladder"),
        build=side_by_side(
            (
                Rung("original", {"precision": "fp32"}, (_WHOLE,)),
                Rung("fp16", {"precision": "fp16"}, (_WHOLE,)),
                Rung("channels last", _CHANNELS_LAST, (_WHOLE,)),
                Rung("traced UNet", _CHANNELS_LAST, (_WHOLE, _TRACED)),
                Rung("memory-efficient attention", _CHANNELS_LAST, (_EFFICIENT, _TRACED)),
            )
        ),
    ),
    Scenario(
        id="sd15-lora-stack", source="S4", title="Two LoRAs on a compiled model",
        shows="One prompt under two LoRAs at four pairs of strengths, one of them without both. The model is "
        "compiled once: the record of each later row says that all compiled code was found again.",
        family="sd15", files=(CHECKPOINT_SD15, _LORA_1, _LORA_2),
        settings=replace(_PLAIN, steps=20, sampler="euler", scheduler="normal", cfg=7.0),
        published=(Published("switched without a recompile; no figure", "any"),), plan=Plan("LoRA stack, compiled"),
        build=switched_loras(((1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 0.0)), compiled("inductor")),
    ),
)  # fmt: skip

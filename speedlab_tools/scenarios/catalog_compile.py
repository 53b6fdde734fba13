"""Scenarios of compiled models. A warm-up run before the measured ones keeps cold and warm times apart.

The record has the cold one as first evaluation, with its excess over a warm one, and the warm ones as runs.

Scenarios around decoding and staged batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .graphs import Rung, side_by_side, sliced_batches, staged_batch, switched_loras, text_to_image, tiled_image
from .scenario import NeededFile, Plan, Prompt, Published, Scenario, Settings, Technique


def compiled(backend: str, **options: Any) -> Technique:
    """Compile Model with a backend."""
    return Technique("Compile", "SpeedLabCompileModel", {"backend": backend, **options})


def compile_scenarios(checkpoint_sdxl: NeededFile, s1: Settings) -> tuple[Scenario, ...]:
    """The rows for the table; SDXL's checkpoint and S1's settings come from there."""
    return (*_sdxl(checkpoint_sdxl, replace(s1, warmup=1)), *_sd15())


_CHECKPOINT_SD15 = NeededFile(
    kind="checkpoint",
    folder="models/checkpoints",
    default="v1-5-pruned-emaonly.safetensors",
    where="Stable Diffusion 1.5, on Hugging Face as stable-diffusion-v1-5/stable-diffusion-v1-5",
)
_LORA_1 = NeededFile("lora", "models/loras", "lora_1.safetensors", "any LoRA for SD 1.x")
_LORA_2 = NeededFile("lora_2", "models/loras", "lora_2.safetensors", "another LoRA for SD 1.x")
_ASTRONAUT = Prompt("astronaut", "a photo of an astronaut riding a horse on mars", 2023, negative="")


def _sdxl(checkpoint: NeededFile, settings: Settings) -> tuple[Scenario, ...]:
    def row(
        id: str, title: str, shows: str, published: tuple[Published, ...], technique: Technique, *packages: str
    ) -> Scenario:
        return Scenario(
            id=id, source="S1", title=title, shows=shows, family="sdxl", files=(checkpoint,), settings=settings,
            published=published, plan=Plan(title, (technique,)), build=text_to_image, packages=packages,
        )  # fmt: skip

    return (
        row(
            "sdxl-torch-compile",
            "SDXL with torch.compile",
            "Four prompts on a compiled UNet with CUDA graphs. The first prompt's first evaluation holds all the "
            "compiling; the others find it done.",
            (Published("torch.compile, reduce-overhead, fullgraph; compile time apart; no figure", "RTX 3090"),),
            compiled("inductor", mode="reduce-overhead"),
        ),
        row(
            "sdxl-onediff",
            "SDXL with OneDiff",
            "Four prompts on a UNet compiled by OneDiff, which needs the packages onediff and nexfort.",
            (Published("45 % less time, no extra memory", "RTX 3090"),),
            compiled("onediff_nexfort"),
            "onediff",
            "nexfort",
        ),
        row(
            "sdxl-stable-fast",
            "SDXL with Stable Fast",
            "Four prompts on a UNet compiled by stable-fast, which has to be installed.",
            (Published("the first image 19 s, the next ones far faster", "RTX 3090"),),
            compiled("stable_fast"),
            "sfast",
        ),
        row(
            "sdxl-tensorrt",
            "SDXL with TensorRT",
            "Four prompts on an engine built by torch-tensorrt, which has to be installed. The first evaluation holds "
            "the building of the engine.",
            (Published("8 s against 14 s; half an hour to build", "RTX 3090"),),
            compiled("tensorrt"),
            "torch_tensorrt",
        ),
    )


def _sd15() -> tuple[Scenario, ...]:
    plain = Settings(prompts=(_ASTRONAUT,), steps=50, cfg=7.5, sampler="ddim", scheduler="ddim_uniform", warmup=1)
    channels_last = {"precision": "fp16", "memory_format": "channels_last"}
    traced = compiled("jit_trace")
    whole, efficient = (Technique("Attention", "SpeedLabAttention", {"backend": name}) for name in ("split", "sdpa"))
    return (
        Scenario(
            id="sd15-cpu-onnxruntime",
            source="S2",
            title="SD 1.5 on a CPU with ONNX Runtime",
            shows="The same image with PyTorch and with ONNX Runtime, on the CPU.",
            family="sd15",
            files=(_CHECKPOINT_SD15,),
            settings=replace(plain, steps=20, sampler="euler", scheduler="normal"),
            published=(Published("40 % to 50 % less time", "CPU"),),
            plan=Plan("PyTorch and ONNX Runtime"),
            packages=("onnx", "onnxruntime", "onnxscript"),
            build=side_by_side(
                (
                    Rung("PyTorch", {"precision": "fp32"}),
                    Rung("ONNX Runtime", {"precision": "fp32"}, (compiled("onnxruntime"),)),
                )
            ),
        ),
        Scenario(
            id="sd15-ladder",
            source="S3",
            title="SD 1.5, one step after the other",
            shows="The same image five times: plain, in fp16, channels last, with a traced UNet, and with "
            "memory-efficient attention in place of whole attention matrices.",
            family="sd15",
            files=(_CHECKPOINT_SD15,),
            settings=plain,
            published=(Published("9.50, 3.61, 3.30, 3.21, 2.63 s", "Titan RTX"),),
            plan=Plan("ladder"),
            build=side_by_side(
                (
                    Rung("original", {"precision": "fp32"}, (whole,)),
                    Rung("fp16", {"precision": "fp16"}, (whole,)),
                    Rung("channels last", channels_last, (whole,)),
                    Rung("traced UNet", channels_last, (whole, traced)),
                    Rung("memory-efficient attention", channels_last, (efficient, traced)),
                )
            ),
        ),
        Scenario(
            id="sd15-lora-stack",
            source="S4",
            title="Two LoRAs on a compiled model",
            shows="One prompt under two LoRAs at four pairs of strengths, one of them without both. The model is "
            "compiled once: the record of each later lane says that all compiled code was found again.",
            family="sd15",
            files=(_CHECKPOINT_SD15, _LORA_1, _LORA_2),
            settings=replace(plain, steps=20, sampler="euler", scheduler="normal", cfg=7.0),
            published=(Published("switched without a recompile; no figure", "any"),),
            plan=Plan("LoRA stack, compiled"),
            build=switched_loras(((1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 0.0)), compiled("inductor")),
        ),
    )


RTX_3090 = "RTX 3090"
VAE_FP16_FIX = NeededFile(
    kind="vae",
    folder="models/vae",
    default="sdxl_vae_fp16_fix.safetensors",
    where="SDXL VAE FP16 fix by madebyollin, on Hugging Face as madebyollin/sdxl-vae-fp16-fix",
)


def decode_scenarios(checkpoint: NeededFile, settings: Settings) -> Sequence[Scenario]:
    """The scenarios of this group with the SDXL `checkpoint` and the source's four prompts in `settings`."""
    one_prompt = replace(settings, prompts=settings.prompts[:1])
    return (
        Scenario(
            id="sdxl-staged-batch",
            source="S1",
            title="SDXL as a staged batch",
            shows="All four prompts are encoded, then the text encoders are freed; all are sampled, then the UNet is "
            "freed; all are decoded. Only one part of the model is on the GPU at a time, and each is loaded once.",
            family="sdxl",
            files=(checkpoint,),
            settings=settings,
            published=(Published("5.77 GB, no time lost", RTX_3090),),
            plan=Plan("staged batch"),
            build=staged_batch,
        ),
        Scenario(
            id="sdxl-vae-fp16-fix",
            source="S1",
            title="SDXL with a VAE that runs in fp16",
            shows="Four prompts, decoded by a VAE that stays finite in half precision. SDXL's own VAE does not: it "
            "would turn black, and VAE Decode would take a safer, larger precision.",
            family="sdxl",
            files=(checkpoint, VAE_FP16_FIX),
            settings=settings,
            published=(Published("-15 % memory", RTX_3090),),
            plan=Plan("VAE FP16 fix"),
            build=text_to_image,
        ),
        Scenario(
            id="sdxl-vae-slicing",
            source="S1",
            title="SDXL with sliced decoding",
            shows="One prompt in batches of 1, 2, 8 and 32, each decoded one image at a time: the memory of decoding "
            "does not grow with the batch.",
            family="sdxl",
            files=(checkpoint,),
            settings=replace(one_prompt, batch=32),
            published=(Published("constant VAE memory", RTX_3090),),
            plan=Plan("VAE slicing"),
            build=sliced_batches,
        ),
        Scenario(
            id="sdxl-vae-tiling",
            source="S1",
            title="SDXL at 4096x4096 with tiled decoding",
            shows="One image of 4096x4096, decoded in tiles of 1024 pixels that blend into each other over 128.",
            family="sdxl",
            files=(checkpoint,),
            settings=replace(one_prompt, width=4096, height=4096),
            published=(Published("fits where full decode is out of memory", RTX_3090),),
            plan=Plan("VAE tiling"),
            build=tiled_image,
        ),
    )

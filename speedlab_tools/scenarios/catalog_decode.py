"""Scenarios around decoding and staged batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .graphs import text_to_image
from .graphs_decode import sliced_batches, staged_batch, tiled_picture
from .scenario import NeededFile, Plan, Published, Scenario, Settings

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
            "freed; all are decoded. Only one part of the model is on the card at a time, and each is loaded once.",
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
            shows="One prompt in batches of 1, 2, 8 and 32, each decoded one picture at a time: the memory of decoding "
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
            shows="One picture of 4096x4096, decoded in tiles of 1024 pixels that blend into each other over 128.",
            family="sdxl",
            files=(checkpoint,),
            settings=replace(one_prompt, width=4096, height=4096),
            published=(Published("fits where full decode is out of memory", RTX_3090),),
            plan=Plan("VAE tiling"),
            build=tiled_picture,
        ),
    )

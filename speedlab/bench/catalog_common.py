"""Files, prompts and settings that many scenarios share."""

from __future__ import annotations

from .scenario import NeededFile, Prompt, Settings

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
CHECKPOINT_SD15 = NeededFile(
    kind="checkpoint",
    folder="models/checkpoints",
    default="v1-5-pruned-emaonly.safetensors",
    where="Stable Diffusion 1.5, on Hugging Face as stable-diffusion-v1-5/stable-diffusion-v1-5",
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
# The prompt of S2 and S3.
ASTRONAUT = Prompt(name="astronaut", text="a photo of an astronaut riding a horse on mars", seed=1024)
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

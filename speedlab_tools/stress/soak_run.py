"""The whole soak: demo models, a server for all prompts, and a fresh one for the prompts that are run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from speedlab.techniques.compile.backends import NAMES

from ..client.files import demo_checkpoint, demo_lora, demo_tiny_vae, demo_vae
from .server import stressed_server
from .soak import SoakTally, repeat, sample, soak
from .soak_builder import Kit

# The SDXL family's demo models take 4 GB on the disk and 8 GB of memory, and every backend of Compile Model up to a
# minute for its first program: a short soak is not worth that.
LARGE_FROM = 200


def run_soak(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> SoakTally:
    """Soak a server with `count` prompts, told as they run. Raises SpeedLabError where there is no server."""
    kit, models = demo_kit(large=count >= LARGE_FROM)
    with stressed_server(folder / "soaked", models) as server:
        tally = soak(server.url, kit, count, seed, say)
    with stressed_server(folder / "fresh", models) as server:
        repeat(server.url, kit, sample(tally, seed), seed, tally)
    return tally


def demo_kit(large: bool) -> tuple[Kit, Mapping[str, Sequence[Path]]]:
    """What the prompts may use, and its files by the folder that they belong to; made where they are not there yet."""
    sd15 = demo_checkpoint("sd15")
    sdxl = [demo_checkpoint("sdxl"), demo_checkpoint("refiner")] if large else []
    loras = [demo_lora("sd15", "lora"), demo_lora("sd15", "lora_2")]
    vae = demo_vae("speedlab_demo_vae.safetensors")
    tiny = [*demo_tiny_vae("sd15"), *(demo_tiny_vae("sdxl") if large else ())]
    names = Kit(
        sd15.name,
        loras=[path.name for path in loras],
        vaes=[vae.name, "taesd"],
        tiny=["taesd", *(["taesdxl"] if large else [])],
        sdxl=sdxl[0].name if large else "",
        refiner=sdxl[1].name if large else "",
        **({"backends": NAMES} if large else {}),
    )
    return names, {"checkpoints": [sd15, *sdxl], "loras": loras, "vae": [vae], "vae_approx": tiny}

"""Which models the techniques of this package understand: UNets of the Stable Diffusion kind."""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, VideoResBlock

from ..common.errors import UnavailableError

SUPPORTED = "SD 1.x, SD 2.x, SDXL, SSD-1B, Segmind-Vega, the SDXL refiner and their inpainting models"


def require_unet(model: Any, technique: str) -> UNetModel:
    """The UNet inside a MODEL.

    Raises UnavailableError, naming the model's class and what is supported, where the model is another network (Flux,
    a video model), or a UNet whose forward is not ComfyUI's.
    """
    network = model.get_model_object("diffusion_model")
    network = getattr(network, "_orig_mod", network)  # what torch.compile wraps
    if isinstance(network, UNetModel) and type(network)._forward is UNetModel._forward and not _is_video(network):
        return network
    raise UnavailableError(
        f"{technique} does not work on this model: it is a {type(model.model).__name__} with a "
        f"{type(network).__name__} network. Supported are image UNets: {SUPPORTED}. "
        f"Take the {technique} node out of the graph, or load one of those models."
    )


def _is_video(network: UNetModel) -> bool:
    return any(isinstance(layer, VideoResBlock) for block in network.input_blocks for layer in block)

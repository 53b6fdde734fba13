"""Which models the techniques of this package understand: UNets of the Stable Diffusion kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, VideoResBlock

from ..common.errors import UnavailableError
from ..common.torch_private import uncompiled

SUPPORTED = "SD 1.x, SD 2.x, SDXL, SSD-1B, Segmind-Vega, the SDXL refiner and their inpainting models"


def require_unet(model: Any, technique: str) -> UNetModel:
    """The UNet inside a MODEL.

    Raises UnavailableError, naming the model's class and what is supported, where the model is another network (Flux,
    a video model), or a UNet whose forward is not ComfyUI's.
    """
    network = model.get_model_object("diffusion_model")
    network = uncompiled(network)
    if isinstance(network, UNetModel) and type(network)._forward is UNetModel._forward and not _is_video(network):
        return network
    raise UnavailableError(
        f"{technique} does not work on this model: it is a {type(model.model).__name__} with a "
        f"{type(network).__name__} network. Supported are image UNets: {SUPPORTED}. "
        f"Take the {technique} node out of the graph, or load one of those models."
    )


def _is_video(network: UNetModel) -> bool:
    return any(isinstance(layer, VideoResBlock) for block in network.input_blocks for layer in block)


class Evaluation(NamedTuple):
    """What ComfyUI gives a UNet for one evaluation."""

    x: Any
    timesteps: Any = None
    context: Any = None
    y: Any = None
    control: Any = None
    transformer_options: Any = None
    rest: Mapping[str, Any] = {}

    def by_comfyui(self, network: Any) -> Any:
        """The result of ComfyUI's own forward, which it keeps in `UNetModel._forward`."""
        return type(network)._forward(network, *self[:-2], self.options, **self.rest)

    @property
    def options(self) -> dict[str, Any]:
        """`transformer_options`, or none."""
        return {} if self.transformer_options is None else self.transformer_options


def forward_through(compute: Callable[[Evaluation], Any]) -> Callable[..., Any]:
    """A forward with the signature of ComfyUI's that lets `compute` do the work."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = {name: kwargs.pop(name) for name in Evaluation._fields[:-1] if name in kwargs}
        return compute(Evaluation(*args, **named)._replace(rest=kwargs))

    return forward

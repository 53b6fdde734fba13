"""A ControlNet with random weights, in the layout of the published files."""

from __future__ import annotations

from pathlib import Path

from .files import describe, write_weights
from .spec import CheckpointSpec, architecture
from .unet import input_half
from .weights import AFTER_SILU, Layout

_HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256)
# Published nets begin with residuals of zero; these add a little, so that the control picture matters.
_RESIDUAL = 0.2


def controlnet_layout(spec: CheckpointSpec) -> Layout:
    """Every parameter of a ControlNet for the UNet of `spec`."""
    config = architecture(spec).unet
    layout = Layout()
    skips = input_half(layout, config)
    for index, (fan_in, fan_out) in enumerate(
        zip(_HINT_CHANNELS, (*_HINT_CHANNELS[1:], config.model_channels), strict=True)
    ):
        layout.conv(f"input_hint_block.{2 * index}", fan_in, fan_out, gain=1.0 if index == 0 else AFTER_SILU)
    for index, channels in enumerate(skips):
        layout.conv(f"zero_convs.{index}.0", channels, channels, kernel=1, gain=_RESIDUAL)
    layout.conv("middle_block_out.0", skips[-1], skips[-1], kernel=1, gain=_RESIDUAL)
    return layout


def write_controlnet(path: str | Path, spec: CheckpointSpec) -> Path:
    """Writes the safetensors file for `spec`'s UNet, unless a whole one lies there; OSError where it cannot."""
    metadata = describe("demo controlnet", **spec.as_dict())
    return write_weights(Path(path), controlnet_layout(spec), spec.seed, spec.torch_dtype, metadata)

"""Nodes that choose how the same work is computed: each returns a patched clone of the model."""

from __future__ import annotations

from typing import Any

from ..speedlab.techniques.attention.attach import AUTO, AttentionConfig, attach_attention
from ..speedlab.techniques.attention.backends import choices
from ..speedlab.techniques.precision.attach import (
    AUTOCASTS,
    CONVOLUTIONS,
    LINEARS,
    MEMORIES,
    MEMORY_FORMATS,
    SWITCHES,
    PrecisionConfig,
    attach_precision,
)

_CATEGORY = "SpeedLab/accelerate"


class AttentionBackend:
    """Choose what computes the attention of one model."""

    NODE_ID = "SpeedLabAttention"
    DISPLAY_NAME = "Attention Backend (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "sage attention", "flash attention", "xformers", "sdpa"]
    DESCRIPTION = (
        "Chooses what computes this model's attention; text encoders and VAE stay as they are. "
        "Exact up to rounding, but for sage, sage3 and kitchen_int8. A backend that cannot run here is an error that "
        "says why. If a backend gives NaN or Inf, the evaluation is repeated with sdpa."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("A patched clone; the input model is untouched.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model whose attention is to be computed in another way."}),
                "backend": (
                    [AUTO, *choices()],
                    {
                        "default": "auto",
                        "tooltip": "auto: measured on this device, once for each size. sdpa: PyTorch's, which picks "
                        "its kernel; sdpa_*: that kernel alone. sub_quadratic, split: least memory. "
                        "xformers, flash_attn, sage, sage3: where installed. onednn: for CPUs, fastest on AMD's. "
                        "kitchen_int8: ComfyUI's own. Last come those that other packs register.",
                    },
                ),
            },
        }

    def apply(self, model: Any, backend: str) -> tuple[Any]:
        return (attach_attention(model, AttentionConfig(backend)),)


def _switch(tooltip: str, **options: Any) -> tuple[list[str], dict[str, Any]]:
    return list(SWITCHES), {"default": "keep", "tooltip": f"{tooltip} keep: as ComfyUI has it.", **options}


class Precision:
    """Trade exactness for speed in the arithmetic of one model's runs."""

    NODE_ID = "SpeedLabPrecision"
    DISPLAY_NAME = "Precision (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "tf32", "fp16", "bf16", "autocast", "channels last", "cudnn"]
    DESCRIPTION = (
        "Sets PyTorch's speed flags, the layout of convolution weights, autocast and, on a CPU, the library behind "
        "linear layers, the way of convolutions and what becomes of freed memory while this model samples, and puts "
        "everything back afterwards, also after an error or a cancel."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("A patched clone. The input model is untouched, and comes back itself where nothing is set.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model whose runs are to use these settings."}),
                "tf32": _switch("TensorFloat-32 for matrix products of fp32 models (NVIDIA, Ampere or newer)."),
                "cudnn_tf32": _switch(
                    "TensorFloat-32 for convolutions of fp32 models; PyTorch has it on by itself.", advanced=True
                ),
                "cudnn_benchmark": _switch(
                    "Try several convolution algorithms at each new size and keep the fastest.", advanced=True
                ),
                "fp16_accumulation": _switch("Sum up in fp16 in matrix products of fp16 models: faster, less exact."),
                "memory_format": (
                    list(MEMORY_FORMATS),
                    {
                        "default": "keep",
                        "tooltip": "Layout of convolution weights and images during a run. channels_last suits "
                        "tensor cores.",
                    },
                ),
                "autocast": (
                    list(AUTOCASTS),
                    {
                        "default": "off",
                        "tooltip": "Compute matrix products, convolutions and attention of an fp32 model in this type.",
                    },
                ),
            },
            "optional": {
                "linear": (
                    list(LINEARS),
                    {
                        "default": "keep",
                        "tooltip": "On a CPU, what computes the linear layers of an fp32 model. onednn is up to twice "
                        "as fast on AMD's CPUs, equal to rounding; auto measures once and takes the faster one.",
                    },
                ),
                "memory": (
                    list(MEMORIES),
                    {
                        "default": "keep",
                        "advanced": True,
                        "tooltip": "On a CPU under Linux, what becomes of memory that a layer gives back. reuse keeps "
                        "it for the next layer until the run ends, in place of fresh pages from the system each time: "
                        "the same image, bit for bit, and faster steps. Blocks above 64 MB are kept where ComfyUI was "
                        "started with --cpu. auto reuses where it can.",
                    },
                ),
                "convolution": (
                    list(CONVOLUTIONS),
                    {
                        "default": "keep",
                        "advanced": True,
                        "tooltip": "On a CPU, how convolutions of an fp32 model with many weights and few pixels are "
                        "computed, as in the inner levels of a UNet at small sizes. matmul: as one product, faster, "
                        "equal to rounding; auto measures once and takes the faster way.",
                    },
                ),
            },
        }

    def apply(
        self,
        model: Any,
        tf32: Any,
        cudnn_tf32: Any,
        cudnn_benchmark: Any,
        fp16_accumulation: Any,
        memory_format: Any,
        autocast: Any,
        linear: Any = "keep",
        memory: Any = "keep",
        convolution: Any = "keep",
    ) -> tuple[Any]:
        config = PrecisionConfig(
            tf32, cudnn_tf32, cudnn_benchmark, fp16_accumulation, memory_format, autocast, linear, memory, convolution
        )
        return (attach_precision(model, config),)


NODES = (AttentionBackend, Precision)

"""What precision words mean: weight dtype, compute dtype, and what a device really does with them."""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any, Literal

from .torch_private import has_avx512_bf16, onednn_computes

CheckpointPrecision = Literal["auto", "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"]
CHECKPOINT_PRECISIONS: tuple[CheckpointPrecision, ...] = ("auto", "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2")
VAE_PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_TORCH_NAMES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
_SHORT_NAMES = {f"torch.{long}": short for short, long in _TORCH_NAMES.items()}


def torch_dtype(name: str) -> Any | None:
    """The torch dtype of a precision word; None for `auto`."""
    import torch

    return None if name == "auto" else getattr(torch, _TORCH_NAMES[name])


def short_name(dtype: Any) -> str | None:
    """`fp16` for torch.float16 and so on; other dtypes by their torch name; None for None."""
    return None if dtype is None else _SHORT_NAMES.get(str(dtype), str(dtype).removeprefix("torch."))


def unet_options(precision: CheckpointPrecision) -> tuple[dict[str, Any], dict[str, Any]]:
    """ComfyUI's `model_options` and `te_model_options` for a checkpoint in this precision.

    It is the UNet's weight dtype; fp32 alone holds for the text encoders too.
    """
    dtype = torch_dtype(precision)
    if dtype is None:
        return {}, {}
    return {"dtype": dtype}, ({"dtype": dtype} if precision == "fp32" else {})


def describe_parts(model: Any, clip: Any | None, vae: Any | None) -> dict[str, dict[str, str | None]]:
    """Weight and compute dtype of UNet, text encoder and VAE, for the record."""
    parts = {"unet": unet_dtypes(model)}
    if clip is not None:
        parts["text_encoder"] = _text_encoder_dtypes(clip)
    if vae is not None:
        dtype = short_name(vae.vae_dtype)
        parts["vae"] = {"weight": dtype, "compute": dtype}
    return parts


def unet_dtypes(model: Any) -> dict[str, str | None]:
    """Weight and compute dtype of a diffusion model as it will run."""
    weight = model.model_dtype()
    compute = model.get_model_object("manual_cast_dtype") or weight
    return {"weight": short_name(weight), "compute": short_name(compute)}


def _text_encoder_dtypes(clip: Any) -> dict[str, str | None]:
    """ComfyUI keeps text encoders in a storage dtype and computes them in fp32."""
    dtypes = {parameter.dtype for parameter in clip.cond_stage_model.parameters() if parameter.dim() > 1}
    weight = "+".join(sorted(str(short_name(dtype)) for dtype in dtypes)) or None
    return {"weight": weight, "compute": "fp32"}


@lru_cache(maxsize=1)
def cpu_computes_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AVX512-BF16, AMX, Arm BF16), asked of oneDNN."""
    if not onednn_computes("bf16"):
        return False
    # oneDNN emulates bf16 on CPUs with AVX512 alone, which is slower than fp32.
    return not _is_x86() or has_avx512_bf16() is not False


@lru_cache(maxsize=1)
def cpu_computes_fp16() -> bool:
    """Whether this CPU has fp16 instructions (AVX512-FP16, AMX-FP16, Arm FP16), asked of oneDNN."""
    return onednn_computes("fp16")


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")

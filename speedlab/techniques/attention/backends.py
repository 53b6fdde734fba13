"""The attention implementations that can be chosen by name, and whether each can run on a device.

All follow the calling convention of ComfyUI's attention functions: q, k, v [batch, tokens, heads * size], or
[batch, heads, tokens, size] with `skip_reshape`; the result likewise with `skip_output_reshape`. ComfyUI's own
functions are used where they do what their name says. Its functions for flash-attn and sage answer every error, and
masks, with SDPA, and on Windows it sets the kernels of its SDPA itself, so those are called here without it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.ldm.modules import attention as core
from torch.nn import attention as torch_attention

from ...common.errors import UnavailableError, first_line
from ..cpu.onednn import missing as onednn_missing
from ..cpu.onednn import onednn_attention

Attention = Callable[..., torch.Tensor]
Missing = Callable[[torch.device], "str | None"]

# Every kernel knows this head size: one that refuses it refuses the device or the dtype.
COMMON_HEAD_DIM = 64
_PROBE_QUERIES, _PROBE_KEYS = 64, 77
_HALF = (torch.bfloat16, torch.float16)


def _nothing_missing(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation. `missing` tells cheaply what it lacks on a device; `always` needs no such question.

    One that is not `exact` computes in fewer bits than the model, and steps back where ComfyUI forbids that.
    """

    run: Attention
    missing: Missing = _nothing_missing
    package: str | None = None
    takes_masks: bool = True
    always: bool = False
    exact: bool = True


def _heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, done: bool) -> tuple[torch.Tensor, ...]:
    """q, k, v as [batch, heads, tokens, size]."""
    if done:
        return q, k, v
    return tuple(t.unflatten(-1, (heads, t.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))


def _tokens_first(out: torch.Tensor, keep_heads: bool) -> torch.Tensor:
    """[batch, heads, tokens, size] as ComfyUI wants it back."""
    return out if keep_heads else out.transpose(1, 2).flatten(2)


def _broadcast(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask that broadcasts over [batch, heads, queries, keys]."""
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)
    if mask.ndim == 3:
        mask = mask.unsqueeze(1)
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def _sdpa_with(kernel: Callable[[], AbstractContextManager], upcasts: bool = False) -> Attention:
    """SDPA with one kernel and no other: where that one cannot run, PyTorch raises RuntimeError.

    The fused kernels sum up in fp32 by themselves; the plain one does so where the model asks for it.
    """

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        q, k, v = _heads_first(q, k, v, heads, skip_reshape)
        dtype = q.dtype
        if upcasts and core.get_attn_precision(attn_precision, dtype) == torch.float32:
            q, k, v = q.float(), k.float(), v.float()
        extras = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        with kernel():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=_broadcast(mask, q.dtype), **extras)
        return _tokens_first(out.to(dtype), skip_output_reshape)

    return run


def _onednn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    if mask is not None:
        raise RuntimeError("attention out of oneDNN's products takes no mask")
    q, k, v = _heads_first(q, k, v, heads, skip_reshape)
    return _tokens_first(onednn_attention(q, k, v, kwargs.get("scale")), skip_output_reshape)


def _flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    if mask is not None:
        raise RuntimeError("flash-attn takes no attention mask")
    q, k, v = (t.transpose(1, 2) for t in _heads_first(q, k, v, heads, skip_reshape))
    out = flash_attn_func(q, k, v, softmax_scale=kwargs.get("scale"))
    return _tokens_first(out.transpose(1, 2), skip_output_reshape)


def _sage(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    from sageattention import sageattn  # type: ignore[import-not-found]

    if mask is not None:
        raise RuntimeError("sageattention takes no attention mask")
    q, k, v = _heads_first(q, k, v, heads, skip_reshape)
    out = sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=kwargs.get("scale"))
    return _tokens_first(out, skip_output_reshape)


def _sage3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    from sageattn3 import sageattn3_blackwell  # type: ignore[import-not-found]

    q, k, v = (t.contiguous() for t in _heads_first(q, k, v, heads, skip_reshape))
    if mask is not None or kwargs.get("scale") is not None or q.dtype not in _HALF or q.shape[-1] >= 256:
        raise RuntimeError("sage 3 takes fp16 or bf16, heads below 256 numbers, no attention mask and no scale")
    return _tokens_first(sageattn3_blackwell(q, k, v, is_causal=False), skip_output_reshape)


def _package(module: str) -> Missing:
    def missing(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it needs an NVIDIA or AMD GPU, and this model runs on {device.type}"
        if importlib.util.find_spec(module) is None:
            return f"the Python package {module} is not installed"
        return None

    return missing


def _xformers_missing(device: torch.device) -> str | None:
    reason = _package("xformers")(device)
    if reason is None and not comfy.model_management.xformers_enabled():
        return "ComfyUI has xformers switched off (--disable-xformers), or found it broken at its start"
    return reason


def _sdpa_kernel(name: str) -> Backend:
    kernel: Any = getattr(torch_attention.SDPBackend, name, None)

    def missing(device: torch.device) -> str | None:
        return None if kernel is not None else f"this PyTorch ({torch.__version__}) does not know that kernel"

    return Backend(_sdpa_with(lambda: torch_attention.sdpa_kernel(kernel), upcasts=name == "MATH"), missing)


def _kitchen_missing(device: torch.device) -> str | None:
    """Core registers its function only where its package has kernels for the GPU."""
    if "comfy_kitchen_int8" not in getattr(core, "REGISTERED_ATTENTION_FUNCTIONS", {}):
        return f"ComfyUI has no int8 kernel of comfy-kitchen for {device.type} here"
    return None


def _core_function(
    name: str, missing: Missing = _nothing_missing, package: str | None = None, exact: bool = True
) -> Backend:
    """One of ComfyUI's own, if it has it; without `missing` it runs everywhere."""
    function: Attention | None = getattr(core, name, None)
    if function is None:

        def absent(*args: Any, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError(f"this ComfyUI has no function {name}")

        return Backend(absent, lambda device: f"this ComfyUI has no function {name}", package, exact=exact)
    return Backend(function, missing, package, always=missing is _nothing_missing, exact=exact)


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(core.attention_pytorch, always=True),
    "sdpa_flash": _sdpa_kernel("FLASH_ATTENTION"),
    "sdpa_mem_efficient": _sdpa_kernel("EFFICIENT_ATTENTION"),
    "sdpa_cudnn": _sdpa_kernel("CUDNN_ATTENTION"),
    "sdpa_math": _sdpa_kernel("MATH"),
    "sub_quadratic": _core_function("attention_sub_quad"),
    "split": _core_function("attention_split"),
    "xformers": _core_function("attention_xformers", _xformers_missing, "xformers"),
    "flash_attn": Backend(_flash_attn, _package("flash_attn"), "flash-attn", takes_masks=False),
    "sage": Backend(_sage, _package("sageattention"), "sageattention", takes_masks=False, exact=False),
    "onednn": Backend(_onednn, onednn_missing, takes_masks=False),
    "sage3": Backend(_sage3, _package("sageattn3"), "sageattn3", takes_masks=False, exact=False),
    "kitchen_int8": _core_function("attention_comfy_kitchen_int8", _kitchen_missing, exact=False),
}
# What core registers of its own, by its names.
_CORES = {"pytorch", "sub_quad", "split", "xformers", "flash", "sage", "sage3", "comfy_kitchen_int8"}


def choices() -> tuple[str, ...]:
    """The names of all backends: these, and what other packs have registered with ComfyUI by now."""
    for name, function in getattr(core, "REGISTERED_ATTENTION_FUNCTIONS", {}).items():
        if name not in _CORES:
            # What it computes in is not known.
            BACKENDS.setdefault(name, Backend(function, lambda device: None, exact=False))
    return tuple(BACKENDS)


@torch.compiler.assume_constant_result
def why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> str | None:
    """Why backend `name` cannot do such an attention; None where it can. Found out by doing a small one, once."""
    backend = BACKENDS[name]
    if backend.always:
        return None
    if masked and not backend.takes_masks:
        return "it takes no attention mask"
    return _tried(backend, device, dtype, head_dim, masked)


@lru_cache(maxsize=256)
def _tried(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> str | None:
    reason = backend.missing(device)
    if reason is not None:
        return reason
    q, k, v = (
        torch.zeros(1, 2, tokens, head_dim, device=device, dtype=dtype)
        for tokens in (_PROBE_QUERIES, _PROBE_KEYS, _PROBE_KEYS)
    )
    mask = torch.zeros(_PROBE_QUERIES, _PROBE_KEYS, device=device, dtype=dtype) if masked else None
    with warnings.catch_warnings(record=True) as hints:  # where PyTorch says why a kernel was not taken
        warnings.simplefilter("always")
        try:
            backend.run(q, k, v, 2, mask=mask, skip_reshape=True)
        except torch.cuda.OutOfMemoryError:  # says nothing about the backend
            raise
        except Exception as error:  # whatever a foreign package raises is the reason why it cannot run
            return _reason(error, [str(hint.message) for hint in hints], device, dtype, head_dim)
    return None


def _reason(error: Exception, hints: Iterable[str], device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    short = str(dtype).removeprefix("torch.")
    reasons = [hint for hint in hints if "because" not in hint and "disabled" not in hint] or [first_line(error)]
    detail = first_line(RuntimeError(reasons[0])).rstrip(".")
    return f"on {device.type} it does not do {short} with head size {head_dim} ({detail})"


def require(name: str, device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]) -> None:
    """Raise UnavailableError where backend `name` cannot run on `device` at all, in no dtype and for no head size.

    A model of `dtype` may yet compute in another one under autocast, so one that works is enough.
    """
    reasons = []
    for tried in (dtype, *_HALF):
        for head_dim in head_dims:
            reason = why_not(name, device, tried, head_dim, False)
            if reason is None:
                return
            reasons.append(reason)
    raise unavailable(name, BACKENDS[name].missing(device) or f"{reasons[0]}, nor any half precision", device, dtype)


def unavailable(name: str, reason: str, device: torch.device, dtype: torch.dtype) -> UnavailableError:
    """The error for a backend that cannot do `dtype` on `device`, with what to do."""
    package = BACKENDS[name].package
    remedies = []
    if package is not None and "not installed" in reason:
        remedies.append(f"install it into ComfyUI's Python with `pip install {package}`")
    elif any(why_not(name, device, half, COMMON_HEAD_DIM, False) is None for half in _HALF if half != dtype):
        remedies.append("load the model in fp16 or bf16")
    remedies.append("choose another backend, such as auto or sdpa")
    what_to_do = ", or ".join(remedies)
    return UnavailableError(
        f"Attention Backend cannot use '{name}' here: {reason}. {what_to_do[0].upper()}{what_to_do[1:]}."
    )

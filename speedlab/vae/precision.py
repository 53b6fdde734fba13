"""The dtype that a VAE decodes in: what `auto` starts with, what comes after NaN or Inf, and VAEs in another dtype.

A VAE has no clone, so another dtype is a second module with the same weights (see `loading.vae_in`), kept as long as
the first one lives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from ..common import dtypes
from ..common.dtypes import cpu_computes_bf16, short_name, torch_dtype
from ..models.loading import FIXED_PRECISION, is_sd_vae, vae_in
from .variants import derivations_of, is_compiled_vae

_siblings: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
_derived: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
_not_finite_in: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Abilities:
    """What a device computes well: `fp16` means faster than fp32 and not broken, `bf16` that it is native."""

    fp16: bool
    bf16: bool


def starting_dtype(vae: Any, wanted: str) -> Any:
    """The torch dtype to decode in first: the one asked for, else what `auto` means for this VAE and its past."""
    asked = torch_dtype(wanted)
    if asked is not None:
        return asked
    first = "fp16" if _may_try_fp16(vae) else str(short_name(vae.vae_dtype))
    bad = _not_finite_in.get(vae.first_stage_model, set())
    return torch_dtype(first_sound(first, bad, abilities_for(vae))) or vae.vae_dtype


def first_sound(first: str, bad: set[str] | frozenset[str], able: Abilities) -> str:
    """The first precision from `first` on that is not known to give NaN or Inf; fp32 is the end of the line."""
    name: str | None = first
    while name is not None and name in bad:
        name = safer(name, able)
    return name or "fp32"


def safer(name: str, able: Abilities) -> str | None:
    """The next precision after NaN or Inf: bf16 has fp32's range where the device computes in it; None after fp32."""
    if name == "fp32":
        return None
    return "bf16" if name == "fp16" and able.bf16 else "fp32"


def slow_choice(vae: Any, dtype: Any) -> str:
    """A sentence where decoding in `dtype` takes many times as long as in another on this device; "" otherwise."""
    if short_name(dtype) != "fp16" or vae.device.type != "cpu" or dtypes.cpu_computes_fp16():
        return ""
    return (
        "The VAE decodes in fp16, for which this CPU has no instructions: that can take minutes for one "
        "small image. Set precision to auto, bf16 or fp32, here and in Load VAE."
    )


def remember_not_finite(vae: Any, dtype: Any) -> None:
    """`auto` does not start in `dtype` again for this VAE."""
    _not_finite_in.setdefault(vae.first_stage_model, set()).add(str(short_name(dtype)))


def sibling(vae: Any, dtype: Any) -> Any:
    """The VAE itself if it runs in `dtype`, else its second module in that dtype, built once."""
    if vae.vae_dtype == dtype:
        return vae
    modules = _siblings.setdefault(vae.first_stage_model, {})
    if dtype not in modules:
        modules[dtype] = vae_in(vae, dtype)
    # Of this VAE object: another one of the same weights may be under another plan, or not compiled.
    derived = _derived.setdefault(vae, {})
    if dtype not in derived:
        derived[dtype] = modules[dtype]
        for derivation in derivations_of(vae).values():
            derived[dtype] = derivation.of(derived[dtype])
    return derived[dtype]


def sibling_bytes(vae: Any) -> int:
    """Bytes of all second modules that were built from this VAE."""
    import comfy.model_management as mm

    return sum(mm.module_size(other.first_stage_model) for other in _siblings.get(vae.first_stage_model, {}).values())


def abilities(device: Any) -> Abilities:
    """What ComfyUI knows of a device, and on a CPU what its instructions say."""
    import comfy.model_management as mm

    if getattr(device, "type", str(device)) == "cpu":
        return Abilities(fp16=False, bf16=cpu_computes_bf16())
    return Abilities(fp16=bool(mm.should_use_fp16(device)), bf16=bool(mm.should_use_bf16(device)))


def abilities_for(vae: Any) -> Abilities:
    """What a VAE's device computes well, less what ComfyUI knows not to work for this VAE."""
    able, works = abilities(vae.device), getattr(vae, "working_dtypes", None)
    return able if works is None else replace(able, bf16=able.bf16 and torch_dtype("bf16") in works)


def _may_try_fp16(vae: Any) -> bool:
    """Whether half precision is worth a try: an image VAE of SD or SDXL on a CUDA or ROCm device, and no user chose a
    precision for it. Of other VAEs core says in what they work, and has chosen by that.

    A compiled VAE stays as it is: trying would compile it once more.
    """
    from comfy.cli_args import args

    flags = ("fp16_vae", "bf16_vae", "fp32_vae", "cpu_vae")
    if is_compiled_vae(vae) or not is_sd_vae(vae):
        return False
    chosen = vae.patcher.get_attachment(FIXED_PRECISION) or any(getattr(args, flag, False) for flag in flags)
    return not chosen and vae.device.type == "cuda" and abilities(vae.device).fp16

"""Give back the memory of one kind of model, through ComfyUI's own model management; every other model stays loaded."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..common.errors import SpeedLabError

log = logging.getLogger(__name__)

What = Literal["text_encoders", "diffusion", "vae", "all"]
WHAT: tuple[What, ...] = get_args(What)


@dataclass(frozen=True)
class Freed:
    """One model that was unloaded: its class, the device it was on, and the bytes of its weights there."""

    name: str
    device: str
    size_bytes: int


def free_models(what: str) -> tuple[Freed, ...]:
    """Unload the models of one kind from their devices. Raises SpeedLabError for a kind that does not exist.

    Their weights go to the place that ComfyUI offloads to, patches such as LoRAs are taken out; whoever uses a model
    again loads it again. On a CPU the weights already lie in RAM and stay there as long as the workflow holds them.
    """
    import comfy.model_management as mm

    if what not in WHAT:
        raise SpeedLabError(f"Free Memory cannot free '{what}': choose one of {', '.join(WHAT)}.")
    wanted, kept = _split(mm.current_loaded_models, what)
    freed = tuple(_describe(loaded) for loaded in wanted)
    for device in dict.fromkeys(loaded.device for loaded in wanted):
        # More than any device has: core then unloads everything on it but what it is told to keep.
        mm.free_memory(1e30, device, keep_loaded=kept)
    if wanted:
        gc.collect()
        mm.soft_empty_cache()
    return freed


def describe(what: str, freed: Sequence[Freed]) -> str:
    """What was freed, in words."""
    if not freed:
        return f"Nothing to free: no {_IN_WORDS[what]} is loaded."
    models = ", ".join(f"{one.name} ({one.size_bytes / 1e9:.2f} GB on {one.device})" for one in freed)
    text = f"Unloaded {models}."
    if all(one.device == "cpu" for one in freed):
        text += " On a CPU the weights stay in RAM while the workflow holds them; only patched copies were given back."
    return text


_IN_WORDS = {"text_encoders": "text encoder", "diffusion": "diffusion model", "vae": "VAE", "all": "model"}


def kind_of(patcher: Any) -> str | None:
    """`text_encoders`, `diffusion`, `vae`, or None for another model such as a ControlNet."""
    import comfy.model_base

    if getattr(patcher, "is_clip", False):
        return "text_encoders"
    if isinstance(patcher.model, comfy.model_base.BaseModel):
        return "diffusion"
    # Core marks no VAE; among the models that it loads, VAEs alone decode.
    return "vae" if callable(getattr(patcher.model, "decode", None)) else None


def _split(loaded: Sequence[Any], what: str) -> tuple[list[Any], list[Any]]:
    """(to unload, to keep). A model whose patcher is gone is core's to clean up."""
    wanted: list[Any] = []
    kept: list[Any] = []
    for one in loaded:
        chosen = one.model is not None and (what == "all" or kind_of(one.model) == what)
        (wanted if chosen else kept).append(one)
    return wanted, kept


def _describe(loaded: Any) -> Freed:
    return Freed(type(loaded.model.model).__name__, str(loaded.device), int(loaded.model_loaded_memory()))

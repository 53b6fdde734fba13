"""Advice where memory runs out: what is held is freed, and the message names the next plan to try."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..common.core import is_out_of_memory
from ..common.errors import SpeedLabError, first_line
from ..patching.compiled import has_compile_wrapper, refusal_of_streaming
from ..patching.wrappers import refuse_work_units
from ..vae.variants import Derivation, set_derivation
from .placement import Group, Offload, Placement, is_planned, planned

_NEXT = {
    "none": "Set offload of Memory Plan to model, or to auto with a budget_gb below what the device has.",
    "model": "Set offload of Memory Plan to sequential.",
    "sequential": "This is the smallest plan: make the image or the batch smaller.",
}
_IN_PHASE = {
    "text encoding": "",
    "sampling": "",
    "decoding": " For the decoding alone, VAE Decode with a tile_size of 512 or with slicing, or Tiny VAE Decode, "
    "needs a fraction.",
}


class OutOfMemoryError(SpeedLabError):
    """The device ran out of memory; the message says in which phase and what to try."""


@contextmanager
def advice(phase: str, offload: Offload, group: Group) -> Iterator[None]:
    """Turn an out-of-memory of the block into an OutOfMemoryError, after the plan's models left the device."""
    reason = None
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        reason = first_line(error)
    finally:
        group.settle()
    if reason is not None:
        # Outside of the handler: the error held the tensors of every frame that it came through.
        import comfy.model_management as mm

        group.unload()
        mm.soft_empty_cache()
        what_next = f"Its models were taken off the device. {_NEXT[offload]}"
        if group.is_paged():
            what_next = (
                "ComfyUI's dynamic VRAM moves the weights here, and had moved what it can: make the image or the batch "
                "smaller, or start ComfyUI with a higher --reserve-vram."
            )
        raise OutOfMemoryError(
            f"Out of memory while {phase} with offload {offload} ({reason}). {what_next}{_IN_PHASE[phase]}"
        )


def with_advice_in_sampling(offload: Offload, group: Group) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper."""

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        transformer_options = executor.class_obj.model_options.get("transformer_options", {})
        refuse_work_units(executor.class_obj.model_patcher, "Memory Plan")
        if offload == "sequential" and has_compile_wrapper(transformer_options.get("wrappers", {})):
            raise refusal_of_streaming()
        with advice("sampling", offload, group):
            return executor(*args, **kwargs)

    return outer_sample


def settling(group: Group) -> Callable[..., Any]:
    """An APPLY_MODEL wrapper: after a cancel in the middle of a layer its weights are at home before anything further
    out puts other weights, or another layout of them, back."""

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return executor(*args, **kwargs)
        except BaseException:
            group.settle()
            raise

    return apply_model


_classes: dict[type, type] = {}


def _advising_class(base: type, phase: str, methods: tuple[str, ...]) -> type:
    """A class of ComfyUI's with some methods that advise; the plan lies on the object."""
    if base in _classes:
        return _classes[base]

    def wrapped(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with advice(phase, *self.speedlab_plan):
                return getattr(base, name)(self, *args, **kwargs)

        method.__name__ = name
        return method

    def clone(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The plan goes along: nodes behind it clone, to add a LoRA or to leave out a layer."""
        return _with_advice(base.clone(self, *args, **kwargs), phase, methods, *self.speedlab_plan)  # type: ignore[attr-defined]

    methods_of = {name: wrapped(name) for name in methods if hasattr(base, name)}
    if hasattr(base, "clone"):
        methods_of["clone"] = clone
    _classes[base] = type(f"Advising{base.__name__}", (base,), {"plain": base, **methods_of})
    return _classes[base]


def _with_advice(thing: Any, phase: str, methods: tuple[str, ...], offload: Offload, group: Group) -> Any:
    base = getattr(type(thing), "plain", type(thing))
    thing.__class__ = _advising_class(base, phase, methods)
    thing.speedlab_plan = (offload, group)
    return thing


def clip_with_advice(clip: Any, patcher: Any, offload: Offload, group: Group) -> Any:
    """A clone of a CLIP on another patcher of the same weights."""
    clone = clip.clone()
    clone.patcher = patcher
    return _with_advice(clone, "text encoding", ("encode_from_tokens", "encode_from_tokens_scheduled"), offload, group)


def vae_with_advice(vae: Any, patcher: Any, offload: Offload, group: Group) -> Any:
    """A second VAE object on another patcher; the network is shared, and nothing of the first one is changed."""
    second = copy.copy(vae)
    second.patcher = patcher
    set_derivation(second, "memory_plan", _derivation(patcher.placement) if is_planned(patcher) else None)
    return _with_advice(second, "decoding", ("decode", "decode_tiled", "encode", "encode_tiled"), offload, group)


def _derivation(placement: Placement) -> Derivation:
    """Put a second module of a planned VAE's weights under the same plan."""

    def planned_too(other: Any) -> Any:
        placement.group.add(other.first_stage_model)
        return vae_with_advice(other, planned(other.patcher, placement), placement.offload, placement.group)

    return Derivation(f"memory_plan(offload={placement.offload})", planned_too)

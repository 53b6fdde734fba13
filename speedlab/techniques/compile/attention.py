"""Which of a run's options a compiled transformer gets to see: only what its attention needs.

ComfyUI's options hold the step's sigma, the uuids of the conds and other values that change with every evaluation. A
graph that looked at them would be compiled again each time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from comfy.ldm.modules import attention as core

from ...patching.wrappers import state_name, state_of
from ..attention import attach as chosen

OVERRIDE = "optimized_attention_override"
_PATCHES = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
_REPLACED = ("attn1", "attn2")
# A server's nodes are loaded under their path, such as /ComfyUI/comfy_extras/nodes_pag.
_SAME_AT_EVERY_STEP = re.compile(
    r"(.*[/\\])?comfy_extras[./\\](nodes_freelunch\.FreeU|nodes_pag\.PerturbedAttentionGuidance)"
)
_ASK_FOR_MEMORY = ("split", "sub_quadratic")


def attention_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for a transformer without patches; None where another pack's attention override may need all of them.

    ComfyUI's attentions that ask for the free memory cannot be compiled; PyTorch's takes their place.
    """
    override = options.get(OVERRIDE)
    if override is None:
        return {OVERRIDE: _pytorch_attention} if _asks_for_memory() else {}
    if not chosen.is_own(override):
        return None
    run = state_of(options, chosen.KEY)
    if run is None or run.previous is not None:
        return None
    return {OVERRIDE: override, state_name(chosen.KEY): run}


def transformer_patch(options: Mapping[str, Any], depth: int) -> str | None:
    """A patch that acts inside of the transformer that is about to run, by name; None where there is none."""
    patches = options.get("patches", {})
    for kind in _PATCHES:
        if patches.get(kind):
            return f"{kind} {name_of(patches[kind][0])}"
    block = options.get("block")
    if block is None:
        return None
    places = [block, *((block[0], block[1], index) for index in range(depth))]
    for kind in _REPLACED:
        replaced = options.get("patches_replace", {}).get(kind, {})
        for place in places:
            if place in replaced:
                return f"{kind} replacement {name_of(replaced[place])}"
    return None


def any_patch(options: Mapping[str, Any], traced: bool = False) -> str | None:
    """Any patch of the network, by name, but those of `traced_patches` where these are `traced`; None where there is
    none."""
    for words, _, function in _patches(options):
        if not (traced and _can_be_traced(function)):
            return f"{words} {name_of(function)}"
    return None


def traced_patches(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the patches of ComfyUI's FreeU and PerturbedAttentionGuidance alone: they do the same at every step,
    so that they can be traced."""
    patches = options.get("patches", {}).get("output_block_patch", ())
    replaced = options.get("patches_replace", {}).get("attn1", {})
    return {
        "patches": {"output_block_patch": [patch for patch in patches if _can_be_traced(patch)]},
        "patches_replace": {"attn1": {at: patch for at, patch in replaced.items() if _can_be_traced(patch)}},
    }


def patch_word(options: Mapping[str, Any]) -> Hashable:
    """Equal for those patches that do the same: node, place, and the scales that it was given."""
    return tuple(
        (place, name_of(patch), str(inspect.getclosurevars(patch).nonlocals.get("scale_dict")))
        for _, place, patch in _patches(options)
    )


def _patches(options: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each with its kind in words, and the block whose attention it replaces."""
    for kind, functions in options.get("patches", {}).items():
        yield from ((kind, None, function) for function in functions)
    for kind, replaced in options.get("patches_replace", {}).items():
        yield from ((f"{kind} replacement", place, function) for place, function in replaced.items())


def _can_be_traced(patch: Any) -> bool:
    return _SAME_AT_EVERY_STEP.match(name_of(patch)) is not None


def name_of(function: Any) -> str:
    """A function's or object's name, with the module that it comes from."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{name}"


def attention_word(options: Mapping[str, Any] | None) -> str:
    """What computes attention with these options, for notes and keys."""
    if not options:
        return ""
    run = state_of(options, chosen.KEY)
    if run is None:
        return "pytorch"
    return chosen.SAFE if run.safe or run.backend == chosen.AUTO else str(run.backend)


def not_compilable(options: Mapping[str, Any]) -> str:
    """Attention Backend's choice where it asks for the free memory, by name; "" otherwise."""
    run = state_of(options, chosen.KEY)
    return str(run.backend) if run is not None and not run.safe and run.backend in _ASK_FOR_MEMORY else ""


def note_use(options: Mapping[str, Any]) -> None:
    """Tell Attention Backend that its choice computes: a program that was traced earlier does not say so itself."""
    run = state_of(options, chosen.KEY)
    if run is not None:
        run.used = True
        run.suspicious = run.suspicious or attention_word(options) != chosen.SAFE


def _asks_for_memory() -> bool:
    names = ("attention_sub_quad", "attention_split")
    return any(core.optimized_attention is getattr(core, name, None) for name in names)


def _pytorch_attention(_function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    kwargs.pop("transformer_options", None)
    return core.attention_pytorch(*args, **kwargs)

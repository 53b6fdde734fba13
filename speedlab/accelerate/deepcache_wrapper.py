"""The part of DeepCache that runs inside the UNet's forward, and so inside a compiled model.

Everything here is written for `torch.compile`: no uuids, step numbers or other values that change from call to call, so
that a compiled model needs two graphs, one for full steps and one for cached steps, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .deepcache_forward import cut, shallow_forward
from .patching import Wrapper

# In `transformer_options` of one forward: the list that a full step's features go to, and the features of a cached one.
_KEPT = "speedlab_deepcache_kept"
_FEATURES = "speedlab_deepcache_features"


@contextmanager
def keeping(options: dict[str, Any]) -> Iterator[list[torch.Tensor]]:
    """Forwards inside are full ones and leave their deep features [chunks * B, C, H, W] in the list."""
    kept: list[torch.Tensor] = []
    options[_KEPT] = kept
    try:
        yield kept
    finally:
        options.pop(_KEPT, None)


@contextmanager
def reusing(options: dict[str, Any], features: torch.Tensor) -> Iterator[None]:
    """Forwards inside run the outer blocks alone, on top of `features` [chunks * B, C, H, W]."""
    options[_FEATURES] = features
    try:
        yield
    finally:
        options.pop(_FEATURES, None)


def partial_forward(branch: int) -> Wrapper:
    """A DIFFUSION_MODEL wrapper that does what `keeping` or `reusing` around the call asks for, else nothing."""

    def diffusion_model(
        executor: Any,
        x: torch.Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        options = {} if transformer_options is None else transformer_options
        inputs = (x, timesteps, context, y, control)
        features = options.get(_FEATURES)
        if features is not None:
            return _cached(executor, branch, features, inputs, options, kwargs)
        kept = options.get(_KEPT)
        if kept is not None:
            return _full(executor, branch, kept, inputs, options, kwargs)
        return executor(*inputs, options, **kwargs)

    return diffusion_model


def _full(
    executor: Any, branch: int, kept: list[torch.Tensor], inputs: tuple[Any, ...], options: dict, kwargs: dict
) -> torch.Tensor:
    """The whole forward, as it would run without DeepCache; a patch that changes nothing looks on."""
    place, rows = ("output", cut(executor.class_obj, branch)), inputs[0].shape[0]

    def look(h: torch.Tensor, skip: torch.Tensor, extra: dict) -> tuple[torch.Tensor, torch.Tensor]:
        if extra.get("block") == place and h.shape[0] == rows:
            # A copy: patches work on the tensor in place later in the same forward.
            kept.append(h.clone())
        return h, skip

    # Before all other patches: on cached steps those run on the kept features again. The copy keeps the caller's own
    # options as they are.
    patches = dict(options.get("patches", {}))
    patches["output_block_patch"] = [look, *patches.get("output_block_patch", ())]
    return executor(*inputs, {**options, "patches": patches}, **kwargs)


def _cached(
    executor: Any, branch: int, features: torch.Tensor, inputs: tuple[Any, ...], options: dict, kwargs: dict
) -> torch.Tensor:
    """The outer blocks only, inside the wrappers that other nodes put between this one and the model."""
    unet = executor.class_obj

    def outer_blocks(x: Any, timesteps: Any, context: Any, y: Any, control: Any, extra: dict, **_: Any) -> torch.Tensor:
        return shallow_forward(unet, branch, features, x, timesteps, context, y, control, extra)

    inner = type(executor).new_class_executor(outer_blocks, unet, executor.wrappers, executor.idx + 1)
    return inner.execute(*inputs, options, **kwargs)

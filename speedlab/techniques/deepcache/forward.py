"""A UNet evaluated in part: its outermost blocks only, fed with features that an earlier evaluation left.

The part of DeepCache that runs inside the UNet's forward, and so inside a compiled model.

Everything here is written for `torch.compile`: no uuids, step numbers or other values that change from call to call, so
that a compiled model needs two graphs, one for full steps and one for cached steps, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, apply_control, forward_timestep_embed
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

from ...models.unet import Evaluation
from ...patching.wrappers import Wrapper

Control = Mapping[str, list]


def largest_branch(unet: UNetModel) -> int:
    """The branch that still leaves something out: the middle block, or the deepest blocks where there is no middle."""
    return len(unet.output_blocks) - (1 if unet.middle_block is not None else 2)


def cut(unet: UNetModel, branch: int) -> int:
    """The first output block that a cached step runs; cached features are the input that it gets from below."""
    return len(unet.output_blocks) - branch - 1


def shallow_forward(
    unet: UNetModel,
    branch: int,
    features: torch.Tensor,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor | None,
    y: torch.Tensor | None,
    control: Control | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Input blocks 0..branch, then the last branch + 1 output blocks on top of `features`.

    x: [B, C, H, W] as the UNet takes it; features: [B, C', H', W'], which belong to this call and may be written to.
    Returns [B, out channels, H, W]. Built from ComfyUI's own pieces: every patch that applies to a block which runs is
    called, with the `block` and `transformer_index` of a full forward, and `options` is written as a full forward does.
    """
    options["original_shape"] = list(x.shape)
    options["transformer_index"] = 0
    patches = options.get("patches", {})
    control = _outer_residuals(control, cut(unet, branch))
    emb = _embedding(unet, x, timesteps, y, patches, options)
    skips = _input_half(unet, branch, x, emb, context, control, patches, options)
    options["transformer_index"] += _transformers_left_out(unet, branch)

    h = features
    for index in range(cut(unet, branch), len(unet.output_blocks)):
        options["block"] = ("output", index)
        skip = apply_control(skips.pop(), control, "output")
        for patch in patches.get("output_block_patch", ()):
            h, skip = patch(h, skip, options)
        if skip is not None:  # None: a patch has put the two together itself
            h = torch.cat([h, skip], dim=1)
        output_shape = skips[-1].shape if skips else None
        h = forward_timestep_embed(unet.output_blocks[index], h, emb, context, options, output_shape)
    h = h.type(x.dtype)
    return unet.id_predictor(h) if unet.predict_codebook_ids else unet.out(h)


def _embedding(
    unet: UNetModel,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    y: torch.Tensor | None,
    patches: Mapping[str, list],
    options: dict[str, Any],
) -> torch.Tensor:
    emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels, repeat_only=False).to(x.dtype))
    for patch in patches.get("emb_patch", ()):
        emb = patch(emb, unet.model_channels, options)
    if unet.num_classes is None:
        return emb
    if y is None:
        raise ValueError("this UNet needs a class or pooled text embedding (y), and the conditioning has none")
    return emb + unet.label_emb(y.to(x.device))


def _input_half(
    unet: UNetModel,
    branch: int,
    x: torch.Tensor,
    emb: torch.Tensor,
    context: torch.Tensor | None,
    control: Control | None,
    patches: Mapping[str, list],
    options: dict[str, Any],
) -> list[torch.Tensor]:
    """What input blocks 0..branch hand over to the output half."""
    skips = []
    h = x
    for index in range(branch + 1):
        options["block"] = ("input", index)
        h = forward_timestep_embed(unet.input_blocks[index], h, emb, context, options)
        h = apply_control(h, control, "input")
        for patch in patches.get("input_block_patch", ()):
            h = patch(h, options)
        skips.append(h)
        for patch in patches.get("input_block_patch_after_skip", ()):
            h = patch(h, options)
    return skips


def _outer_residuals(control: Control | None, left_out: int) -> Control | None:
    """ControlNet's residuals for the blocks that run.

    The lists are popped from the end. Those for input blocks start at the outermost, which runs; those for output
    blocks start at the deepest, so that `left_out` of them are dropped. The middle block never runs here.
    """
    if control is None:
        return None
    output = control.get("output", [])
    return {"input": list(control.get("input", [])), "output": output[: max(len(output) - left_out, 0)]}


def _transformers_left_out(unet: UNetModel, branch: int) -> int:
    middle = [] if unet.middle_block is None else [unet.middle_block]
    blocks = [*unet.input_blocks[branch + 1 :], *middle, *unet.output_blocks[: cut(unet, branch)]]
    return sum(isinstance(layer, SpatialTransformer) for block in blocks for layer in block)


class Features(NamedTuple):
    """What deep features look like: their channels, and how often their height and width are half of the latent's."""

    channels: int
    halved: int


def features_of(unet: UNetModel, branch: int) -> Features:
    """The features that a full step keeps for `branch`."""
    below = unet.output_blocks[cut(unet, branch) - 1] if cut(unet, branch) > 0 else unet.middle_block
    return Features(below[0].out_channels, halvings(unet, branch + 1))


def halvings(unet: UNetModel, blocks: int) -> int:
    """How often the first `blocks` input blocks halve height and width."""
    return sum(isinstance(layer, Downsample) for block in unet.input_blocks[:blocks] for layer in block)


def outer_modules(unet: UNetModel, branch: int) -> list[Any]:
    """The modules that a cached step runs."""
    embedding = [unet.time_embed, *([] if unet.num_classes is None else [unet.label_emb])]
    return [*embedding, *unet.input_blocks[: branch + 1], *unet.output_blocks[cut(unet, branch) :], unet.out]


def full_forward(unet: UNetModel, branch: int, asked: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
    """ComfyUI's own forward, and the features that reach the outer blocks in it."""
    kept: list[torch.Tensor] = []
    out = asked._replace(transformer_options=_looking(unet, branch, kept, asked.x, asked.options)).by_comfyui(unet)
    return out, kept[0]


class Parts(Protocol):
    """Who evaluates a network as a whole, and has other programs for full and for cached steps."""

    def full(self, branch: int, asked: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
        """What `full_forward` gives."""

    def cached(self, branch: int, features: torch.Tensor, asked: Evaluation) -> torch.Tensor:
        """What `shallow_forward` gives."""


# In `transformer_options` of one forward: the `Parts` that evaluate it, where the network itself does not.
PARTS = "speedlab_deepcache_parts"
# Likewise: the list that a full step's features go to, and the features of a cached one.
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
        if PARTS in options:  # a step of which nothing is kept runs the same program as the others
            return _full_by(options[PARTS], executor, branch, kept, inputs, options, kwargs)
        if kept is not None:
            return _full(executor, branch, kept, inputs, options, kwargs)
        return executor(*inputs, options, **kwargs)

    return diffusion_model


def _full(
    executor: Any, branch: int, kept: list[torch.Tensor], inputs: tuple[Any, ...], options: dict, kwargs: dict
) -> torch.Tensor:
    """The whole forward, as it would run without DeepCache."""
    return executor(*inputs, _looking(executor.class_obj, branch, kept, inputs[0], options), **kwargs)


def _looking(
    unet: UNetModel, branch: int, kept: list[torch.Tensor], x: torch.Tensor, options: Mapping[str, Any]
) -> dict[str, Any]:
    """`options` with a patch that changes nothing and puts the deep features into `kept`."""
    place, rows = ("output", cut(unet, branch)), x.shape[0]

    def look(h: torch.Tensor, skip: torch.Tensor, extra: dict) -> tuple[torch.Tensor, torch.Tensor]:
        if extra.get("block") == place and h.shape[0] == rows:
            # A copy: patches work on the tensor in place later in the same forward.
            kept.append(h.clone())
        return h, skip

    # Before all other patches: on cached steps those run on the kept features again. The copy keeps the caller's own
    # options as they are.
    patches = dict(options.get("patches", {}))
    patches["output_block_patch"] = [look, *patches.get("output_block_patch", ())]
    return {**options, "patches": patches}


def _full_by(
    parts: Parts,
    executor: Any,
    branch: int,
    kept: list[torch.Tensor] | None,
    inputs: tuple[Any, ...],
    options: dict,
    kwargs: dict,
) -> torch.Tensor:
    """The whole forward by `parts`, inside the wrappers that other nodes put between this one and the model."""

    def full(*given: Any, **rest: Any) -> torch.Tensor:
        out, features = parts.full(branch, Evaluation(*given)._replace(rest=rest))
        if kept is not None:
            kept.append(features)
        return out

    return _inside(executor, full).execute(*inputs, options, **kwargs)


def _inside(executor: Any, forward: Any) -> Any:
    """The wrappers further in than this one, around another forward."""
    return type(executor).new_class_executor(forward, executor.class_obj, executor.wrappers, executor.idx + 1)


def _cached(
    executor: Any, branch: int, features: torch.Tensor, inputs: tuple[Any, ...], options: dict, kwargs: dict
) -> torch.Tensor:
    """The outer blocks only, inside the wrappers that other nodes put between this one and the model."""
    unet = executor.class_obj

    def outer_blocks(x: Any, timesteps: Any, context: Any, y: Any, control: Any, extra: dict, **_: Any) -> torch.Tensor:
        parts: Parts | None = extra.get(PARTS)
        if parts is not None:
            return parts.cached(branch, features, Evaluation(x, timesteps, context, y, control, extra))
        return shallow_forward(unet, branch, features, x, timesteps, context, y, control, extra)

    return _inside(executor, outer_blocks).execute(*inputs, options, **kwargs)

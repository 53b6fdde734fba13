"""Compiled functions in place of the forward of blocks, or of the whole network, while one evaluation runs.

A function is set on the module itself and taken away in `finally`: type, keys and weights of the shared module stay as
they are, and wrappers, patches and hooks of other nodes act around it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import FeedForward, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

from ...common.errors import UnavailableError
from ...common.torch_private import dynamo_failures
from ...models.unet import Evaluation, forward_through
from .attention import any_patch, attention_options, not_compilable, transformer_patch
from .backends import CompileOptions, dynamo
from .run import Run, passing

BLOCKS = (ResBlock, SpatialTransformer, FeedForward)


@dataclass(frozen=True)
class Part:
    """A module and the compiled functions that stand for its forward, by what they are given.

    Each type and layout of the input has a function of its own. Dynamo takes sizes and strides that it has seen in two
    kinds at one function for changing ones: a model that runs in two layouts would get slower code for both.
    """

    module: torch.nn.Module
    name: str
    compile: Callable[[Hashable], Callable[..., Any]]
    _functions: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)

    def function(self, x: Any) -> Callable[..., Any]:
        """The function for inputs like `x`, [rows, channels, height, width] or [rows, tokens, channels]."""
        like = _type_and_layout(x)
        if like not in self._functions:
            self._functions[like] = self.compile(like)
        return self._functions[like]


def _type_and_layout(x: Any) -> tuple[Hashable, ...]:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype, "channels last" if last else "plain"


def blocks_that_gain(options: CompileOptions) -> tuple[type[torch.nn.Module], ...]:
    """The kinds of blocks that are worth their compiling.

    On a CPU with live weights residual blocks are not: there they are convolutions by oneDNN, compiled or not, and
    take most of the time to compile for little of a step.
    """
    if options.freeze or options.device is None or options.device.type != "cpu":
        return BLOCKS
    return tuple(kind for kind in BLOCKS if kind is not ResBlock)


def blocks_of(
    network: torch.nn.Module, run: Run, frozen: Hashable = None, kinds: tuple[type[torch.nn.Module], ...] = BLOCKS
) -> list[Part]:
    """The residual and transformer blocks of a UNet, and the feed-forward parts within, each with its function.

    `frozen` names the weights that become part of the code; None where they are inputs.
    """
    calls: dict[type, Callable[..., Any]] = {
        ResBlock: _residual,
        SpatialTransformer: _transformer,
        FeedForward: _feed_forward,
    }
    parts, seen = [], set()
    for name, module in network.named_modules():
        call = calls.get(type(module)) if type(module) in kinds else None
        if call is None or "forward" in module.__dict__:  # another pack put a function of its own there
            continue
        kind = kind_of(module) if frozen is None else (*kind_of(module), name, frozen)
        parts.append(Part(module, name, partial(_compiled, run, call, kind)))
        seen.update([] if isinstance(module, FeedForward) else [kind])
    run.parts = len(seen)
    return parts


def _compiled(run: Run, call: Callable[..., Any], kind: tuple[Hashable, ...], like: Hashable) -> Callable[..., Any]:
    # A word for frozen weights stays the last of a kind: by it code is released.
    function: Callable[..., Any] = run.backend.compile(call, run.options, (like, *kind))
    return function


def whole(network: torch.nn.Module, run: Run, frozen: Hashable = None) -> list[Part]:
    """The network as one part."""
    run.parts = 1
    kind = kind_of(network) if frozen is None else (*kind_of(network), frozen)
    return [Part(network, type(network).__name__, partial(_compiled, run, _network, kind))]


def kind_of(module: torch.nn.Module) -> tuple[Hashable, ...]:
    """Equal for blocks that compute alike on weights of equal shapes."""
    heads = getattr(module, "n_heads", None) or [
        (part.heads, part.dim_head) for part in module.modules() if hasattr(part, "dim_head")
    ]
    shapes = tuple((name, tuple(weight.shape)) for name, weight in module.named_parameters())
    return (type(module).__name__, tuple(heads) if isinstance(heads, list) else heads, shapes)


@contextmanager
def swapped_in(parts: list[Part], run: Run) -> Iterator[None]:
    """Compiled code in place of each part's own, until the block ends."""
    feed_forward = {id(part.module): part for part in parts if isinstance(part.module, FeedForward)}
    swapped: list[tuple[torch.nn.Module, str]] = []
    try:
        for part in parts:
            if isinstance(part.module, FeedForward):
                continue
            attribute, function = _stand_in(part, run, feed_forward)
            part.module.__dict__[attribute] = function
            swapped.append((part.module, attribute))
        yield
    finally:
        for module, attribute in swapped:
            module.__dict__.pop(attribute, None)


def _stand_in(part: Part, run: Run, feed_forward: Mapping[int, Part]) -> tuple[str, Callable[..., Any]]:
    if isinstance(part.module, ResBlock):
        return "forward", _for_residual(part, run)
    if isinstance(part.module, SpatialTransformer):
        inner = [feed_forward[id(module)] for module in part.module.modules() if id(module) in feed_forward]
        return "forward", _for_transformer(part, run, inner)
    return "_forward", _for_network(part, run)


def _for_residual(part: Part, run: Run) -> Callable[..., Any]:
    def forward(x: Any, emb: Any) -> Any:
        return _run(part, run, (x, emb), lambda: type(part.module).forward(part.module, x, emb))

    return forward


def _for_transformer(part: Part, run: Run, inner: list[Part]) -> Callable[..., Any]:
    module: Any = part.module
    depth = len(module.transformer_blocks)

    def forward(x: Any, context: Any = None, transformer_options: dict | None = None) -> Any:
        options = {} if transformer_options is None else transformer_options

        def eager() -> Any:
            return type(module).forward(module, x, context, options)

        patch = transformer_patch(options, depth)
        seen = None if patch or not_compilable(options) else attention_options(options)
        if seen is None:
            _tell_patched(run, patch)
            with _feed_forward_swapped(inner, run):
                return eager()
        # What the transformer itself leaves in the options.
        options["activations_shape"], options["block_index"] = list(x.shape), depth - 1
        return _run(part, run, (x, context, seen), eager)

    return forward


def _tell_patched(run: Run, patch: str | None) -> None:
    if patch:
        run.note(f"{patch} changes transformer blocks; of those only the feed-forward parts ran compiled.")
    else:
        run.note(
            "attention is computed in a way that cannot be compiled; of the transformers only the feed-forward parts "
            "ran compiled."
        )


@contextmanager
def _feed_forward_swapped(parts: list[Part], run: Run) -> Iterator[None]:
    def stand_in(part: Part) -> Callable[..., Any]:
        return lambda x: _run(part, run, (x,), lambda: type(part.module).forward(part.module, x))

    try:
        for part in parts:
            part.module.__dict__["forward"] = stand_in(part)
        yield
    finally:
        for part in parts:
            part.module.__dict__.pop("forward", None)


def _for_network(part: Part, run: Run) -> Callable[..., Any]:
    def compute(asked: Evaluation) -> Any:
        options, control = asked.options, asked.control
        asking = not_compilable(options)
        if asking and not run.eager:
            reason = UnavailableError(f"Attention Backend's {asking} asks for the free memory, which is no program")
            run.fail(part.name, reason, "Set Attention Backend to sdpa, or scope to blocks.")
        seen = None if any_patch(options) else attention_options(options)
        # Patches may look at anything, so with them the graph gets all options. The lists are copied because a
        # forward takes residuals out of them, and an evaluation that fails to compile is done again.
        shown = dict(options) if seen is None else seen
        residuals = None if control is None else {key: list(value) for key, value in control.items()}
        inputs = (*asked[:4], residuals, shown, asked.rest)
        return _run(part, run, inputs, lambda: asked.by_comfyui(part.module))

    return forward_through(compute)


def _run(part: Part, run: Run, inputs: tuple[Any, ...], eager: Callable[[], Any]) -> Any:
    if run.eager:
        return eager()
    before, on_disk = dynamo.COUNT.graphs, dynamo.COUNT.from_disk
    try:
        result = part.function(inputs[0])(part.module, *inputs)
    except dynamo_failures() as error:
        _raise_what_is_no_failure(error)
        run.fail(f"{type(part.module).__name__} {part.name}", dynamo.cause(error), _remedy(error))
        return eager()
    if dynamo.COUNT.graphs != before:
        run.graphs += dynamo.COUNT.graphs - before
        run.from_disk += dynamo.COUNT.from_disk - on_disk
        run.compiling(f"{type(part.module).__name__} {part.name}")
    return result.clone() if run.backend.uses_cuda_graphs(run.options) else result


def _raise_what_is_no_failure(error: BaseException) -> None:
    """A cancel and a lack of memory inside of the compiler are what they are outside of it."""
    inner = dynamo.cause(error)
    if isinstance(inner, passing()):
        raise inner


def _remedy(error: BaseException) -> str:
    if dynamo.is_limit(error):
        return (
            "Sizes, patches or weights changed so often that the limit of graphs is reached: set dynamic to auto or "
            "true, choose scope blocks, or restart ComfyUI."
        )
    return ""


def _residual(module: Any, x: Any, emb: Any) -> Any:
    return type(module).forward(module, x, emb)


def _transformer(module: Any, x: Any, context: Any, options: dict) -> Any:
    return type(module).forward(module, x, context, dict(options))


def _feed_forward(module: Any, x: Any) -> Any:
    return type(module).forward(module, x)


def _network(
    module: UNetModel, x: Any, timesteps: Any, context: Any, y: Any, control: Any, options: dict, kwargs: dict
) -> Any:
    return type(module)._forward(module, x, timesteps, context, y, control, dict(options), **kwargs)

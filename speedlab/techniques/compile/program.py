"""Programs of tensors: backends that trace or export the whole network, and what they cannot do, refused by name.

What is traced is fixed: it knows neither ControlNet nor patches. Those are refused when they show up in a run, never
ignored. A program that holds weights of its own is made again when ComfyUI has patched others into the model.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from ...common.errors import UnavailableError
from ...common.timing import apart
from ...models.lora import LORAS
from ...models.unet import Evaluation, forward_through
from ...models.weights import is_plain
from ...patching.dynamic_vram import is_paged
from .attention import OVERRIDE, any_patch, attention_options, attention_word, note_use
from .run import CompileError, Run, raise_what_passes

log = logging.getLogger(__name__)

# Programs of one model that are kept: sizes, or attentions, that were used last. Each may hold the weights once more,
# so there are few of those: two for backends of fixed sizes, since with and without CFG are two.
KEPT = 8
KEPT_WITH_WEIGHTS = 1
KEPT_WITH_WEIGHTS_FIXED = 2
# Networks whose programs are kept, such as base and refiner: some programs keep their network alive.
NETWORKS = 2


class PureNetwork(torch.nn.Module):
    """A UNet as a function of tensors: x [B, C, H, W], timesteps [B], context [B, T, D], maybe y [B, D]."""

    def __init__(self, network: Any, attention: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.attention = dict(attention)

    def forward(self, x: Any, timesteps: Any, context: Any, y: Any = None) -> Any:
        asked = Evaluation(x, timesteps, context, y, transformer_options=dict(self.attention))
        return asked.by_comfyui(self.network)


@dataclass
class Programs:
    """What was compiled of one network, the last used at the end, and of which weights."""

    weights: Hashable = None
    holds_weights: bool = False
    by_key: OrderedDict[Hashable, Callable[..., Any]] = field(default_factory=OrderedDict)
    let_go: set[Hashable] = field(default_factory=set)
    unloaded: bool = False


_programs: WeakKeyDictionary[Any, dict[Hashable, Programs]] = WeakKeyDictionary()
# Models whose end is waited for. Some programs keep their network alive, but none the model around it.
_watched: WeakSet[Any] = WeakSet()


def copies_of_weights(backend: ModuleType, freeze: bool) -> int:
    """How often programs of this backend hold the weights of a network beside the network itself, at most."""
    if not (freeze or not backend.FOLLOWS_WEIGHTS):
        return 0
    return KEPT_WITH_WEIGHTS_FIXED if backend.FIXED_SHAPES else KEPT_WITH_WEIGHTS


def give_back(network: Any) -> None:
    """Let go of the programs of a network that hold weights; those that follow the live ones hold next to nothing."""
    for programs in _programs.get(network, {}).values():
        if programs.holds_weights and programs.by_key:
            programs.by_key.clear()
            programs.let_go.clear()
            programs.unloaded = True


def _watch(model: Any, network: Any) -> None:
    if model not in _watched:
        _watched.add(model)
        weakref.finalize(model, _forget, weakref.ref(network)).atexit = False


def _forget(network: weakref.ref[Any]) -> None:
    alive = network()
    if alive is not None:
        _programs.pop(alive, None)


class ProgramEngine:
    """One run of a network through a program of tensors."""

    def __init__(self, run: Run, patcher: Any) -> None:
        self.run, self.network = run, patcher.model.diffusion_model
        settings = (run.backend.NAME, run.options.mode, run.options.dynamic, run.options.freeze)
        self.programs = _programs.setdefault(self.network, {}).setdefault(settings, Programs())
        while len(_programs) > NETWORKS:
            _programs.pop(next(network for network in list(_programs) if network is not self.network))
        self.holds_weights = copies_of_weights(run.backend, run.options.freeze) > 0
        self.programs.holds_weights = self.holds_weights
        _watch(patcher.model, self.network)
        run.parts = 1
        reason = _obstacle_of_model(run, patcher)
        if reason:
            run.fail(type(self.network).__name__, UnavailableError(reason), f"Take that out, or {_OTHER}.")
            return
        if self.holds_weights:
            self._follow(patcher)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Once a run."""
        yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Once an evaluation: the program in place of the network's own forward, and out again."""
        self.network.__dict__["_forward"] = forward_through(self._compute)
        try:
            yield
        finally:
            self.network.__dict__.pop("_forward", None)

    def _follow(self, patcher: Any) -> None:
        weights = weights_word(patcher)
        if self.programs.by_key and self.programs.weights != weights:
            self.run.note(
                f"{self.run.backend.NAME} holds weights of its own, and a LoRA or another patch has changed them: "
                "it is compiled again.",
                logging.INFO,
            )
            self.programs.by_key.clear()
            self.programs.let_go.clear()
        self.programs.weights = weights

    def _compute(self, asked: Evaluation) -> Any:
        def eager() -> Any:
            return asked.by_comfyui(self.network)

        if self.run.eager:
            return eager()
        reason = _obstacle_of_evaluation(self.run, asked.control, asked.options)
        if reason:
            self.run.fail(type(self.network).__name__, UnavailableError(reason), f"Take that out, or {_OTHER}.")
            return eager()
        inputs = tuple(tensor for tensor in asked[:4] if tensor is not None)
        seen = attention_options(asked.options) or {}
        note_use(seen)
        try:
            program = self._program(inputs, seen)
        except Exception as error:  # exporters raise whatever their layers raise
            if isinstance(error, CompileError):
                raise
            raise_what_passes(error)
            self.run.fail(type(self.network).__name__, error)
            return eager()
        try:
            return program(*inputs)
        except Exception as error:  # a program of another library raises whatever that library raises
            raise_what_passes(error)
            self.programs.by_key = OrderedDict((k, v) for k, v in self.programs.by_key.items() if v is not program)
            self.run.fail(type(self.network).__name__, error, doing="run")
            return eager()

    def _program(self, inputs: tuple[torch.Tensor, ...], seen: Mapping[str, Any]) -> Callable[..., Any]:
        backend, options = self.run.backend, self.run.options
        key = (_shapes(inputs, backend), attention_word(seen), _autocast(inputs[0].device))
        known = self.programs.by_key
        if key in known:
            known.move_to_end(key)
            return known[key]
        if key in self.programs.let_go:
            self.run.note(
                f"{backend.NAME} compiled {_words(inputs[0])} once more: each of its programs is for one size and may "
                f"hold the weights, so only {self._most_kept} are kept. Inductor takes all sizes."
            )
        log.info("SpeedLab: %s compiles the network for %s; this can take minutes", backend.NAME, _words(inputs[0]))
        given = replace(options, example=inputs, changing=_changing(inputs), result=(self.network.out_channels, 1))
        with apart(), torch.no_grad():
            program = backend.compile(PureNetwork(self.network, seen), given)
        known[key] = program
        if self.programs.unloaded:
            self.programs.unloaded = False
            self.run.note(
                f"{backend.NAME} holds weights of its own, which were given back when ComfyUI unloaded the model: it "
                "is compiled anew.",
                logging.INFO,
            )
        self.run.graphs += 1
        self.run.note(f"{backend.NAME} compiled the network for {_words(inputs[0])}.", logging.INFO)
        self.run.compiling(f"the network for {_words(inputs[0])}")
        while len(known) > self._most_kept:
            self.programs.let_go.add(known.popitem(last=False)[0])
        return program

    @property
    def _most_kept(self) -> int:
        if not self.holds_weights:
            return KEPT
        return copies_of_weights(self.run.backend, self.run.options.freeze)


_OTHER = "choose the backend inductor, which can do that"


def weights_word(patcher: Any) -> Hashable:
    """Another one when ComfyUI has patched other weights into the model."""
    return getattr(patcher.model, "current_weight_patches_uuid", None) or patcher.patches_uuid


def _obstacle_of_model(run: Run, patcher: Any) -> str:
    name = run.backend.NAME
    if getattr(patcher, "hook_patches", None):
        return f"{name} cannot follow hooks that change weights during a run"
    inside = [key for key in getattr(patcher, "object_patches", ()) if str(key).startswith("diffusion_model")]
    if inside:
        return f"{name} cannot follow what another node put in the place of {inside[0]}"
    network = patcher.model.diffusion_model
    if any(getattr(part, attribute, None) for part in network.modules() for attribute in _CASTS):
        return f"{name} needs the whole model on the device, and ComfyUI has loaded it only in part"
    if is_paged(network):
        return f"{name} needs weights that lie still, and ComfyUI's dynamic VRAM pages them in and out"
    kind = next((type(weight) for weight in network.parameters() if not is_plain(weight)), None)
    if kind is not None:
        return f"{name} takes plain tensors for weights, and this model's are quantised ({kind.__name__})"
    if patcher.patches and getattr(run.backend, "REFUSES_LORA", False):
        loras = ", ".join(match.name for match in patcher.get_attachment(LORAS) or ()) or "a LoRA or other weight patch"
        return f"{name} builds an engine for fixed weights and takes no LoRA, and this model carries {loras}"
    return ""


_CASTS = ("weight_function", "bias_function")


def _obstacle_of_evaluation(run: Run, control: Any, options: Mapping[str, Any]) -> str:
    name = run.backend.NAME
    if control is not None:
        return f"{name} cannot take ControlNet's residuals"
    patch = any_patch(options)
    if patch:
        return f"{name} cannot run the patch {patch}"
    if not getattr(run.backend, "KEEPS_AUTOCAST", False) and torch.is_autocast_enabled(run.options.device.type):
        return f"{name} computes in the model's own precision, so that Precision's autocast cannot act in it"
    override = options.get(OVERRIDE)
    if override is None:
        return ""
    if not getattr(run.backend, "KEEPS_ATTENTION", False):
        return f"{name} brings its own attention, so that Attention Backend or another override cannot act in it"
    return "" if attention_options(options) is not None else f"{name} cannot run another node's attention override"


def _shapes(inputs: tuple[torch.Tensor, ...], backend: Any) -> Hashable:
    """The types, and the sizes that a program is fixed to."""
    return tuple(
        (tensor.dtype, str(tensor.device), tuple(tensor.shape) if backend.FIXED_SHAPES else tensor.ndim)
        for tensor in inputs
    )


def _changing(inputs: tuple[torch.Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    """The dimensions of x, timesteps, context and y that may change: batch, height and width, tokens."""
    return ((0, 2, 3), (0,), (0, 1), (0,))[: len(inputs)]


def _autocast(device: torch.device) -> Hashable:
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _words(x: torch.Tensor) -> str:
    return f"{x.shape[-1] * 8}x{x.shape[-2] * 8}, {x.shape[0]} rows"

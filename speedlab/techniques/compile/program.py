"""Programs of tensors: backends that trace or export the whole network, and what they cannot do, refused by name.

What is traced is fixed: it knows no patches but those that do the same at every step (FreeU's, perturbed attention),
and ControlNet's residuals as inputs. Other patches are refused when they show up in a run, never ignored. A program
that holds weights of its own is made again when ComfyUI has patched others into the model. DeepCache has two programs,
one of full steps and one of cached ones, which holds the weights of the outer blocks alone.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch

from ...common.errors import UnavailableError
from ...common.timing import apart
from ...models.lora import LORAS
from ...models.unet import Evaluation, forward_through
from ...models.weights import is_plain
from ...patching.dynamic_vram import is_paged
from ..deepcache import forward as deepcache
from . import int8
from .attention import OVERRIDE, any_patch, attention_options, attention_word, note_use, patch_word, traced_patches
from .backends import CompileOptions, RelativeShape
from .backends.kept import digest_of, kept_or_made, weights_of
from .run import CompileError, Run, raise_what_passes

log = logging.getLogger(__name__)

# Programs of one model that are kept: sizes, or attentions, that were used last. Each may hold the weights once more,
# so there are few of those: two for backends of fixed sizes, since with and without CFG are two.
KEPT = 8
KEPT_WITH_WEIGHTS = 1
KEPT_WITH_WEIGHTS_FIXED = 2
# Networks whose programs are kept, such as base and refiner: some programs keep their network alive.
NETWORKS = 2


@dataclass(frozen=True)
class Part:
    """What of a network a program computes. `full`: all of it, with DeepCache's features as a second result where there
    is a branch. `cached`: the outer blocks of that branch, on features."""

    kind: Literal["full", "cached"] = "full"
    branch: int | None = None

    def evaluate(self, network: Any, asked: Evaluation, features: Any = None) -> Any:
        """By ComfyUI's code: what is traced, and what runs where nothing is compiled."""
        if self.branch is None:
            return asked.by_comfyui(network)
        if self.kind == "full":
            return deepcache.full_forward(network, self.branch, asked)
        return deepcache.shallow_forward(network, self.branch, features, *asked[:5], asked.options)

    def words(self) -> str:
        """For notes: what was compiled."""
        return "the network" if self.kind == "full" else "the outer blocks of cached steps"


WHOLE = Part()
_NAMES = ("x", "timesteps", "context", "y")


class PureNetwork(torch.nn.Module):
    """A UNet as a function of tensors: those of `names`, of x [B, C, H, W], timesteps [B], context [B, T, D], y [B, D],
    features [B, C', H', W'] and ControlNet's residuals. `fixed` are the options of all its evaluations."""

    CODE = (deepcache,)

    def __init__(
        self, network: Any, fixed: Mapping[str, Any], names: Sequence[str] = _NAMES[:3], part: Part = WHOLE
    ) -> None:
        super().__init__()
        self.network = network
        self.fixed = dict(fixed)
        self.names, self.part = tuple(names), part

    def extra_repr(self) -> str:
        """What the code of the modules does not tell, for what is kept on disk."""
        return f"{self.part}, {self.names}"

    def forward(self, x: Any, timesteps: Any, context: Any, *more: Any) -> Any:
        given = dict(zip(self.names, (x, timesteps, context, *more), strict=True))
        features, control = given.pop("features", None), residual_lists(given)
        asked = Evaluation(**given, control=control, transformer_options=dict(self.fixed))
        return self.part.evaluate(self.network, asked, features)


_KINDS = ("input", "middle", "output")


def _residuals(control: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    """ControlNet's residuals by names that count from the end of each list, from where ComfyUI takes them."""
    lists = {kind: (control or {}).get(kind, ()) for kind in _KINDS}
    return {
        f"{kind}_{place}": tensor
        for kind, tensors in lists.items()
        for place, tensor in enumerate(reversed(tensors))
        if tensor is not None
    }


def residual_lists(given: dict[str, Any]) -> dict[str, list] | None:
    """Take residuals out of `given`, and make the lists again that ComfyUI takes them from."""
    control: dict[str, list] = {}
    for name in [name for name in given if _is_residual(name)]:
        kind, _, place = name.partition("_")
        found = control.setdefault(kind, [])
        found[:0] = [None] * (int(place) + 1 - len(found))
        found[-1 - int(place)] = given.pop(name)
    return control or None


@dataclass
class Programs:
    """What was compiled of one network, the last used at the end, and of which weights."""

    weights: Hashable = None
    holds_weights: bool = False
    by_key: OrderedDict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=OrderedDict)
    let_go: set[Hashable] = field(default_factory=set)
    # What runs in 8 bits, without and with a ControlNet's residuals, which widen the ranges.
    quantised: dict[bool, int8.Quantised] = field(default_factory=dict)
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
    """Release the programs of a network that hold weights; those that follow the live ones hold next to nothing."""
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
        self.sampling_of_model = patcher.get_model_object("model_sampling")
        settings = (run.backend.NAME, run.options.mode, run.options.dynamic, run.options.freeze, run.options.quantize)
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
        kind = next((weight.dtype for weight in self.network.parameters() if weight.dtype != torch.float32), None)
        if run.options.quantize != "off" and kind is not None:
            reason = f"layers in 8 bits need a model in fp32, and this one is in {str(kind).removeprefix('torch.')}"
            run.fail(type(self.network).__name__, UnavailableError(reason), "Load it in fp32, or set quantize to off.")
            return
        if self.holds_weights:
            self._follow(patcher)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Once a run."""
        yield

    @contextmanager
    def evaluating(self, options: dict[str, Any]) -> Iterator[None]:
        """Once an evaluation: programs in place of the network's own forward and of DeepCache's, and out again."""
        self.network.__dict__["_forward"] = forward_through(lambda asked: self._compute(WHOLE, asked))
        options[deepcache.PARTS] = self
        try:
            yield
        finally:
            self.network.__dict__.pop("_forward", None)
            options.pop(deepcache.PARTS, None)

    def full(self, branch: int, asked: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
        """DeepCache's full step: the result, and the features."""
        return self._compute(Part("full", branch), asked)

    def cached(self, branch: int, features: torch.Tensor, asked: Evaluation) -> torch.Tensor:
        """DeepCache's cached step."""
        return self._compute(Part("cached", branch), asked, features)

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
        if self.programs.weights != weights:
            self.programs.quantised.clear()
        self.programs.weights = weights

    def _compute(self, part: Part, asked: Evaluation, features: torch.Tensor | None = None) -> Any:
        def eager() -> Any:
            return part.evaluate(self.network, asked, features)

        if self.run.eager:
            return eager()
        reason = _obstacle_of_evaluation(self.run, asked.control, asked.options) or self._misfit(asked)
        if reason:
            self.run.fail(type(self.network).__name__, UnavailableError(reason), f"Take that out, or {_OTHER}.")
            return eager()
        given = {**dict(zip(_NAMES, asked, strict=False)), "features": features, **_residuals(asked.control)}
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        seen = attention_options(asked.options) or {}
        note_use(seen)
        try:
            program, names = self._program(part, inputs, seen, asked.options)
        except Exception as error:  # exporters raise whatever their layers raise
            if isinstance(error, CompileError):
                raise
            raise_what_passes(error)
            self.run.fail(type(self.network).__name__, error)
            return eager()
        try:
            found = program(*(inputs[name] if name in inputs else self._zeros(name, asked.x) for name in names))
            return found[0] if isinstance(found, tuple) and part.branch is None else found
        except Exception as error:  # a program of another library raises whatever that library raises
            raise_what_passes(error)
            self.programs.by_key = OrderedDict((k, v) for k, v in self.programs.by_key.items() if v is not program)
            self.run.fail(type(self.network).__name__, error, doing="run")
            return eager()

    def _program(
        self, part: Part, inputs: dict[str, torch.Tensor], seen: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Callable[..., Any], Iterable[str]]:
        """A program that can do it, and what it takes."""
        backend, x, patches = self.run.backend, inputs["x"], traced_patches(options)
        shapes = _shapes(inputs, backend)
        key = (part, shapes, attention_word(seen), _autocast(x.device), patch_word(patches))
        known = self.programs.by_key
        way = key if key in known else next((other for other in reversed(known) if _serves(other, key)), None)
        if way is not None:
            known.move_to_end(way)
            self._tell_of_8_bits(known[way])
            return known[way], [name for name, *_ in way[1]]
        words = f"{part.words()} for {_words(x)}"
        if key in self.programs.let_go:
            self.run.note(
                f"{backend.NAME} compiled {words} once more: each of its programs is for one size and may hold the "
                f"weights, so only {self._most_kept} are kept. Inductor takes all sizes."
            )
        log.info("SpeedLab: %s compiles %s; this can take minutes", backend.NAME, words)
        fixed = {**seen, **patches} if any_patch(patches) else seen
        began = time.perf_counter()
        with apart(), torch.no_grad():
            target = PureNetwork(self.network, fixed, tuple(inputs), part)
            if self.run.options.quantize == "off":
                program = backend.compile(target, self._given(part, inputs))
            else:
                program = self._in_8_bits(target, part, inputs, options)
        seconds = time.perf_counter() - began
        known[key] = program
        if self.programs.unloaded:
            self.programs.unloaded = False
            self.run.note(
                f"{backend.NAME} holds weights of its own, which were given back when ComfyUI unloaded the model: it "
                "is compiled anew.",
                logging.INFO,
            )
        self.run.graphs += 1
        kept = ", from the graph kept on disk" if getattr(program, "from_disk", False) else ""
        self.run.note(f"{backend.NAME} compiled {words} in {seconds:.1f} s{kept}.", logging.INFO)
        self.run.compiling(words)
        self._tell_of_8_bits(program)
        # Programs of cached steps hold little, and those of full steps not each other's place.
        of_kind = [other for other in known if other[0].kind == part.kind]
        for other in of_kind[: max(len(of_kind) - self._most_kept, 0)]:
            self.programs.let_go.add(other)
            del known[other]
        return program, inputs

    def _in_8_bits(
        self, target: PureNetwork, part: Part, inputs: dict[str, torch.Tensor], options: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """A program with layers in 8 bits: those that full steps have measured, now or in an earlier run."""
        import comfy.model_management as mm

        backend, given = self.run.backend, self._given(part, inputs)
        made: list[Any] = []

        def measure() -> bytes:
            few, sampling = int8.of_few_rows(inputs), self.sampling_of_model
            sigmas = options["sample_sigmas"]
            at = int8.points(sigmas, float(options["sigmas"].max()), float(sampling.sigma_min) * 0.5)
            found, program = int8.calibrate(
                target,
                lambda evaluate: int8.walk(few, sampling, at, self.network.out_channels, evaluate),
                lambda ranges, kind: backend.compile(target, replace(given, ranges=ranges, computes_in=kind)),
                mm.throw_exception_if_processing_interrupted,
            )
            made.append(program)
            return found.to_bytes()

        with_control = any(map(_is_residual, inputs))
        found = self.programs.quantised.get(with_control)
        if found is None:
            whole = PureNetwork(self.network, target.fixed, target.names)
            depends_on = {**backend.versions(), "rules": int8.rules(), "weights": digest_of(weights_of(whole))}
            found = int8.Quantised.from_bytes(*kept_or_made(whole, given, depends_on, measure, "int8"))
            self.programs.quantised[with_control] = found
        program = made.pop() if made else backend.compile(target, replace(given, ranges=found.ranges))
        program.quantised = found
        return program

    def _tell_of_8_bits(self, program: Any) -> None:
        found = getattr(program, "quantised", None)
        if found is not None:
            self.run.note(f"{self.run.backend.NAME}: {found.words()}.", logging.INFO)
            if not found.ranges:
                self.run.unquantised = True

    def _zeros(self, residual: str, x: torch.Tensor) -> torch.Tensor:
        """A residual that adds nothing, for a program that takes more of them than there are."""
        return x.new_zeros(_shape_of(self.network, residual).shape(tuple(x.shape)))

    def _misfit(self, asked: Evaluation) -> str:
        """ComfyUI leaves out a residual of another size, with a warning; a program of open sizes could not."""
        for name, tensor in _residuals(asked.control).items():
            if tuple(tensor.shape) != _shape_of(self.network, name).shape(tuple(asked.x.shape)):
                return f"{self.run.backend.NAME} cannot take a ControlNet's residuals of {list(tensor.shape[2:])} here"
        return ""

    def _given(self, part: Part, inputs: Mapping[str, torch.Tensor]) -> CompileOptions:
        results = [RelativeShape(self.network.out_channels)]
        following = {name: _shape_of(self.network, name) for name in inputs if _is_residual(name)}
        if part.branch is not None:
            channels, halved = deepcache.features_of(self.network, part.branch)
            features = RelativeShape(channels, halved=halved)
            if part.kind == "full":
                results.append(features)
            else:
                following["features"] = features
        return replace(
            self.run.options,
            # FreeU writes to features, and what is traced is run.
            example=tuple(tensor.clone() if name == "features" else tensor for name, tensor in inputs.items()),
            changing=tuple(_CHANGING.get(name, _IMAGE) for name in inputs),
            names=tuple(inputs),
            following=following,
            results=tuple(results),
        )

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
        return f"{name} needs weights that stay in place, and ComfyUI's dynamic VRAM pages them in and out"
    kind = next((type(weight) for weight in network.parameters() if not is_plain(weight)), None)
    if kind is not None:
        return f"{name} takes plain tensors for weights, and this model's are quantised ({kind.__name__})"
    fp8 = next((str(w.dtype) for w in network.parameters() if w.dtype.is_floating_point and w.itemsize == 1), None)
    if fp8 is not None and getattr(run.backend, "REFUSES_FP8", False):
        return f"{name} takes no weights in {fp8.removeprefix('torch.')}: load the model in fp32"
    if patcher.patches and getattr(run.backend, "REFUSES_LORA", False):
        loras = ", ".join(match.name for match in patcher.get_attachment(LORAS) or ()) or "a LoRA or other weight patch"
        return f"{name} builds an engine for fixed weights and takes no LoRA, and this model carries {loras}"
    return ""


_CASTS = ("weight_function", "bias_function")


def _obstacle_of_evaluation(run: Run, control: Any, options: Mapping[str, Any]) -> str:
    name = run.backend.NAME
    if control is not None and not getattr(run.backend, "SEVERAL_TENSORS", False):
        return f"{name} cannot take ControlNet's residuals"
    patch = any_patch(options, getattr(run.backend, "KEEPS_PATCHES", False))
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


def _shapes(inputs: Mapping[str, torch.Tensor], backend: Any) -> Hashable:
    """The types, and the sizes that a program is fixed to."""
    return tuple(
        (name, tensor.dtype, str(tensor.device), tuple(tensor.shape) if backend.FIXED_SHAPES else tensor.ndim)
        for name, tensor in inputs.items()
    )


# The dimensions that may change: batch, height and width, tokens.
_IMAGE = (0, 2, 3)
_CHANGING = {"timesteps": (0,), "context": (0, 1), "y": (0,)}


def _serves(known: tuple[Any, ...], asked: tuple[Any, ...]) -> bool:
    """Whether a program can stand for another one: DeepCache's full steps give more than a run without it asks for, and
    residuals that are not there are zeros. Each program may hold the weights, so that few are kept."""
    alike = known[0] == asked[0] or (asked[0] == WHOLE and known[0].kind == "full")
    takes, given = set(known[1]), set(asked[1])
    return alike and known[2:] == asked[2:] and given <= takes and all(_is_residual(name) for name, *_ in takes - given)


def _is_residual(name: str) -> bool:
    return name.partition("_")[0] in _KINDS


def _shape_of(network: Any, residual: str) -> RelativeShape:
    """What a residual looks like: as the result of the input block that it is added to."""
    kind, _, place = residual.partition("_")
    blocks = len(network.input_blocks)
    count = {"input": int(place) + 1, "middle": blocks, "output": blocks - int(place)}[kind]
    layers = [layer for block in network.input_blocks[:count] for layer in block]
    channels = next(layer.out_channels for layer in reversed(layers) if getattr(layer, "out_channels", None))
    return RelativeShape(channels, halved=deepcache.halvings(network, count))


def _autocast(device: torch.device) -> Hashable:
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _words(x: torch.Tensor) -> str:
    return f"{x.shape[-1] * 8}x{x.shape[-2] * 8}, {x.shape[0]} rows"

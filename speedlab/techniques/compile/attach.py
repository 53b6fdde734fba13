"""Compile Model: another program for the same network, swapped in while an evaluation runs.

Scope `blocks` compiles each residual and transformer block, so that caches, ControlNet, patches and offload act around
compiled code; `model` compiles the network as a whole. What was compiled is kept for the process and found again by
settings and shapes, so that neither a LoRA nor another checkpoint of the same family compiles again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch

from ...common.core import is_dynamic
from ...common.errors import UnavailableError
from ...models.unet import require_unet
from ...patching.dynamic_vram import loaded_whole
from ...patching.notes import report_ran
from ...patching.wrappers import (
    Accelerator,
    SharedState,
    Site,
    Wrapper,
    accelerators,
    attach,
    declare,
    has_wrapper,
    refuse_work_units,
    run_state,
    state_of,
    when_unloaded,
)
from ..deepcache import attach as deepcache
from ..deepcache.forward import outer_modules
from . import backends, engine, program
from .backends import MODES, NAMES, QUANTIZE, CompileOptions
from .run import Run, cache_folder

log = logging.getLogger(__name__)

KEY = "speedlab.compile"
CORE_COMPILE_KEY = "torch.compile"
SCOPES = ("auto", "blocks", "model")
DYNAMIC = ("auto", "true", "false")
ON_FAILURE = ("error", "eager")


@dataclass(frozen=True)
class CompileConfig:
    """What the Compile Model node sets. Raises ValueError for an unknown word."""

    backend: str = "inductor"
    scope: str = "auto"
    mode: str = "default"
    dynamic: str = "auto"
    on_failure: Literal["error", "eager"] = "error"
    freeze_weights: bool = False
    quantize: str = "off"

    def __post_init__(self) -> None:
        words = {
            "backend": NAMES,
            "scope": SCOPES,
            "mode": MODES,
            "dynamic": DYNAMIC,
            "on_failure": ON_FAILURE,
            "quantize": QUANTIZE,
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")

    @property
    def by_blocks(self) -> bool:
        """Whether blocks are compiled one by one; `auto` is blocks where the backend can."""
        return self.scope == "blocks" or (self.scope == "auto" and self.backend in backends.GRAPH_BY_GRAPH)


def attach_compile(model: Any, config: CompileConfig) -> Any:
    """A clone of MODEL `model` that runs compiled as `config` says; `model` itself stays eager.

    Raises UnavailableError for a model that is no image UNet, for settings that the backend does not have, and, unless
    `on_failure` is eager, for a backend that cannot run here, with what to install. Under ComfyUI's dynamic VRAM the
    clone is on weights of its own that are loaded whole; a model that cannot be loaded again is refused likewise.
    """
    require_unet(model, "Compile Model")
    backend = backends.load(config.backend)
    _check_settings(config, backend)
    able, reason = backends.usable(backend, CompileOptions(config.mode, device=model.load_device))
    if not able and config.on_failure == "error":
        raise UnavailableError(f"Compile Model cannot use {config.backend}: {reason}.")
    warning = known_loss(config, model.load_device) if able else ""
    if warning:
        log.warning("SpeedLab: Compile Model: %s", warning)
    if able:
        try:
            model = loaded_whole(model, "Compile Model")
        except UnavailableError as error:
            if config.on_failure == "error":
                raise
            able, reason = False, str(error).removesuffix(".")
    clone = attach(model, KEY, _wrappers(config, backend, "" if able else reason))
    when_unloaded(clone, KEY, _give_back)
    declare(clone, Accelerator("compile", _described(config)))
    return clone


# What was fastest on full-size SD 1.5 (docs/benchmarks.md), the fastest first: options, and the types it computes in.
_FASTEST: Mapping[str, tuple[tuple[Mapping[str, str], tuple[torch.dtype, ...]], ...]] = {
    "cpu": (
        ({"backend": "openvino"}, (torch.float32, torch.bfloat16)),
        ({"backend": "onnxruntime"}, (torch.float32,)),
        ({"backend": "inductor", "freeze_weights": "true"}, ()),
    ),
}


def fastest_here(model: Any, by_blocks: bool) -> Mapping[str, str]:
    """Options of the fastest backend that can run MODEL `model` here; `by_blocks`: beside a technique that excludes
    programs of the whole network. Raises UnavailableError, with each one's reason, where none can.
    """
    reasons = []
    for options, dtypes in _FASTEST.get(model.load_device.type, (({"backend": "inductor"}, ()),)):
        name = options["backend"]
        if (by_blocks and name not in backends.GRAPH_BY_GRAPH) or (dtypes and model.model.get_dtype() not in dtypes):
            continue
        able, reason = backends.usable(backends.load(name), CompileOptions(device=model.load_device))
        if able:
            return options
        reasons.append(f"{name}: {reason}")
    raise UnavailableError(f"No compile backend can run here: {'; '.join(reasons)}.")


def held_copies(model: Any) -> float:
    """How often compiled programs hold the UNet's weights once more while MODEL `model` is loaded."""
    options = next((one.options for one in accelerators(model) if one.name == "compile"), None)
    if options is None:
        return 0
    backend, freeze = backends.load(options["backend"]), "freeze_weights" in options
    if options["backend"] in backends.GRAPH_BY_GRAPH:
        return int(freeze)
    copies = program.copies_of_weights(backend, freeze)
    cached = deepcache.branch_of(model)
    if not copies or cached is None:
        return copies
    network = model.model.diffusion_model
    return copies * (1.0 + _bytes_of(outer_modules(network, cached)) / _bytes_of([network]))


def _bytes_of(modules: Iterable[torch.nn.Module]) -> int:
    return sum(weight.numel() * weight.itemsize for module in modules for weight in module.parameters())


def _give_back(patcher: Any) -> None:
    """What was compiled with weights, or holds them, goes with the model."""
    network = patcher.model.diffusion_model
    engine.give_back(network)
    program.give_back(network)


def known_loss(config: CompileConfig, device: torch.device) -> str:
    """A warning where another choice was far faster when it was measured; "" otherwise."""
    if device.type == "cpu" and config.backend == "inductor" and not config.freeze_weights:
        return (
            "plain inductor gains little on a CPU and can be slower than no compiling (1.2 times the speed when "
            "measured on SD 1.5 in fp32, about the same in bf16). freeze_weights (1.9 times) or the backends "
            "onnxruntime (2.1 times) and openvino (2.4 times) are faster there."
        )
    return ""


def _described(config: CompileConfig) -> dict[str, Any]:
    scope = "blocks" if config.by_blocks else "model"
    described = {"backend": config.backend, "scope": scope, "mode": config.mode, "dynamic": config.dynamic}
    if config.quantize != "off":
        described["quantize"] = config.quantize
    return {**described, "freeze_weights": "true"} if config.freeze_weights else described


def _check_settings(config: CompileConfig, backend: ModuleType) -> None:
    if config.mode not in backend.SUPPORTED_MODES:
        raise UnavailableError(
            f"Compile Model: the backend {config.backend} has no mode {config.mode}. "
            f"Choose {' or '.join(backend.SUPPORTED_MODES)}, or the backend inductor."
        )
    if config.scope == "blocks" and config.backend not in backends.GRAPH_BY_GRAPH:
        raise UnavailableError(
            f"Compile Model: {config.backend} compiles the network as a whole. Set scope to auto or model, or choose "
            f"{' or '.join(backends.GRAPH_BY_GRAPH)}."
        )
    if config.dynamic == "true" and getattr(backend, "FIXED_SHAPES", False):
        raise UnavailableError(
            f"Compile Model: {config.backend} compiles each size for itself. Set dynamic to auto, or choose inductor."
        )
    if config.freeze_weights and not getattr(backend, "CAN_FREEZE", False):
        raise UnavailableError(
            f"Compile Model: {config.backend} has no freeze_weights. Switch it off, or choose inductor or jit_trace."
        )
    if config.quantize != "off" and not getattr(backend, "CAN_QUANTISE", False):
        able = [name for name in NAMES if getattr(backends.load(name), "CAN_QUANTISE", False)]
        raise UnavailableError(
            f"Compile Model: {config.backend} has no quantize {config.quantize}. Set quantize to off, or choose the "
            f"backend {' or '.join(able)}."
        )


def _wrappers(config: CompileConfig, backend: ModuleType, unavailable: str) -> Mapping[Site, Wrapper]:
    """The closures hold frozen values alone: clones of a model share them, so state lives in the run."""

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_work_units(executor.class_obj.model_patcher, "Compile Model")
        _refuse_pairs(executor.class_obj.model_patcher, config, backend)
        run = Run(backend, _options(config, executor.class_obj.model_patcher), config.on_failure == "eager")
        if unavailable:
            run.eager = unavailable
            run.note(f"{config.backend} cannot run here: {unavailable}. The run is uncompiled, as on_failure asks.")
        elif is_dynamic(executor.class_obj.model_patcher):
            run.fail("this model", UnavailableError(_PAGED), "Put Compile Model behind the node that did it.")
        with run_state(executor.class_obj, KEY, _State(config, run)):
            return executor(*args, **kwargs)

    return {Site.OUTER_SAMPLE: outer_sample, Site.SAMPLER_SAMPLE: _sampler_sample, Site.APPLY_MODEL: _apply_model}


_PAGED = (
    "a node behind Compile Model has put it under ComfyUI's dynamic VRAM again, which moves the weights all the time"
)


class _State(SharedState):
    """A run, and what is compiled in it, made at the first evaluation, when the weights are in place."""

    def __init__(self, config: CompileConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.engine: Any = None

    def start(self, patcher: Any) -> None:
        if self.config.backend in backends.GRAPH_BY_GRAPH:
            self.engine = engine.GraphEngine(self.run, patcher, self.config.by_blocks, self.config.scope == "blocks")
        else:
            self.engine = program.ProgramEngine(self.run, patcher)


def _options(config: CompileConfig, patcher: Any) -> CompileOptions:
    return CompileOptions(
        mode=config.mode,
        dynamic={"auto": None, "true": True, "false": False}[config.dynamic],
        freeze=config.freeze_weights,
        device=patcher.load_device,
        folder=cache_folder(config.backend, patcher.load_device),
        quantize=config.quantize,
    )


def _refuse_pairs(patcher: Any, config: CompileConfig, backend: ModuleType) -> None:
    if patcher.get_wrappers(Site.APPLY_MODEL.value, CORE_COMPILE_KEY):
        raise UnavailableError(
            "Compile Model and ComfyUI's TorchCompileModel are both on this model. Take one of the two out."
        )
    runs_parts = config.by_blocks or getattr(backend, "SEVERAL_TENSORS", False)
    if has_wrapper(patcher, deepcache.KEY) and not runs_parts:
        able = [name for name in backends.TENSOR_PROGRAMS if getattr(backends.load(name), "SEVERAL_TENSORS", False)]
        raise UnavailableError(
            f"DeepCache and Compile Model with {config.backend} on the whole model do not work together: a cached step "
            "runs another network than the one compiled. Set Compile Model to inductor with scope blocks, choose "
            f"{' or '.join(able)}, which have a second program for cached steps, or take DeepCache out."
        )


def _sampler_sample(
    executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, *args: Any, **kwargs: Any
) -> torch.Tensor:
    transformer_options = extra_args.get("model_options", {}).get("transformer_options", {})
    state: _State | None = state_of(transformer_options, KEY)
    if state is None:
        return executor(model_wrap, sigmas, extra_args, *args, **kwargs)
    state.run.options = replace(state.run.options, dtype=model_wrap.inner_model.get_dtype())
    with _telling(state, transformer_options):
        if state.run.eager:
            return executor(model_wrap, sigmas, extra_args, *args, **kwargs)
        state.start(model_wrap.model_patcher)
        with state.engine.sampling():
            return executor(model_wrap, sigmas, extra_args, *args, **kwargs)


@contextmanager
def _telling(state: _State, transformer_options: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    finally:
        if state.run.unquantised:
            report_ran(transformer_options, "compile", _described(replace(state.config, quantize="off")))
        state.run.tell(transformer_options)


def _apply_model(
    executor: Any,
    x: Any,
    t: Any,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict | None = None,
    **kwargs: Any,
) -> Any:
    options = {} if transformer_options is None else transformer_options
    state: _State | None = state_of(options, KEY)
    inputs = (x, t, c_concat, c_crossattn, control, options)
    if state is None or state.engine is None or state.run.eager:
        return executor(*inputs, **kwargs)
    with state.engine.evaluating(options):
        return executor(*inputs, **kwargs)

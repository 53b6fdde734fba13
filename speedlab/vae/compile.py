"""Compile VAE: a second VAE object on the same weights whose decode runs compiled.

The network inside is a shallow copy: it has the class and the very layers of the first one, so that loading, tiling and
detection work as ever, and a `decode` of its own. Encoding and the VAE given stay as they are.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from ..common.errors import UnavailableError, first_line
from ..common.timing import apart
from ..common.torch_private import dynamo_failures
from ..patching.compiled import refusal_of_streaming
from ..patching.dynamic_vram import loaded_whole
from ..patching.wrappers import when_unloaded
from ..techniques.compile import backends
from ..techniques.compile.backends import FOR_VAE, MODES, CompileOptions, dynamo
from ..techniques.compile.graphs import kind_of
from ..techniques.compile.run import CompileError, cache_folder, passing, raise_what_passes
from .variants import COMPILED, HOLDS_WEIGHTS, Derivation, placement_of, refuse_decoding_by, set_derivation

log = logging.getLogger(__name__)

_KEPT = 8


class PureDecoder(torch.nn.Module):
    """A VAE's decode as a function of tensors: latents [B, C, h, w] to images [B, 3, H, W]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return type(self.network).decode(self.network, x)


def compile_vae(vae: Any, backend_name: str, mode: str) -> Any:
    """A VAE that decodes as `vae` does, compiled at its first image; `vae` itself is not touched.

    Raises ValueError for an unknown word, UnavailableError for a VAE that is not for images, a mode that the backend
    does not have, and a backend that cannot run here.
    """
    if backend_name not in FOR_VAE or mode not in MODES:
        raise ValueError(
            f"backend {backend_name!r}, mode {mode!r}: choose of {', '.join(FOR_VAE)} and {', '.join(MODES)}"
        )
    vae.throw_exception_if_invalid()
    refuse_decoding_by(vae, "Compile VAE")
    backend = backends.load(backend_name)
    if mode not in backend.SUPPORTED_MODES:
        raise UnavailableError(f"Compile VAE: {backend_name} has no mode {mode}. Choose default, or inductor.")
    able, reason = backends.usable(backend, CompileOptions(mode, device=vae.device))
    if not able:
        raise UnavailableError(f"Compile VAE cannot use {backend_name}: {reason}.")
    placement = placement_of(vae)
    if placement is not None and placement.streams:
        raise refusal_of_streaming()
    vae = _loaded_whole(vae)
    network = getattr(vae.first_stage_model, "speedlab_original", vae.first_stage_model)
    if getattr(vae, "latent_dim", 2) != 2 or not isinstance(vae.upscale_ratio, int):
        raise UnavailableError(
            f"Compile VAE works on VAEs for images, and this is a {type(network).__name__}. Take the node out."
        )
    options = CompileOptions(mode=mode, device=vae.device, folder=cache_folder(backend_name, vae.device),
                             results=(backends.RelativeShape(vae.output_channels, vae.upscale_ratio),))  # fmt: skip
    compiled = copy.copy(vae)
    compiled.first_stage_model = copy.copy(network)
    compiled.first_stage_model.__dict__["speedlab_original"] = network
    programs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
    compiled.first_stage_model.__dict__["decode"] = _decoder(network, backend, options, programs)
    if backend_name not in backends.GRAPH_BY_GRAPH and not backend.FOLLOWS_WEIGHTS:
        compiled.first_stage_model.__dict__[HOLDS_WEIGHTS] = True
        compiled.patcher = vae.patcher.clone()
        when_unloaded(compiled.patcher, COMPILED, lambda _patcher: programs.clear())
    described = f"compile_vae(backend={backend_name}{'' if mode == 'default' else f',mode={mode}'})"
    set_derivation(compiled, COMPILED, Derivation(described, lambda other: compile_vae(other, backend_name, mode)))
    return compiled


def _loaded_whole(vae: Any) -> Any:
    """`vae` itself, or under dynamic VRAM a second VAE object on weights that ComfyUI does not page."""
    patcher = loaded_whole(vae.patcher, "Compile VAE")
    if patcher is vae.patcher:
        return vae
    second = copy.copy(vae)
    # Core builds it anew in the type that it would choose, and keeps weights in the type of the file until it loads.
    second.patcher, second.first_stage_model = patcher, patcher.model.to(vae.vae_dtype)
    return second


def _decoder(
    network: Any, backend: ModuleType, options: CompileOptions, known: OrderedDict[Hashable, Callable[..., Any]]
) -> Callable[..., torch.Tensor]:
    def decode(samples: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            raise CompileError(f"Compile VAE cannot decode with the options {', '.join(kwargs)}. Take the node out.")
        with _pytorch_attention(network):
            if backend.NAME in backends.GRAPH_BY_GRAPH:
                return _through_graphs(network, backend, options, samples)
            key = (samples.dtype, str(samples.device), tuple(samples.shape) if backend.FIXED_SHAPES else ())
            if key not in known:
                known[key] = _program(network, backend, options, samples)
            known.move_to_end(key)
            while len(known) > _KEPT:
                known.popitem(last=False)
            try:
                return known[key](samples)
            except Exception as error:  # a program of another library raises whatever that library raises
                raise_what_passes(error)
                raise _failed(backend, network, error, "run") from error

    return decode


def _decode(network: Any, samples: torch.Tensor) -> torch.Tensor:
    return type(network).decode(network, samples)


def _through_graphs(network: Any, backend: ModuleType, options: CompileOptions, samples: torch.Tensor) -> torch.Tensor:
    function = backend.compile(_decode, options, kind_of(network))
    with (
        dynamo.limits(dynamo.GRAPHS_PER_KIND, options.device, folder=options.folder),
        dynamo.without_gradients(network),
    ):
        try:
            result = function(network, samples)
        except dynamo_failures() as error:
            if isinstance(dynamo.cause(error), passing()):
                raise dynamo.cause(error) from None
            raise _failed(backend, network, dynamo.cause(error)) from error
    return result.clone() if backend.uses_cuda_graphs(options) else result


def _program(network: Any, backend: ModuleType, options: CompileOptions, samples: torch.Tensor) -> Callable[..., Any]:
    log.info("SpeedLab: %s compiles the VAE's decoder", backend.NAME)
    given = replace(options, example=(samples,), changing=((0, 2, 3),), dtype=samples.dtype)
    try:
        with apart(), torch.no_grad():
            return backend.compile(PureDecoder(network), given)
    except Exception as error:  # exporters raise whatever their layers raise
        raise_what_passes(error)
        raise _failed(backend, network, error) from error


def _failed(backend: ModuleType, network: Any, error: BaseException, doing: str = "compile") -> CompileError:
    return CompileError(
        f"Compile VAE: {backend.NAME} could not {doing} the decoder of {type(network).__name__}: {first_line(error)}. "
        f"{backend.REMEDY}"
    )


@contextmanager
def _pytorch_attention(network: torch.nn.Module) -> Iterator[None]:
    """PyTorch's attention in place of ComfyUI's sliced one, which asks for the free memory and cannot be compiled."""
    from comfy.ldm.modules.diffusionmodules import model as core

    sliced: Any = getattr(core, "normal_attention", None)
    changed: list[Any] = [part for part in network.modules() if getattr(part, "optimized_attention", core) is sliced]
    for part in changed:
        part.optimized_attention = core.pytorch_attention
    try:
        yield
    finally:
        for part in changed:
            part.optimized_attention = sliced

"""Attention Backend: which implementation computes the attention of one model, through ComfyUI's own override.

The override is set in the options of a run and gone after it. Where another node has set an override as well, it stays
the outer one and gets the chosen backend in place of ComfyUI's function, whatever the order of the nodes; if it never
asks for that, a warning says that the choice had no effect.

A fast kernel can overflow: sage on SDXL gives black images. So with every backend but `sdpa` the result of an
evaluation is looked at, once for the whole evaluation, since the look waits for the GPU. NaN or Inf means that the
evaluation is repeated with `sdpa`, and if that helps, the rest of the run stays with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.modules.attention import CrossAttention

from ...common.core import is_finite
from ...patching.layer_forwards import is_traced
from ...patching.notes import report_note, report_ran
from ...patching.wrappers import (
    Accelerator,
    SharedState,
    Site,
    Wrapper,
    attach,
    declare,
    refuse_work_units,
    run_state,
    state_of,
)
from .backends import BACKENDS, COMMON_HEAD_DIM, choices, require, unavailable, why_not
from .choice import ChoiceTable, Shape, bucket, candidates, measured_length

KEY = "speedlab.attention"
AUTO = "auto"
SAFE = "sdpa"
_OVERRIDE = "optimized_attention_override"
# Heads of a measurement, at most. With very few, what split attention writes would fit into a CPU's cache, unlike in a
# model.
_MEASURED_HEADS = {"cpu": 16}
_MEASURED_HEADS_ELSEWHERE = 32

TABLE = ChoiceTable()


@dataclass(frozen=True)
class AttentionConfig:
    """What the Attention Backend node sets. Raises ValueError for an unknown name."""

    backend: str = AUTO

    def __post_init__(self) -> None:
        known = (AUTO, *choices())
        if self.backend not in known:
            raise ValueError(f"backend is {self.backend!r}; choose one of {', '.join(known)}")


@dataclass
class Run(SharedState):
    """State of one run. Attention calls may be compiled, so those only write here; logging is done outside."""

    backend: str
    previous: Callable[..., Any] | None = None
    safe: bool = False
    cleared: bool = False
    suspicious: bool = False
    used: bool = False
    # The attention that the checkpoint asks for.
    preferred: str = ""
    chosen: dict[Shape, str] = field(default_factory=dict)
    set_aside: dict[str, bool] = field(default_factory=dict)


def attach_attention(model: Any, config: AttentionConfig) -> Any:
    """A clone of MODEL `model` whose attention is computed as `config` says.

    Raises UnavailableError, with the remedy, for a backend that cannot run on the model's device at all.
    """
    if config.backend != AUTO:
        _require(model, config.backend)
    clone = attach(model, KEY, _wrappers(config), outermost=(Site.PREDICT_NOISE,))
    declare(clone, Accelerator("attention", {"backend": config.backend}))
    return clone


def is_own(override: Any) -> bool:
    """Whether an attention override is the one that this node sets."""
    return override is _override


def _require(model: Any, name: str) -> None:
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    network = model.get_model_object("diffusion_model")
    head_dims = sorted({part.dim_head for part in network.modules() if isinstance(part, CrossAttention)})
    require(name, model.load_device, dtype, head_dims or [COMMON_HEAD_DIM])


def _wrappers(config: AttentionConfig) -> Mapping[Site, Wrapper]:
    """The closure holds the frozen `config` alone: clones of a model share it, so state lives in the run."""

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_work_units(executor.class_obj.model_patcher, "Attention Backend")
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        run = Run(config.backend, options.get(_OVERRIDE))
        run.preferred = _preferred(executor.class_obj.model_patcher)
        if run.preferred and config.backend == AUTO:
            with run_state(executor.class_obj, KEY, run):
                return executor(*args, **kwargs)
        with run_state(executor.class_obj, KEY, run), _overridden(options):
            return executor(*args, **kwargs)

    return {
        Site.OUTER_SAMPLE: outer_sample,
        Site.SAMPLER_SAMPLE: _sampler_sample,
        Site.PREDICT_NOISE: _predict_noise,
    }


def _preferred(patcher: Any) -> str:
    """The attention that a checkpoint asks for, and ComfyUI has, for some of its layers; "" where it asks for none.

    ComfyUI keeps it in a module of its own beside the layers, with `config` from the file and the `function`.
    """
    network = patcher.model.diffusion_model
    for part in network.modules():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping) and "attention" in config and getattr(part, "function", None) is not None:
            return str(config["attention"])
    return ""


@contextmanager
def _overridden(options: dict[str, Any]) -> Iterator[None]:
    before = options.get(_OVERRIDE)
    options[_OVERRIDE] = _override
    try:
        yield
    finally:
        if before is None:
            options.pop(_OVERRIDE, None)
        else:
            options[_OVERRIDE] = before


def _override(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """What ComfyUI calls in place of its attention `function`."""
    run: Run | None = state_of(kwargs.get("transformer_options") or {}, KEY)
    if run is None:
        return function(*args, **kwargs)
    if run.previous is None:
        return _attend(run, *args, **kwargs)

    def beneath(*inner: Any, **options: Any) -> torch.Tensor:
        return _attend(run, *inner, **options)

    return run.previous(beneath, *args, **kwargs)


def _attend(
    run: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    run.used = True
    name = SAFE if run.safe else _backend_for(run, q, k, heads, mask, skip_reshape)
    if kwargs.get("low_precision_attention") is False and not BACKENDS[name].exact:
        run.set_aside.setdefault("ComfyUI asks for the model's own precision there", False)
        name = SAFE
    if name != SAFE:
        run.suspicious = True
    # With the options ComfyUI's functions would look for an override, and find this one.
    kwargs.pop("transformer_options", None)
    return BACKENDS[name].run(
        q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape, **kwargs,
    )  # fmt: skip


def _backend_for(
    run: Run, q: torch.Tensor, k: torch.Tensor, heads: int, mask: torch.Tensor | None, skip_reshape: bool
) -> str:
    head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    if run.backend == AUTO:
        # Inside a compiled model nothing can be timed, and SDPA picks its kernel by itself.
        if is_traced() or _is_capturing(q.device):
            return SAFE
        return _measured(run, q, k, heads, head_dim, mask is not None)
    if BACKENDS[run.backend].always:
        return run.backend
    reason = why_not(run.backend, q.device, q.dtype, head_dim, mask is not None)
    if reason is None:
        return run.backend
    general = why_not(run.backend, q.device, q.dtype, COMMON_HEAD_DIM, False)
    if general is not None:
        raise unavailable(run.backend, general, q.device, q.dtype)
    run.set_aside.setdefault(reason, False)
    return SAFE


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measured(run: Run, q: torch.Tensor, k: torch.Tensor, heads: int, head_dim: int, masked: bool) -> str:
    kind = q.device.type
    shape = Shape(str(q.device), q.dtype, head_dim, bucket(q.shape[-2]), bucket(k.shape[-2]), masked)
    if shape not in run.chosen:
        limit = _MEASURED_HEADS.get(kind, _MEASURED_HEADS_ELSEWHERE)
        rows = min(q.shape[0] * heads, limit)

        def able() -> list[str]:
            return [n for n in candidates(kind) if why_not(n, q.device, q.dtype, head_dim, masked) is None]

        run.chosen[shape] = TABLE.choose(shape, able, lambda: _runners(shape, rows, q.device, able())).name
    return run.chosen[shape]


def _runners(shape: Shape, heads: int, device: torch.device, names: Iterable[str]) -> dict[str, Callable[[], object]]:
    """The candidates `names` on numbers of their own: ComfyUI's random generator stays as it is."""
    generator = torch.Generator(device).manual_seed(0)
    queries, keys = (measured_length(tokens, device.type) for tokens in (shape.queries, shape.keys))
    q, k, v = (
        torch.randn(1, heads, tokens, shape.head_dim, generator=generator, device=device).to(shape.dtype)
        for tokens in (queries, keys, keys)
    )
    mask = torch.zeros(queries, keys, device=device, dtype=shape.dtype) if shape.masked else None
    synchronize = getattr(torch, device.type).synchronize

    def runner(name: str) -> Callable[[], object]:
        def run() -> None:
            BACKENDS[name].run(q, k, v, heads, mask=mask, skip_reshape=True)
            synchronize()

        return run

    return {name: runner(name) for name in names}


def _predict_noise(
    executor: Any, x: Any, timestep: Any, model_options: dict | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Outside of every other technique, so that a repeated evaluation starts over for all of them."""
    options = {} if model_options is None else model_options
    transformer_options = options.get("transformer_options", {})
    run: Run | None = state_of(transformer_options, KEY)
    result = executor(x, timestep, options, *args, **kwargs)
    if run is None:
        return result
    _tell_set_aside(run, transformer_options)
    if run.safe or run.cleared or not run.suspicious or is_finite(result):
        return result
    run.safe = True
    again = executor(x, timestep, options, *args, **kwargs)
    if is_finite(again):
        _tell(transformer_options, f"{run.backend} gave NaN or Inf, so the evaluation was repeated with {SAFE}, "
              "which the rest of this run uses")  # fmt: skip
        return again
    run.safe, run.cleared = False, True
    _tell(transformer_options, f"the model gives NaN or Inf with {run.backend} and with {SAFE}: the cause lies "
          "elsewhere. Check the checkpoint, its precision, and the conditioning")  # fmt: skip
    return again


def _sampler_sample(
    executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, *args: Any, **kwargs: Any
) -> torch.Tensor:
    try:
        return executor(model_wrap, sigmas, extra_args, *args, **kwargs)
    finally:
        transformer_options = extra_args.get("model_options", {}).get("transformer_options", {})
        run: Run | None = state_of(transformer_options, KEY)
        if run is not None:
            _tell_outcome(run, transformer_options)


def _tell_outcome(run: Run, transformer_options: Mapping[str, Any]) -> None:
    if run.preferred and run.backend == AUTO:
        _tell(transformer_options, f"auto leaves attention to ComfyUI, for this checkpoint asks for {run.preferred}")
        report_ran(transformer_options, "attention", None)
        return
    if run.preferred:
        _tell(transformer_options, f"{run.backend} takes the place of {run.preferred}, for which this checkpoint asks")
    if run.chosen:
        by_name: dict[str, list[str]] = {}
        for shape, name in run.chosen.items():
            by_name.setdefault(name, []).append(str(shape))
        single = len(by_name) == 1
        text = "; ".join(name if single else f"{name} for {', '.join(shapes)}" for name, shapes in by_name.items())
        _tell(transformer_options, f"auto chose {text}", logging.INFO)
    if run.previous is not None and not run.used:
        other = getattr(run.previous, "__qualname__", type(run.previous).__name__)
        _tell(transformer_options, f"'{run.backend}' had no effect, because another node's attention override "
              f"({other}) computes attention by itself. Take one of the two out of the graph")  # fmt: skip
        report_ran(transformer_options, "attention", None)


def _tell_set_aside(run: Run, transformer_options: Mapping[str, Any]) -> None:
    for reason, reported in run.set_aside.items():
        if not reported:
            _tell(transformer_options, f"{SAFE} computes some layers in place of {run.backend}, because {reason}")
    run.set_aside.update(dict.fromkeys(run.set_aside, True))


def _tell(transformer_options: Mapping[str, Any], text: str, level: int = logging.WARNING) -> None:
    logging.log(level, "Attention Backend: %s.", text)
    report_note(transformer_options, f"Attention Backend: {text}.")

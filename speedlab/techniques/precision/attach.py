"""Precision: PyTorch's speed flags, layout of convolution weights, autocast, and on a CPU the library behind linear
layers, the way of convolutions, and what becomes of freed memory.

The flags hold for the whole process and the weights are shared by all clones of a model, so both are set when a run
begins and put back when it ends, however it ends. A run inside another finds and leaves what the outer one has set.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from ...common.core import is_dynamic
from ...common.dtypes import cpu_computes_bf16, torch_dtype
from ...common.errors import UnavailableError, first_line
from ...common.torch_private import is_on
from ...patching.notes import report_note, report_ran
from ...patching.wrappers import Accelerator, Site, Wrapper, attach, declare, refuse_work_units
from ..cpu import conv_as_matmul, onednn
from ..cpu.host_allocator import memory_reused, why_not_reused
from ..cpu.onednn import linear_layers_on_onednn, why_not
from .torch_flags import FLAGS, flags_set
from .weight_layout import conv_weights_in

KEY = "speedlab.precision"
Switch = Literal["keep", "on", "off"]
MemoryFormat = Literal["keep", "contiguous", "channels_last"]
Autocast = Literal["off", "fp16", "bf16"]
Linear = Literal["keep", "auto", "onednn"]
Memory = Literal["keep", "auto", "reuse"]
Convolution = Literal["keep", "auto", "matmul"]
SWITCHES, MEMORY_FORMATS, AUTOCASTS = get_args(Switch), get_args(MemoryFormat), get_args(Autocast)
LINEARS, MEMORIES, CONVOLUTIONS = get_args(Linear), get_args(Memory), get_args(Convolution)
_WORDS = {
    "memory_format": MEMORY_FORMATS,
    "autocast": AUTOCASTS,
    "linear": LINEARS,
    "memory": MEMORIES,
    "convolution": CONVOLUTIONS,
}
_OTHER_WAYS = {"linear": linear_layers_on_onednn, "convolution": conv_as_matmul.few_pixels_as_products}
_LARGE_BLOCKS = (
    "Precision: memory keeps blocks of up to 64 MB only: the thread that samples does not use the first of the C "
    "library's arenas, which alone can keep larger ones. Start ComfyUI with MALLOC_ARENA_MAX=1 in its environment."
)
_LIMIT_OF_PRODUCTS = "Precision: convolutions of up to {} pixels at 1280 output channels are matrix products."
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class PrecisionConfig:
    """What the Precision node sets; the defaults change nothing. Raises ValueError for an unknown word."""

    tf32: Switch = "keep"
    cudnn_tf32: Switch = "keep"
    cudnn_benchmark: Switch = "keep"
    fp16_accumulation: Switch = "keep"
    memory_format: MemoryFormat = "keep"
    autocast: Autocast = "off"
    linear: Linear = "keep"
    memory: Memory = "keep"
    convolution: Convolution = "keep"

    def __post_init__(self) -> None:
        for field in fields(self):
            words = _WORDS.get(field.name, SWITCHES)
            if getattr(self, field.name) not in words:
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}; choose one of {', '.join(words)}")

    @property
    def changes(self) -> dict[str, str]:
        """The settings that are not at their default."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    @property
    def flags(self) -> dict[str, bool]:
        """The flags to set, and to what."""
        return {name: value == "on" for name, value in self.changes.items() if name in FLAGS}


def attach_precision(model: Any, config: PrecisionConfig) -> Any:
    """A clone of MODEL `model` that runs as `config` says; `model` itself where `config` changes nothing.

    Of several Precision nodes in a row the later ones win where they set something. A flag for GPUs is set on other
    devices too, where it does nothing, and a warning says so. Raises UnavailableError, with the remedy, for a flag
    that this PyTorch does not have, and for an autocast that the device does not do.
    """
    config = _without_auto(config, model)
    if not config.changes:
        return model
    _check(config, model.load_device)
    earlier: PrecisionConfig = model.get_attachment(KEY) or PrecisionConfig()
    config = replace(earlier, **config.changes)  # type: ignore[arg-type]
    clone = attach(model, KEY, _wrappers(config))
    clone.set_attachments(KEY, config)
    declare(clone, Accelerator("precision", config.changes))
    return clone


def _without_auto(config: PrecisionConfig, model: Any) -> PrecisionConfig:
    """`auto` becomes what it means here: on a CPU the faster way as measured, where the model computes in fp32, and
    freed memory kept where it can be; nothing elsewhere."""
    on_cpu = model.load_device.type == "cpu"
    in_fp32 = on_cpu and config.autocast == "off"
    if config.linear == "auto":
        gains = in_fp32 and onednn.may_gain(model.model.diffusion_model)
        config = replace(config, linear="onednn" if gains else "keep")
    if config.memory == "auto":
        config = replace(config, memory="reuse" if on_cpu and not why_not_reused() else "keep")
    if config.convolution == "auto":
        gains = in_fp32 and conv_as_matmul.may_gain(model.model.diffusion_model)
        config = replace(config, convolution="matmul" if gains else "keep")
    return config


def _check(config: PrecisionConfig, device: torch.device) -> None:
    for name in config.flags:
        if not FLAGS[name].exists():
            raise UnavailableError(
                f"Precision cannot set {name}: PyTorch {torch.__version__} does not have this flag. "
                f"Update PyTorch, or set {name} to keep."
            )
    if config.flags and device.type != "cuda":
        logging.warning(
            "Precision: %s has no effect here: this model runs on %s, and it is for GPUs that CUDA or ROCm drives.",
            ", ".join(config.flags),
            device.type,
        )
    if config.autocast != "off":
        _check_autocast(config.autocast, device)
    if config.linear == "onednn":
        _check_for_cpu("linear", "compute linear layers with oneDNN", why_not(), device)
    if config.memory == "reuse":
        _check_for_cpu("memory", "keep freed memory for the next layer", why_not_reused(), device)
    if config.convolution == "matmul":
        _check_for_cpu("convolution", "compute convolutions as matrix products", why_not(), device)


def _check_for_cpu(name: str, what: str, reason: str, device: torch.device) -> None:
    if reason:
        raise UnavailableError(f"Precision cannot {what}: {reason}. Set {name} to keep or auto.")
    if device.type != "cpu":
        logging.warning(
            "Precision: %s has no effect here: this model runs on %s, and it is for CPUs.", name, device.type
        )


def _check_autocast(word: Autocast, device: torch.device) -> None:
    try:
        context = torch.autocast(device.type, dtype=torch_dtype(word))
    except RuntimeError as error:
        raise UnavailableError(
            f"Precision cannot autocast to {word} on {device.type}: {first_line(error)}. "
            "Set autocast to off, or to the other type."
        ) from error
    if not is_on(context):
        raise UnavailableError(
            f"Precision cannot autocast to {word}: PyTorch does not support it on {device.type}. "
            "Set autocast to off, or to the other type."
        )
    if device.type == "cpu" and not (word == "bf16" and cpu_computes_bf16()):
        logging.warning("Precision: this CPU has no instructions for %s, so autocast may cost time.", word)


def _wrappers(config: PrecisionConfig) -> Mapping[Site, Wrapper]:
    """The closures hold frozen values alone: clones of a model share them."""
    wrappers: dict[Site, Wrapper] = {}
    if config.flags:
        wrappers[Site.OUTER_SAMPLE] = _with_flags(config.flags)
    if config.memory_format != "keep":
        layout = _LAYOUTS[config.memory_format]
        wrappers[Site.DIFFUSION_MODEL] = _with_input_in(layout)
    if config.changes.keys() - {"autocast"}:
        wrappers[Site.SAMPLER_SAMPLE] = _with_layers_changed(config)
    if config.autocast != "off":
        wrappers[Site.APPLY_MODEL] = _with_autocast(torch_dtype(config.autocast))
    return wrappers


def _with_flags(flags: Mapping[str, bool]) -> Wrapper:
    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with flags_set(flags):
            return executor(*args, **kwargs)

    return outer_sample


def _with_layers_changed(config: PrecisionConfig) -> Wrapper:
    """Here and not earlier, for only now the weights are where they will be for the run."""
    layout = _LAYOUTS.get(config.memory_format)

    def sampler_sample(
        executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        refuse_work_units(model_wrap.model_patcher, "Precision")
        network, device = model_wrap.inner_model.diffusion_model, model_wrap.model_patcher.load_device

        options = extra_args.get("model_options", {}).get("transformer_options", {})

        def say(text: str, level: int = logging.WARNING) -> None:
            logging.log(level, text)
            report_note(options, text)

        # Said when the node was attached: by the log, which no record keeps.
        idle = _of_another_device(config, device)
        if idle:
            report_note(options, f"Precision: {', '.join(sorted(idle))} had no effect on {device.type}.")
        with ExitStack() as stack:
            on_cpu = device.type == "cpu"
            if config.memory == "reuse" and on_cpu and not stack.enter_context(memory_reused()):
                say(_LARGE_BLOCKS)
            if layout is not None and not stack.enter_context(conv_weights_in(network, layout, device)):
                say(_why_no_layout(network, is_dynamic(model_wrap.model_patcher)))
                idle.add("memory_format")
            others = {
                name: stack.enter_context(_OTHER_WAYS[name](network))
                for name in config.changes.keys() & _OTHER_WAYS.keys()
                if on_cpu
            }
            result = executor(model_wrap, sigmas, extra_args, *args, **kwargs)
            for name, replaced in others.items():
                if not replaced.calls and not replaced.taken:
                    say(_why_no_effect(name, network), logging.INFO)
                    idle.add(name)
            if "convolution" in others and others["convolution"].calls:
                say(_LIMIT_OF_PRODUCTS.format(conv_as_matmul.most_pixels()), logging.INFO)
            if idle:
                left = {name: value for name, value in config.changes.items() if name not in idle}
                report_ran(options, "precision", left or None)
            return result

    return sampler_sample


def _of_another_device(config: PrecisionConfig, device: torch.device) -> set[str]:
    """The settings that are for another kind of device than the model runs on."""
    elsewhere = {"linear", "memory", "convolution"} if device.type != "cpu" else set()
    return {name for name in config.changes if name in elsewhere or (name in FLAGS and device.type != "cuda")}


def _why_no_layout(network: torch.nn.Module, dynamic: bool) -> str:
    if not any(isinstance(part, torch.nn.Conv2d) for part in network.modules()):
        return f"Precision: memory_format has no effect: {type(network).__name__} has no 2-D convolutions."
    if dynamic:
        return (
            "Precision: memory_format has no effect on weights: under ComfyUI's dynamic VRAM each use makes them anew, "
            "in the layout of the file. Compile Model loads a model whole."
        )
    return (
        "Precision: memory_format has no effect on weights: to save memory ComfyUI keeps those of the convolutions off "
        "the device, and each convolution converts what it reads."
    )


def _why_no_effect(name: str, network: torch.nn.Module) -> str:
    if name == "linear":
        what = "no linear layer of its own that computes in fp32"
    else:
        what = (
            "no convolution that computes in fp32, in PyTorch's own layout, with a million weights and, at this size "
            "and batch, with ten output channels for each pixel"
        )
    return f"Precision: {name} had no effect: {type(network).__name__} has {what}, outside of compiled code."


def _with_input_in(layout: torch.memory_format) -> Wrapper:
    """The first convolution passes the layout on; what comes out is laid out as ComfyUI expects."""

    def diffusion_model(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 4:
            return executor(x, *args, **kwargs)
        out = executor(x.contiguous(memory_format=layout), *args, **kwargs)
        return out.contiguous() if isinstance(out, torch.Tensor) else out

    return diffusion_model


def _with_autocast(dtype: torch.dtype | None) -> Wrapper:
    def apply_model(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(x.device.type, dtype=dtype):
            return executor(x, *args, **kwargs)

    return apply_model

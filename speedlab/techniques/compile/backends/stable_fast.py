"""stable_fast: the package stable-fast (sfast), which traces the network and fuses its kernels for NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from . import CompileOptions, on_nvidia

NAME = "stable_fast"
SUPPORTED_MODES = ("default", "reduce-overhead")
FOLLOWS_WEIGHTS = False
FIXED_SHAPES = True
REMEDY = "Choose inductor, or take the node out."


def available() -> tuple[bool, str]:
    """Whether the package is installed and there is a GPU for it."""
    if importlib.util.find_spec("sfast") is None:
        return False, "stable-fast is not installed: install the wheel of its release page that fits your PyTorch"
    return on_nvidia("stable-fast")


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` compiled; `reduce-overhead` records CUDA graphs, whose results are copied out."""
    from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig, compile_unet

    config = CompilationConfig.Default()
    config.enable_xformers = False  # attention is as the model has it
    config.enable_triton = importlib.util.find_spec("triton") is not None
    config.enable_cuda_graph = options.mode == "reduce-overhead"
    config.memory_format = None  # it would re-lay the shared weights; the Precision node does that for a run
    module = compile_unet(target, config)  # changes `target` alone, which wraps the shared network
    module(*options.example)  # it traces at the first call: what cannot be traced fails here, as compiling does
    if config.enable_cuda_graph:
        return lambda *inputs: module(*inputs).clone()
    return lambda *inputs: module(*inputs)

"""onnxruntime: the network exported to ONNX once, with sizes left open, and run by ONNX Runtime.

The file on disk holds no weights: a session gets the live ones by name, so a LoRA or another checkpoint of the family
makes a new session, in seconds, and no new export.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from ...core import compute_device
from ...errors import UnavailableError
from . import CompileOptions
from .onnx_graph import INPUT_NAMES, exported, weights_of

NAME = "onnxruntime"
SUPPORTED_MODES = ("default",)
FOLLOWS_WEIGHTS = False
FIXED_SHAPES = False
REMEDY = "Choose inductor or jit_trace, or take the node out."
OPSET = 18
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {torch.float32: 1, torch.float16: 10}  # onnx.TensorProto.DataType


def available() -> tuple[bool, str]:
    """Whether the packages are installed and have a provider for ComfyUI's device."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(missing)
        return False, f"{' and '.join(missing)} not installed: run pip install {wanted} in ComfyUI's Python"
    import onnxruntime

    device = compute_device().type
    provider = _PROVIDERS.get(device)
    if provider is None:
        return False, f"ONNX Runtime is used on cpu and cuda here, and ComfyUI runs on {device}"
    if provider not in onnxruntime.get_available_providers():
        return False, f"the installed onnxruntime has no {provider}: install onnxruntime-gpu in its place"
    return True, ""


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` as a session. Raises UnavailableError for a type that the provider does not compute in."""
    import onnxruntime

    dtype = options.example[0].dtype
    device = options.example[0].device
    if dtype not in _TYPES or (device.type == "cpu" and dtype != torch.float32):
        raise UnavailableError(
            f"ONNX Runtime does not compute in {str(dtype).removeprefix('torch.')} on {device.type}: "
            "load the checkpoint in fp32"
        )
    graph = exported(target, options, OPSET)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    needed = _initializer_names(graph)
    weights = {name: tensor for name, tensor in weights_of(target).items() if name in needed}
    values = [_value(tensor) for tensor in weights.values()]
    settings.add_external_initializers(list(weights), values)
    session = onnxruntime.InferenceSession(graph, settings, providers=[_PROVIDERS[device.type], *_fallback(device)])
    return _Session(session, values, options.result)


class _Session:
    """Runs on the memory of torch's tensors, in and out; nothing is copied."""

    def __init__(self, session: Any, weights: list[Any], result: tuple[int, int]) -> None:
        self._session, self._weights, self._result = session, weights, result
        self._inputs = [entry.name for entry in session.get_inputs()]
        self._output = session.get_outputs()[0].name

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        binding = self._session.io_binding()
        held = [tensor.contiguous() for tensor in inputs]  # until the session has run
        for name, tensor in zip(INPUT_NAMES, held, strict=False):
            if name in self._inputs:
                binding.bind_input(name, *_place(tensor), _TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        x, (channels, scale) = held[0], self._result
        out = torch.empty(
            (x.shape[0], channels, x.shape[2] * scale, x.shape[3] * scale), dtype=x.dtype, device=x.device
        )
        binding.bind_output(self._output, *_place(out), _TYPES[out.dtype], tuple(out.shape), out.data_ptr())
        if out.device.type == "cuda":
            torch.cuda.current_stream(out.device).synchronize()
        self._session.run_with_iobinding(binding)
        return out


def _value(tensor: torch.Tensor) -> Any:
    """A weight for the session: on a CPU the very memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.cpu().contiguous().numpy())


def _initializer_names(graph: bytes) -> set[str]:
    import onnx

    return {entry.name for entry in onnx.load_model_from_string(graph).graph.initializer if entry.external_data}


def _place(tensor: torch.Tensor) -> tuple[str, int]:
    return tensor.device.type, tensor.device.index or 0


def _fallback(device: torch.device) -> list[str]:
    return [] if device.type == "cpu" else [_PROVIDERS["cpu"]]

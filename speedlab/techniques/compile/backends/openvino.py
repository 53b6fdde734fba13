"""openvino: the network converted by OpenVINO and compiled for Intel and AMD CPUs, with sizes left open."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ....common.core import compute_device
from ....common.errors import UnavailableError
from . import CompileOptions

NAME = "openvino"
SUPPORTED_MODES = ("default",)
FOLLOWS_WEIGHTS = False
FIXED_SHAPES = False
REMEDY = "Choose onnxruntime or jit_trace, or take the node out."
# By itself OpenVINO computes in bf16 wherever a CPU can, whatever the model's type.
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def available() -> tuple[bool, str]:
    """Whether the package is installed and ComfyUI runs on the CPU."""
    if importlib.util.find_spec("openvino") is None:
        return False, "openvino is not installed: run pip install openvino in ComfyUI's Python"
    device = compute_device().type
    if device != "cpu":
        return False, f"OpenVINO is used on the CPU here, and ComfyUI runs on {device}: choose inductor"
    return True, ""


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` as a compiled OpenVINO model. Raises UnavailableError but for fp32 and bf16."""
    import openvino

    dtype = options.example[0].dtype
    if dtype not in _PRECISIONS:
        raise UnavailableError(
            f"OpenVINO does not compute in {str(dtype).removeprefix('torch.')} here: load the model in fp32 or bf16"
        )
    shapes = [_partial_shape(openvino, tensor, changing) for tensor, changing in _open(options)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its trace warns of each size, and sizes are left open by the shapes
        model = openvino.convert_model(target.eval(), example_input=options.example, input=shapes)
    settings = {"INFERENCE_PRECISION_HINT": _PRECISIONS[dtype], "PERFORMANCE_HINT": "LATENCY"}
    return _Request(openvino.compile_model(model, "CPU", settings).create_infer_request())


class _Request:
    """Runs on the memory of torch's tensors; the result is a tensor of its own."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        held = [_tensor(tensor.contiguous()) for tensor in inputs]
        self._request.infer(dict(enumerate(held)))
        return _torch(self._request.get_output_tensor(0), inputs[0].dtype)


def _open(options: CompileOptions) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    return list(zip(options.example, options.changing, strict=True))


def _partial_shape(openvino: Any, tensor: torch.Tensor, changing: tuple[int, ...]) -> Any:
    return openvino.PartialShape([-1 if d in changing else size for d, size in enumerate(tensor.shape)])


def _tensor(tensor: torch.Tensor) -> Any:
    import openvino

    if tensor.dtype == torch.bfloat16:  # numpy has no bf16: its bits as integers
        return openvino.Tensor(tensor.view(torch.int16).numpy(), tensor.shape, openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _torch(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=dtype).reshape(tuple(tensor.shape))
    return torch.from_numpy(tensor.data.copy())

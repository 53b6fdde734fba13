"""openvino: the network converted by OpenVINO and compiled for Intel and AMD CPUs, with sizes left open.

Weights are inputs of what is converted, and constants of what is compiled: one conversion, kept on disk without them,
serves each LoRA and each checkpoint of the family.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from ....common.core import compute_device
from ....common.errors import UnavailableError, first_line
from ....common.torch_private import function_of_graph
from ..rounding import Range, largest_weights, steps_of
from . import CompileOptions
from .jit_trace import ordered_slots, trace
from .kept import forget, kept_or_made, weights_of

log = logging.getLogger(__name__)

NAME = "openvino"
SUPPORTED_MODES = ("default",)
FOLLOWS_WEIGHTS = False
FIXED_SHAPES = False
SEVERAL_TENSORS = True
REFUSES_FP8 = True
CAN_QUANTISE = True
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


def versions() -> dict[str, str]:
    """What graphs, and what is measured with them, depend on beside PyTorch."""
    import openvino

    return {"openvino": openvino.__version__}


def compile(target: torch.nn.Module, options: CompileOptions) -> Callable[..., Any]:
    """`target(*tensors)` as a compiled OpenVINO model. Raises UnavailableError but for fp32 and bf16."""
    import openvino

    dtype = options.example[0].dtype
    if dtype not in _PRECISIONS:
        raise UnavailableError(
            f"OpenVINO does not compute in {str(dtype).removeprefix('torch.')} here: load the model in fp32 or bf16"
        )
    model, from_disk = _converted(target, options)
    named = {_name(index): name for index, name in enumerate(weights_of(target))}
    weights = {_name(index): tensor.contiguous() for index, tensor in enumerate(weights_of(target).values())}
    for parameter in model.get_parameters():
        known = weights.get(_names(parameter))
        if known is not None:
            constant = openvino.op.Constant(_tensor(known), shared_memory=True)
            constant.set_friendly_name(named[_names(parameter)])
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    _quantise(model, options.ranges, target)
    model.validate_nodes_and_infer_types()
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[options.computes_in or dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return _Request(openvino.compile_model(model, "CPU", settings), list(weights.values()), options, from_disk)


def _quantise(model: Any, ranges: Mapping[str, Range], target: torch.nn.Module) -> None:
    """Have layers computed in 8 bits: OpenVINO does so where input and weights pass through FakeQuantize."""
    weights = weights_of(target) if ranges else {}
    shared: dict[Any, Any] = {}
    for node in model.get_ordered_ops() if ranges else ():
        name = node.input_value(1).get_node().get_friendly_name() if node.get_type_name() in _LAYERS else ""
        if name in ranges:
            source, weight = node.input_value(0), node.input_value(1)
            step, zero = steps_of(ranges[name])
            place = (source.get_node().get_friendly_name(), source.get_index(), step, zero)
            if place not in shared:  # queries, keys and values have one input
                shared[place] = _fake_quantize(source, -zero * step, (255 - zero) * step, 256)
            most = largest_weights(weights[name].float()).reshape(-1, *[1] * (weights[name].ndim - 1)).numpy()
            node.input(0).replace_source_output(shared[place])
            node.input(1).replace_source_output(_fake_quantize(weight, -most, most, 255))


_LAYERS = ("Convolution", "MatMul")


def _fake_quantize(source: Any, low: Any, high: Any, levels: int) -> Any:
    from openvino import opset13

    ends = [opset13.constant(numpy.asarray(end, numpy.float32)) for end in (low, high)]
    return opset13.fake_quantize(source, *ends, *ends, levels).output(0)


class _Request:
    """Runs on the memory of torch's tensors; the results are tensors of their own."""

    def __init__(self, compiled: Any, weights: list[torch.Tensor], options: CompileOptions, from_disk: bool) -> None:
        # It may read the weights where they lie.
        self._request, self._weights, self.from_disk = compiled.create_infer_request(), weights, from_disk
        self._results = len(options.results)
        names = [entry.get_names() for entry in compiled.inputs]
        self._inputs = [next(index for index, name in enumerate(options.names) if name in known) for known in names]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        held = [_tensor(tensor.contiguous()) for tensor in inputs]
        self._request.infer({place: held[index] for place, index in enumerate(self._inputs)})
        found = tuple(_torch(self._request.get_output_tensor(i), inputs[0].dtype) for i in range(self._results))
        return found if len(found) > 1 else found[0]


def _converted(target: torch.nn.Module, options: CompileOptions) -> tuple[Any, bool]:
    """An OpenVINO model that takes the weights as inputs too, and whether it was on disk."""
    graph = kept_or_made(target, options, versions(), lambda: _written(_convert(target, options)))
    try:
        return _read_model(graph.data), graph.from_disk
    except Exception as error:  # OpenVINO raises what its readers raise
        if not graph.from_disk:
            raise
        log.warning("SpeedLab: OpenVINO cannot read the graph that was kept (%s); it is made anew.", first_line(error))
        forget(target, options, versions())
        return _converted(target, options)


def _convert(target: torch.nn.Module, options: CompileOptions) -> Any:
    import openvino

    weights = list(weights_of(target).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace warns of each size, and sizes are left open by the shapes
        graph = trace(target.eval(), ordered_slots(target), weights, options.example)
        names = [*(_name(index) for index in range(len(weights))), *options.names[: len(options.example)]]
        tensors = [*((weight, ()) for weight in weights), *zip(options.example, options.changing, strict=True)]
        shapes: list[Any] = []
        for index, value in reversed(list(enumerate(graph.inputs()))):
            if not value.uses():  # of blocks that this program leaves out
                graph.eraseInput(index)
                continue
            value.setDebugName(names[index])
            shapes.insert(0, _partial_shape(openvino, *tensors[index]))
        return openvino.convert_model(function_of_graph(graph), input=shapes)


def _name(index: int) -> str:
    return f"weight{index}_"


def _names(parameter: Any) -> str:
    return next((name for name in parameter.output(0).get_names() if name.startswith("weight")), "")


def _written(model: Any) -> bytes:
    """Its description, and the few constants beside the weights, as one."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        description, constants = Path(folder) / "graph.xml", Path(folder) / "graph.bin"
        openvino.serialize(model, str(description), str(constants))
        text = description.read_bytes()
        return len(text).to_bytes(8, "little") + text + constants.read_bytes()


def _read_model(data: bytes) -> Any:
    import openvino

    size = int.from_bytes(data[:8], "little")
    return openvino.Core().read_model(data[8 : 8 + size], data[8 + size :])


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

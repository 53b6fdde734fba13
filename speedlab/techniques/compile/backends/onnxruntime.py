"""onnxruntime: the network exported to ONNX once, with sizes left open, and run by ONNX Runtime.

The file on disk holds no weights: a session gets the live ones by name, so a LoRA or another checkpoint of the family
makes a new session, in seconds, and no new export.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ....common.core import compute_device
from ....common.errors import UnavailableError
from . import CompileOptions
from .kept import Kept, kept_or_made, weights_of

NAME = "onnxruntime"
SUPPORTED_MODES = ("default",)
FOLLOWS_WEIGHTS = False
FIXED_SHAPES = False
SEVERAL_TENSORS = True
REFUSES_FP8 = True
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
    graph = exported(target, options)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    needed = _initializer_names(graph.data)
    weights = {name: tensor for name, tensor in weights_of(target).items() if name in needed}
    values = [_value(tensor) for tensor in weights.values()]
    settings.add_external_initializers(list(weights), values)
    session = onnxruntime.InferenceSession(
        graph.data, settings, providers=[_PROVIDERS[device.type], *_fallback(device)]
    )
    return _Session(session, values, options, graph.from_disk)


class _Session:
    """Runs on the memory of torch's tensors, in and out; nothing is copied."""

    def __init__(self, session: Any, weights: list[Any], options: CompileOptions, from_disk: bool) -> None:
        self._session, self._weights, self.from_disk = session, weights, from_disk
        self._names, self._shapes = options.names, options.results
        self._inputs = [entry.name for entry in session.get_inputs()]
        self._outputs = [entry.name for entry in session.get_outputs()]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        binding = self._session.io_binding()
        held = [tensor.contiguous() for tensor in inputs]  # until the session has run
        for name, tensor in zip(self._names, held, strict=False):
            if name in self._inputs:
                binding.bind_input(name, *_place(tensor), _TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        x = held[0]
        found = []
        for name, shape in zip(self._outputs, self._shapes, strict=True):
            out = torch.empty(shape.shape(tuple(x.shape)), dtype=x.dtype, device=x.device)
            binding.bind_output(name, *_place(out), _TYPES[out.dtype], tuple(out.shape), out.data_ptr())
            found.append(out)
        if x.device.type == "cuda":
            torch.cuda.current_stream(x.device).synchronize()
        self._session.run_with_iobinding(binding)
        return tuple(found) if len(found) > 1 else found[0]


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


# What the file says of each weight's place; nothing is read from there, the live weights are handed over by name.
NOWHERE = "weights-of-the-live-model"
_DIMENSIONS = {("x", 2): "height", ("x", 3): "width", ("context", 1): "tokens"}


def exported(target: torch.nn.Module, options: CompileOptions) -> Kept:
    """The ONNX model, its weights by name only."""
    import onnx
    import onnxscript

    versions = {"opset": str(OPSET), "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
    return kept_or_made(target, options, versions, lambda: _export(target, options))


def _export(target: torch.nn.Module, options: CompileOptions) -> bytes:
    example = _distinct(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            target.eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(options.names[: len(example)]),
            dynamic_shapes=_dynamic_shapes(target, options),
            optimize=False,  # it would fold weights into other weights, which the live ones could not replace
            verbose=False,
        )
    assert program is not None
    return _without_weights(program.model, weights_of(target))


def _distinct(options: CompileOptions) -> tuple[torch.Tensor, ...]:
    """Inputs to export with: sizes that are no special case, so that none is taken for a constant."""
    sizes = {"batch": 2, "height": 24, "width": 16, "tokens": 77}
    inputs: list[torch.Tensor] = []
    for name, tensor, changing in zip(options.names, options.example, options.changing, strict=False):
        shape = list(tensor.shape)
        for dimension in changing:
            shape[dimension] = sizes[_DIMENSIONS.get((name, dimension), "batch")]
        if name in options.following:
            shape = list(options.following[name].shape(tuple(inputs[0].shape)))
        inputs.append(torch.zeros(shape, dtype=tensor.dtype, device=tensor.device))
    return tuple(inputs)


def _dynamic_shapes(target: torch.nn.Module, options: CompileOptions) -> tuple[Any, ...]:
    from torch.export import Dim

    # Sizes that follow the first input's are said by the network, in formulas that DYNAMIC would refuse.
    kinds = [Dim.AUTO if name in options.following else Dim.DYNAMIC for name in options.names]
    shapes = tuple(dict.fromkeys(d, kind) for d, kind in zip(options.changing, kinds, strict=False))
    parameters = inspect.signature(target.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters) and len(shapes) >= len(parameters):
        named = len(parameters) - 1
        return (*shapes[:named], shapes[named:])
    return shapes


def _without_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> bytes:
    """The model with each weight as a reference to nowhere. Raises RuntimeError where the graph knows others."""
    import onnx_ir as ir

    for name, value in list(model.graph.initializers.items()):
        if name not in weights:
            continue
        if not value.uses():  # of blocks that this program leaves out
            del model.graph.initializers[name]
            continue
        tensor = value.const_value
        size = tensor.nbytes
        value.const_value = ir.ExternalTensor(
            NOWHERE, offset=0, length=size, dtype=tensor.dtype, shape=tensor.shape, name=name
        )
    large = [name for name, v in model.graph.initializers.items() if name not in weights and v.const_value.nbytes > 1e6]
    if large:
        raise RuntimeError(f"the exporter made weights of its own: {', '.join(large[:3])}")
    return ir.to_proto(model).SerializeToString()

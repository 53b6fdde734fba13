"""onnxruntime: the network exported to ONNX once, with sizes left open, and run by ONNX Runtime.

The file on disk holds no weights: a session gets the live ones by name, so a LoRA or another checkpoint of the family
makes a new session, in seconds, and no new export.

A network as an ONNX file without its weights, exported once and found again by what it was made from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ....common.core import compute_device
from ....common.errors import UnavailableError
from . import CompileOptions

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


log = logging.getLogger(__name__)

# What the file says of each weight's place; nothing is read from there, the live weights are handed over by name.
NOWHERE = "weights-of-the-live-model"
INPUT_NAMES = ("x", "timesteps", "context", "y")
_DIMENSIONS = {("x", 0): "batch", ("x", 2): "height", ("x", 3): "width", ("context", 1): "tokens"}
_SCHEMA = 2
_DIGEST = hashlib.sha256().digest_size


def weights_of(target: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every weight of a network by its name in the exported graph."""
    return {name: tensor.detach() for name, tensor in (*target.named_parameters(), *target.named_buffers())}


def exported(target: torch.nn.Module, options: CompileOptions, opset: int) -> bytes:
    """The ONNX model, its weights by name only. From `options.folder` where it was made before, else put there."""
    path = None if options.folder is None else options.folder / f"{_key(target, options, opset)}.graph"
    kept = None if path is None else _kept(path)
    if kept is not None:
        return kept
    data = _export(target, options, opset)
    if path is not None:
        _keep(path, data)
    return data


def _kept(path: Path) -> bytes | None:
    """The graph in a file; None where there is none, or one that is not as it was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("SpeedLab: the graph kept in %s cannot be read (%s); it is exported again.", path, error)
        return None
    graph, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(graph).digest() != digest:
        log.warning("SpeedLab: the graph kept in %s is damaged; it is exported again.", path)
        return None
    return graph


def _keep(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data + hashlib.sha256(data).digest())
        partial.replace(path)
    except OSError as error:
        log.warning("SpeedLab: the exported graph is not kept, for %s cannot be written: %s", path, error)
    finally:
        partial.unlink(missing_ok=True)


def _key(target: torch.nn.Module, options: CompileOptions, opset: int) -> str:
    """A hash of what a graph depends on: structure and code, shapes and types of weights and inputs, and versions."""
    import onnx
    import onnxscript

    identity = {
        "schema": _SCHEMA,
        "opset": opset,
        "versions": [torch.__version__, onnx.__version__, onnxscript.__version__],
        "structure": str(target),
        "code": _code_of(target),
        "settings": [_plain_values(module) for module in target.modules()],
        "weights": [(name, str(t.dtype), list(t.shape)) for name, t in weights_of(target).items()],
        "inputs": [(str(tensor.dtype), tensor.ndim) for tensor in options.example],
        "fixed": [
            [n for d, n in enumerate(t.shape) if d not in c]
            for t, c in zip(options.example, options.changing, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _code_of(target: torch.nn.Module) -> list[str]:
    """Hashes of the files that define the layers, those of PyTorch left out."""
    kinds = {type(module) for module in target.modules() if not type(module).__module__.startswith("torch.")}
    files = {inspect.getsourcefile(kind) for kind in kinds}
    return sorted(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file)


def _plain_values(module: torch.nn.Module) -> list[tuple[str, str]]:
    """Sizes, heads, groups and switches of a module, which `str(module)` leaves out."""
    values = ((name, value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str)))
    return sorted((name, str(value)) for name, value in values)


def _export(target: torch.nn.Module, options: CompileOptions, opset: int) -> bytes:
    example = _distinct(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            target.eval(),
            example,
            dynamo=True,
            opset_version=opset,
            input_names=list(INPUT_NAMES[: len(example)]),
            dynamic_shapes=_dynamic_shapes(options),
            optimize=False,  # it would fold weights into other weights, which the live ones could not replace
            verbose=False,
        )
    assert program is not None
    return _without_weights(program.model, weights_of(target))


def _distinct(options: CompileOptions) -> tuple[torch.Tensor, ...]:
    """Inputs to export with: sizes that are no special case, so that none is taken for a constant."""
    sizes = {"batch": 2, "height": 24, "width": 16, "tokens": 77}
    inputs = []
    for name, tensor, changing in zip(INPUT_NAMES, options.example, options.changing, strict=False):
        shape = list(tensor.shape)
        for dimension in changing:
            shape[dimension] = sizes[_DIMENSIONS.get((name, dimension), "batch")]
        inputs.append(torch.zeros(shape, dtype=tensor.dtype, device=tensor.device))
    return tuple(inputs)


def _dynamic_shapes(options: CompileOptions) -> tuple[dict[int, Any], ...]:
    from torch.export import Dim

    return tuple(dict.fromkeys(changing, Dim.DYNAMIC) for changing in options.changing)


def _without_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> bytes:
    """The model with each weight as a reference to nowhere. Raises RuntimeError where the graph knows others."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if name not in weights:
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

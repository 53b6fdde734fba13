"""A network as an ONNX file without its weights, exported once and found again by what it was made from."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import CompileOptions

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
        log.warning("SpeedLab: the graph kept in %s cannot be read (%s); it is exported anew.", path, error)
        return None
    graph, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(graph).digest() != digest:
        log.warning("SpeedLab: the graph kept in %s is damaged; it is exported anew.", path)
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

    told = {
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
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


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

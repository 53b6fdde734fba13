"""What this pack uses of PyTorch that its documentation does not promise: each once, here.

`2.4-2.12` names the PyTorch versions that have it as seen by us, `2.12` what 2.4 lacks; where it is missing, a function
says so by what it returns. PyTorch is imported on use: to ask whether dynamo is loaded must not load it. Attributes of
every module (`_parameters`, `_buffers`, its hooks) are used where they are needed; they are as old as PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FxCompiler = Callable[[Any, list[Any]], Callable[..., Any]]


# Dynamo.


def is_dynamo_loaded() -> bool:
    """Whether anything in this process has asked for dynamo."""
    return "torch._dynamo" in sys.modules


def load_compiler() -> None:
    """Import dynamo and inductor, which takes seconds."""
    import torch._dynamo
    import torch._inductor.config  # noqa: F401


def compile_callbacks() -> Any:
    """`torch._dynamo.callback.callback_handler` (2.12): tells when torch.compile compiles. None without it."""
    return getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)


def is_dynamo_off() -> bool:
    """`torch._dynamo.config.disable` (2.4-2.12)."""
    import torch._dynamo

    return bool(getattr(torch._dynamo.config, "disable", False))


def dynamo_counters() -> Mapping[str, Any] | None:
    """`torch._dynamo.utils.counters` (2.4-2.12), None while dynamo is not loaded."""
    return getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)


def compilation_log() -> tuple[Any, ...]:
    """`torch._dynamo.utils.get_compilation_metrics` (2.4-2.12): the compilations that dynamo still remembers."""
    return tuple(getattr(sys.modules.get("torch._dynamo.utils"), "get_compilation_metrics", list)())


def dynamo_failures() -> tuple[type[BaseException], ...]:
    """What means: not compiled (2.4-2.12; the limit of graphs 2.12). They come before anything of the graph has run."""
    import torch._dynamo.exc as exc

    names = ("TorchDynamoException", "BackendCompilerFailed", "FailOnRecompileLimitHit", "FailOnCacheLimitHit")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def innermost(function: Any) -> Any:
    """`_torchdynamo_orig_callable` (2.4-2.12): the function that dynamo has wrapped, through all layers."""
    while (inner := getattr(function, "_torchdynamo_orig_callable", None)) is not None:
        function = inner
    return function


def forget_code_of(function: Callable[..., Any]) -> None:
    """`torch._dynamo.eval_frame.reset_code` (2.4-2.12): empty the cache at the code of a compiled function.

    Dynamo notes the code of what it made from it, so that neither would ever be freed, nor the weights in it.
    """
    import torch._dynamo.eval_frame as eval_frame

    original = getattr(function, "_torchdynamo_orig_callable", None)
    if original is not None and hasattr(eval_frame, "reset_code"):
        eval_frame.reset_code(original.__code__)


def cudagraphs_backend() -> FxCompiler:
    """`torch._dynamo.lookup_backend` (2.4-2.12)."""
    import torch._dynamo

    backend: FxCompiler = torch._dynamo.lookup_backend("cudagraphs")
    return backend


@contextmanager
def dynamo_limits(graphs: int) -> Iterator[None]:
    """Let each function have `graphs` graphs and make one more an error (names of 2.4, and those of 2.12)."""
    import torch._dynamo
    from torch.fx.experimental import _config

    config, shapes = torch._dynamo.config, _config
    wanted = {
        ("recompile_limit", "cache_size_limit"): graphs,
        ("accumulated_recompile_limit", "accumulated_cache_size_limit"): 1 << 20,
        ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit"): True,
        ("suppress_errors",): False,
    }
    found = {next((name for name in names if hasattr(config, name)), ""): value for names, value in wanted.items()}
    with ExitStack() as stack:
        stack.enter_context(config.patch({name: value for name, value in found.items() if name}))
        if hasattr(shapes, "use_duck_shape"):  # 2.12
            # A height that equals the width by chance is no rule: without this a square image has graphs of its own.
            stack.enter_context(shapes.patch(use_duck_shape=False))  # type: ignore[attr-defined]
        yield


# Inductor.


def inductor_compile(
    graph: Any, inputs: list[Any], mode: str, dynamic: bool | None, *, keep_layouts: bool
) -> Callable[..., Any]:
    """`torch._inductor.compile` with `list_mode_options` (2.4-2.12). `keep_layouts`: no weight is copied to another."""
    import torch._inductor.config

    settings = dict(torch._inductor.list_mode_options(mode, dynamic))
    if keep_layouts and hasattr(torch._inductor.config, "layout_optimization"):
        settings["layout_optimization"] = False
    program: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=settings)
    return program


def inductor_code_modules() -> list[ModuleType]:
    """`codecache.PyCodeCache.modules` (2.12; empty before): the modules of code, which inductor keeps."""
    from torch._inductor import codecache

    return list(getattr(getattr(codecache, "PyCodeCache", None), "modules", ()))


@contextmanager
def inductor_settings(*, freeze: bool, vectors_work: Callable[[], bool] | None) -> Iterator[None]:
    """`torch._inductor.config` (2.4-2.12). Where `vectors_work`, inductor does not test the vector units itself."""
    import torch._inductor.config

    with ExitStack() as stack:
        if freeze:
            stack.enter_context(torch._inductor.config.patch(freezing=True))
        tested = getattr(torch._inductor.config.cpp, "vec_isa_ok", True)
        if vectors_work is not None and tested is None and vectors_work():
            stack.enter_context(torch._inductor.config.patch({"cpp.vec_isa_ok": True}))
        yield


def inductor_folder() -> Path | None:
    """`cache_dir_utils.default_cache_dir` (2.12): where inductor keeps its files by default."""
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:
        return None
    return Path(default_cache_dir())


def clear_inductor() -> None:
    """`torch._dynamo.reset` (2.4-2.12) and `torch._inductor.utils.clear_caches` (2.12): loaded programs, which inductor
    finds again without looking at its folder."""
    import torch._dynamo
    import torch._inductor.utils

    torch._dynamo.reset()
    getattr(torch._inductor.utils, "clear_caches", lambda: None)()


def find_cpp_compiler() -> None:
    """`cpp_builder.get_cpp_compiler` (2.12): raises what inductor raises for a machine without a C++ compiler.

    Nothing is raised by an older PyTorch, which looks for the compiler only when it needs one.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return
    get_cpp_compiler()


def run_cpp_compiler(arguments: str, folder: str) -> None:
    """`cpp_builder.run_compile_cmd` (2.12). Raises ImportError without it, and whatever it raises."""
    from torch._inductor.cpp_builder import get_cpp_compiler, run_compile_cmd

    run_compile_cmd(f"{get_cpp_compiler()} {arguments}", cwd=folder)


def widest_vectors() -> Any | None:
    """The first set of instructions in `cpu_vec_isa.supported_vec_isa_list` (2.12), which begins with the widest, that
    this CPU has. Raises ImportError without it."""
    from torch._inductor import cpu_vec_isa

    have = cpu_vec_isa.x86_isa_checker()
    known = (isa for isa in cpu_vec_isa.supported_vec_isa_list if str(isa).split())
    return next((isa for isa in known if have and all(name in have for name in str(isa).split())), None)


def has_triton() -> bool:
    """`torch.utils._triton.has_triton` (2.4-2.12)."""
    from torch.utils._triton import has_triton

    return bool(has_triton())


# torch.jit.


def is_jit_on() -> bool:
    """`torch.jit._state` (2.4-2.12)."""
    import torch

    return bool(torch.jit._state._enabled)


def traced_graph(function: Callable[..., Any], example: Sequence[Any]) -> Any:
    """`_create_graph_by_tracing` (2.4-2.12): one call as a graph.

    `torch.jit.trace` would put it among the functions of the process, which live as long as that: 26 MB a trace.
    """
    import torch

    graph, _ = torch._C._create_graph_by_tracing(function, tuple(example), lambda _: "", False, False)
    return graph


def optimise_frozen(graph: Any) -> None:
    """`_jit_pass_optimize_frozen_graph` (2.4-2.12): compute in advance what only depends on constants."""
    import torch

    torch._C._jit_pass_optimize_frozen_graph(graph, True)


def function_of_graph(graph: Any) -> Callable[..., Any]:
    """`_create_function_from_graph` (2.4-2.12): a function of its own, which owns the graph."""
    import torch

    function: Callable[..., Any] = torch._C._create_function_from_graph("traced", graph)
    return function


# oneDNN and the CPU.


def linear_functions() -> tuple[Any, ...]:
    """The names of a linear layer in a graph of dynamo's, one of them `torch._C._nn.linear` (2.4-2.12)."""
    import torch

    return torch.nn.functional.linear, torch._C._nn.linear


def has_onednn_linear() -> bool:
    """Whether there is `mkldnn._linear_pointwise` (2.4-2.12), which takes plain weights."""
    import torch

    try:
        return torch.ops.mkldnn._linear_pointwise is not None
    except (AttributeError, RuntimeError):
        return False


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`mkldnn._linear_pointwise` (2.4-2.12)."""
    import torch

    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def cpu_operators() -> tuple[Any, Any]:
    """The CPU's fused attention and oneDNN's linear layer as operators (2.4-2.12), None where there is none."""
    import torch

    attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return attention, getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def onednn_computes(dtype: str) -> bool:
    """`mkldnn._is_mkldnn_bf16_supported` and its like for fp16 (2.4-2.12)."""
    import torch

    probe = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return probe is not None and torch.backends.mkldnn.is_available() and bool(probe())


def has_avx512_bf16() -> bool | None:
    """`torch.cpu._is_avx512_bf16_supported` (2.12); None without it."""
    import torch

    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return None if probe is None else bool(probe())


def has_plain_convolution(layer: torch.nn.Module) -> bool:
    """Whether a convolution computes with `Conv2d._conv_forward` (2.4-2.12), unchanged."""
    import torch

    plain: Any = torch.nn.Conv2d._conv_forward
    return "_conv_forward" not in vars(layer) and getattr(type(layer), "_conv_forward", None) is plain


# Tensors and modules.


def operations_through(compute: Callable[[Any, Any, Any], Any]) -> AbstractContextManager[Any]:
    """`torch.utils._python_dispatch.TorchDispatchMode` (2.4-2.12): while entered, `compute` gets each operation with
    its arguments and gives its result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return compute(function, args, kwargs or {})

    return Mode()


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts, by `torch.utils._pytree.tree_leaves` (2.4-2.12)."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def is_on(autocast: torch.autocast) -> bool:
    """`autocast._enabled` (2.4-2.12): PyTorch only warns of a type that it cannot compute with, and switches off."""
    return bool(autocast._enabled)


def storage_id(storage: Any) -> int:
    """`UntypedStorage._cdata` (2.4-2.12): equal for all views of one piece of memory."""
    return int(storage._cdata)


def is_module_compiled(module: Any) -> bool:
    """`_compiled_call_impl` (2.4-2.12): whether a module was compiled where it stands."""
    return getattr(module, "_compiled_call_impl", None) is not None


def uncompiled(module: Any) -> Any:
    """`_orig_mod` (2.4-2.12): what `torch.compile` wraps, or the module itself."""
    return getattr(module, "_orig_mod", module)


# CUDA.


def cuda_of_driver() -> str | None:
    """`torch._C._cuda_getDriverVersion` (2.4-2.12): the newest CUDA that the driver runs. None without it."""
    import torch

    number = getattr(torch._C, "_cuda_getDriverVersion", int)()
    return f"{number // 1000}.{number % 1000 // 10}" if number else None

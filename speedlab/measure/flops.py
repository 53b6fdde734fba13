"""Floating-point operations of the model's evaluations, counted once and never while timing.

Matrix products and convolutions are counted by torch's own counter, a multiply-add as two operations, as it reads them.
Attention is counted from the shapes that reach ComfyUI's attention function, because some backends are invisible to
that counter and others (sub-quadratic, split) are many small products. Everything else is too small to count.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from .extra_pass import Sampling, run_pass
from .trace import Evaluation

_OVERRIDE = "optimized_attention_override"

Kind = tuple[int, int, int, bool]
"""What makes evaluations cost alike: forwards, rows of cond and uncond, and whether a cache answered in part."""


@dataclass(frozen=True)
class FlopCount:
    """Operations of each kind of evaluation of a run."""

    by_kind: dict[Kind, int]

    def total(self, evaluations: Sequence[Evaluation]) -> int:
        """Operations of these evaluations together."""
        return sum(self.by_kind[kind_of(evaluation)] for evaluation in evaluations)


def kind_of(evaluation: Evaluation) -> Kind:
    """See Kind."""
    return evaluation.forwards, evaluation.cond_rows, evaluation.uncond_rows, evaluation.cached


def count_flops(sample: Sampling, model: Any, evaluations: Sequence[Evaluation], wanted: Sequence[int]) -> FlopCount:
    """Count one evaluation of each kind that stands in `wanted`, in a pass of its own, compiled code run eagerly.

    `evaluations` are those of the timed run. Raises what the sampler raises.
    """
    first: dict[Kind, int] = {}
    for index, evaluation in enumerate(evaluations):
        first.setdefault(kind_of(evaluation), index)
    needed = {kind: first[kind] for kind in {kind_of(evaluations[n]) for n in wanted}}
    counter = _Counter(frozenset(needed.values()))
    with _eager():
        run_pass(sample, model, counter)
    return FlopCount({kind: counter.counted[index] for kind, index in needed.items()})


class _Counter:
    """The observer of the counting pass."""

    def __init__(self, wanted: frozenset[int]) -> None:
        self.end = max(wanted, default=-1) + 1
        self.counted: dict[int, int] = {}
        self._wanted = wanted

    @contextmanager
    def evaluation(self, index: int, transformer_options: dict[str, Any]) -> Iterator[None]:
        if index not in self._wanted:
            yield
            return
        attention = _AttentionCount()
        with _flop_counter() as counter, attention.within(transformer_options, counter.get_total_flops):
            yield
        self.counted[index] = counter.get_total_flops() - attention.seen + attention.operations

    def forward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        return None


@dataclass
class _AttentionCount:
    """`operations` from the shapes, and what the counter saw of the same work, which must not count twice."""

    operations: int = 0
    seen: int = 0

    @contextmanager
    def within(self, transformer_options: dict[str, Any], so_far: Callable[[], int]) -> Iterator[None]:
        """Look on at every attention call; who computes it stays the same."""
        previous = transformer_options.get(_OVERRIDE)

        def override(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = so_far()
            result = function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)
            self.seen += so_far() - before
            self.operations += attention_flops(*args[:3])
            return result

        transformer_options[_OVERRIDE] = override
        try:
            yield
        finally:
            if previous is None:
                transformer_options.pop(_OVERRIDE, None)
            else:
                transformer_options[_OVERRIDE] = previous


def attention_flops(q: Any, k: Any, v: Any) -> int:
    """Two products: scores and weighted values. Shapes [batch, tokens, heads * size] or [batch, heads, tokens, size].

    Nothing is taken off for a mask: the usual kernels compute what it hides.
    """
    keys = k.shape[-2]
    queries = q.numel() // q.shape[-1]
    return 2 * q.numel() * keys + 2 * queries * keys * v.shape[-1]


def _flop_counter() -> Any:
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def sdpa(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def product(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(x) * int(weight[0])

    # torch knows the fused attention of CUDA alone, and of oneDNN's operators none.
    operators = {
        getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None): sdpa,
        getattr(torch.ops.mkldnn, "_linear_pointwise", None): product,
    }
    known = {operator: count for operator, count in operators.items() if operator is not None}
    return FlopCounterMode(display=False, custom_mapping=known)


def can_count_compiled() -> bool:
    """Whether this torch lets compiled modules run their Python code for a while."""
    import torch

    return hasattr(torch.compiler, "set_stance")


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled modules run their Python code meanwhile: inside a compiled graph nothing can be counted."""
    if "torch._dynamo" not in sys.modules or not can_count_compiled():
        yield
        return
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield

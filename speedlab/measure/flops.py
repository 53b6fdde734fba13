"""Floating-point operations of the model's evaluations, counted once and never while timing.

Matrix products and convolutions are counted by torch's own counter, a multiply-add as two operations, as it reads them.
Attention is counted from the shapes that reach ComfyUI's attention function, because some backends are invisible to
that counter and others (sub-quadratic, split) are many small products. Everything else is too small to count.

Running the sampling again as far as needed, with a look at some of its evaluations.

The pass takes the whole schedule's first evaluations from the same input, so that techniques which count steps decide
as they did in the timed run, and leaves the sampler early. Evaluations are counted, since reading a sigma would wait
for the device; the count is that of the timed run because seed, input and model are the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from ..common.errors import first_line
from ..common.torch_private import cpu_operators, is_dynamo_loaded
from ..patching.wrappers import Site, Wrapper, attach
from .trace import KEY, Evaluation

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
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def sdpa(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def product(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(x) * int(weight[0])

    # torch knows the fused attention of CUDA alone, and of oneDNN's operators none.
    counts = zip(cpu_operators(), (sdpa, product), strict=True)
    known = {operator: count for operator, count in counts if operator is not None}
    return FlopCounterMode(display=False, custom_mapping=known)


def can_count_compiled() -> bool:
    """Whether this torch lets compiled modules run their Python code for a while."""
    import torch

    return hasattr(torch.compiler, "set_stance")


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled modules run their Python code meanwhile: inside a compiled graph nothing can be counted."""
    if not is_dynamo_loaded() or not can_count_compiled():
        yield
        return
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


log = logging.getLogger(__name__)

Sampling = Callable[[Any], object]
"""Samples with the model it is given, always from the same input."""


class _EnoughError(BaseException):
    """Leaves the sampler; not an Exception, so that no sampler or technique takes it for a failure of its own."""


class Observer(Protocol):
    """Sees the evaluations of a pass. `end`: the pass needs no evaluation from this number on."""

    end: int

    def evaluation(self, index: int, transformer_options: dict[str, Any]) -> AbstractContextManager[None]:
        """Wraps evaluation `index`."""

    def forward(self) -> AbstractContextManager[None]:
        """Wraps one forward of the network."""

    def close(self) -> None:
        """Called when the sampler is left, also by an error."""


def run_pass(sample: Sampling, model: Any, observer: Observer) -> None:
    """Sample with a clone of `model` until `observer` has seen enough. Raises what the sampler raises.

    The random generators of host and device are afterwards as they were before.
    """
    with _same_random_state(model.load_device):
        sample(_observed(model, observer))


def _observed(model: Any, observer: Observer) -> Any:
    state = {"index": 0}

    def sampler_sample(
        executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, callback: Any, noise: Any, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        state["index"] = 0
        try:
            result = executor(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)
        except _EnoughError:
            # Any latent of the right shape lets ComfyUI finish and clean up in its usual way; it is not read.
            result = noise
        except BaseException:
            _close_quietly(observer)
            raise
        observer.close()
        return result

    def predict_noise(
        executor: Any, x: Any, timestep: Any, model_options: dict | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        import comfy.model_management as mm

        mm.throw_exception_if_processing_interrupted()
        index = state["index"]
        if index >= observer.end:
            raise _EnoughError
        state["index"] = index + 1
        options = {} if model_options is None else model_options
        with observer.evaluation(index, options.setdefault("transformer_options", {})):
            return executor(x, timestep, options, *args, **kwargs)

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with observer.forward():
            return executor(*args, **kwargs)

    wrappers: dict[Site, Wrapper] = {
        Site.SAMPLER_SAMPLE: sampler_sample,
        Site.PREDICT_NOISE: predict_noise,
        Site.APPLY_MODEL: apply_model,
    }
    return attach(model, KEY, wrappers, outermost=(Site.SAMPLER_SAMPLE, Site.PREDICT_NOISE))


def _close_quietly(observer: Observer) -> None:
    """A cancel or an error of the model must not be hidden by what fails after it."""
    try:
        observer.close()
    except Exception as error:  # a profiler or a device that failed may raise anything
        log.error("SpeedLab: a pass that failed could not be closed: %s", first_line(error))


@contextmanager
def _same_random_state(device: Any) -> Iterator[None]:
    import torch

    kind = getattr(device, "type", str(device))
    if kind in ("cpu", "mps"):  # ComfyUI draws its noise on the host
        with torch.random.fork_rng(devices=()):
            yield
        return
    with torch.random.fork_rng(devices=[device], device_type=kind):
        yield

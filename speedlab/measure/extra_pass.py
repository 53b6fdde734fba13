"""Running the sampling again as far as needed, with a look at some of its evaluations.

The pass takes the whole schedule's first evaluations from the same input, so that techniques which count steps decide
as they did in the timed run, and leaves the sampler early. Evaluations are counted, since reading a sigma would wait
for the device; the count is that of the timed run because seed, input and model are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from ..common.errors import first_line
from ..patching.wrappers import Site, Wrapper, attach
from .trace import KEY

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
            # Any latent of the right shape lets ComfyUI finish and clean up in its usual way; nobody reads it.
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

"""How SpeedLab attaches to a ComfyUI model: keyed wrappers on a clone, and state that lives for one run.

This is the only module that knows ComfyUI's wrapper sites. A technique hands over plain functions; closures are used
instead of bound methods because cloning a patcher may deep-copy callable objects and would part them from their state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..common.errors import UnavailableError

ACCELERATORS = "speedlab.accelerators"
_ON_DETACH = "on_detach_after"  # comfy.patcher_extension.CallbacksMP.ON_DETACH
_RUN_STATES = "speedlab_run_states"


class Site(str, Enum):
    """ComfyUI's wrapper sites, from the outside in (`comfy.patcher_extension.WrappersMP`)."""

    OUTER_SAMPLE = "outer_sample"
    PREPARE_SAMPLING = "prepare_sampling"
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


Wrapper = Callable[..., Any]


class SharedState:
    """State that stays one where options are copied: some nodes deep-copy the options of a running model, and the run
    is still the same run."""

    def __deepcopy__(self, memo: dict) -> Any:
        return self


@dataclass(frozen=True)
class Accelerator:
    """What a technique did to a model, for the record: its name and the options that the user chose."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """`name(option=value, ...)`, the spelling of the benchmark's plan axis."""
        if not self.options:
            return self.name
        options = ", ".join(f"{key}={_plain(value)}" for key, value in self.options.items())
        return f"{self.name}({options})"


def attach(model: Any, key: str, wrappers: Mapping[Site, Wrapper], *, outermost: tuple[Site, ...] = ()) -> Any:
    """Return a clone of `model` with one wrapper a site under `key`; `model` itself is untouched.

    Wrappers already under `key` on the clone are replaced, so that a technique attached twice acts once, with the
    later options. Sites named in `outermost` run before every other wrapper of that site.
    """
    clone = model.clone()
    for site, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(site.value, key)
        clone.add_wrapper_with_key(site.value, key, wrapper)
        if site in outermost:
            by_key = clone.wrappers[site.value]
            clone.wrappers[site.value] = {key: by_key.pop(key), **by_key}
    return clone


def when_unloaded(clone: Any, key: str, callback: Callable[[Any], None]) -> None:
    """Have `callback(patcher)` called when ComfyUI unloads the model of `clone`, a clone that this pack made.

    Not where ComfyUI only passes the weights from one clone to another.
    """

    def detached(patcher: Any, unpatch_all: bool = True) -> None:
        if unpatch_all:
            callback(patcher)

    clone.remove_callbacks_with_key(_ON_DETACH, key)
    clone.add_callback_with_key(_ON_DETACH, key, detached)


def has_wrapper(model: Any, key: str) -> bool:
    """Whether any site of `model` carries a wrapper under `key`."""
    return any(model.get_wrappers(site.value, key) for site in Site)


def declare(model: Any, accelerator: Accelerator) -> None:
    """Note on a clone that this pack made which technique it carries; an earlier note of the same name is replaced."""
    others = tuple(known for known in accelerators(model) if known.name != accelerator.name)
    model.set_attachments(ACCELERATORS, (*others, accelerator))


def accelerators(model: Any) -> tuple[Accelerator, ...]:
    """The techniques that SpeedLab nodes attached to this model, in the order of the graph."""
    return model.get_attachment(ACCELERATORS) or ()


def has_work_units(patcher: Any) -> bool:
    """Whether ComfyUI's MultiGPU Work Units evaluate this model's conds in threads, each on a model of its own.

    What acts around all conds of an evaluation, from CALC_COND_BATCH outward, stays in one thread.
    """
    return bool(patcher.get_additional_models_with_key("multigpu"))


def refuse_work_units(patcher: Any, technique: str) -> None:
    """Refuse MultiGPU Work Units beside a technique that acts within an evaluation.

    State of a run is for one thread, and so is what is swapped into a model for an evaluation. Raises UnavailableError.
    """
    if has_work_units(patcher):
        raise UnavailableError(
            f"{technique} and MultiGPU Work Units cannot work on one model: those evaluate it on several GPUs at once, "
            "and it works on one. Take one of the two nodes out of the graph. Fleet uses several GPUs in another way."
        )


@contextmanager
def run_state(guider: Any, key: str, state: object) -> Iterator[None]:
    """Make `state` reachable by `state_of` from inner wrappers of this run; gone afterwards, whatever happens.

    Call it from an OUTER_SAMPLE wrapper with `executor.class_obj`: the guider's model options are a copy made for
    this run, so nothing is left on the model.
    """
    options = guider.model_options.setdefault("transformer_options", {})
    name = state_name(key)
    options[name] = state
    try:
        yield
    finally:
        options.pop(name, None)


def state_of(transformer_options: Mapping[str, Any], key: str) -> Any | None:
    """The state that `run_state` set for this run, or None outside of one."""
    return transformer_options.get(state_name(key))


def state_name(key: str) -> str:
    """Where `run_state` keeps a state among the transformer options."""
    return f"{_RUN_STATES}.{key}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

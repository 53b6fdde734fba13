"""The step that a model evaluation belongs to, for techniques that act on some steps only.

Where the steps of one run stand in the schedule that they were cut from.

ComfyUI's samplers, its schedulers and SplitSigmas cut a partial run (denoise below 1, start_at_step, end_at_step) out
of the whole schedule as a view of one tensor, so the whole is still there behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .schedule import StepTracker, steps_before
from .wrappers import Wrapper, state_of


class Position(NamedTuple):
    """Step `step` of a run of `steps` steps, which is a `part` of a schedule.

    `reached` is the step that the sampler has come to, before which it evaluates no more unless it `went_back`. `sigma`
    is the evaluation's own.
    """

    step: int
    steps: int
    part: Part
    reached: int
    went_back: bool
    sigma: float


@dataclass
class StepFinder:
    """Locates the evaluations of one run. Make one for each run, and hand its sampler `listening` for a callback.

    The schedule is copied to the host once a run. An evaluation's own sigma is read each time: on a GPU that waits for
    the queued work, once an evaluation, which costs the launch latency of the next kernels and nothing more.
    """

    part: Part | None = None
    # Whether these sigmas are a part of a schedule that is not behind them, so that shares count the part alone.
    is_lost: bool = False
    _tracker: StepTracker | None = None

    @classmethod
    def of_run(cls, guider: Any, noise: Any, latent: Any, sampler: Any, sigmas: Any, *_: Any, **__: Any) -> StepFinder:
        """From the guider and the arguments of OUTER_SAMPLE, which gets the sigmas as they were cut."""
        if not isinstance(sigmas, torch.Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
            return cls()
        part = part_of(sigmas)
        is_own = part == Part(0, len(sigmas) - 1)
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        return cls(part, is_own and (is_cut(sigmas) or not is_whole(sigmas, model_sampling)))

    def listening(self, callback: Callable[..., Any] | None) -> Callable[..., Any]:
        """A sampler's callback that also counts the steps which it reports."""

        def heard(step: int, *args: Any, **kwargs: Any) -> Any:
            result = None if callback is None else callback(step, *args, **kwargs)
            if self._tracker is not None:
                self._tracker.step_done(int(step))
            return result

        return heard

    def lost_text(self, technique: str, what: str) -> str:
        """The warning of a technique whose `what` counts steps of the whole schedule, where `is_lost`."""
        return (
            f"{technique}: these sigmas are a part of a schedule, and the rest of it cannot be found behind them, so "
            f"{what} counts the steps of this run alone. Nodes such as SetFirstSigma and FlipSigmas cut a part off "
            "from its whole: use them before SplitSigmas."
        )

    def why_not(self) -> str:
        """Why `locate` found nothing."""
        if self._tracker is None:
            return "this sampler gives no schedule of sigmas"
        return (
            "this sampler evaluates at a sigma that does not tell its step, because the schedule neither falls nor "
            "rises all the way"
        )

    def locate(self, model_options: Mapping[str, Any], timestep: Any) -> Position | None:
        """Where the evaluation at `timestep` (a tensor of sigmas, one a latent) stands.

        None where ComfyUI gave no schedule of at least one step, as a guider of another pack may do, and where a
        schedule that turns or repeats sigmas does not tell the step of this one.
        """
        if self._tracker is None:
            schedule = model_options.get("transformer_options", {}).get("sample_sigmas")
            if schedule is None or len(schedule) < 2:
                return None
            self._tracker = StepTracker(tuple(schedule.detach().float().cpu().tolist()))
        tracker = self._tracker
        sigma = float(timestep.detach().reshape(-1)[0])
        reached, step = tracker.reached, tracker.locate(sigma)
        if step is None:
            return None
        steps = len(tracker.sigmas) - 1
        return Position(step, steps, self.part or Part(0, steps), reached, tracker.went_back, sigma)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The run's sigmas once an evaluation was located, one more than there are steps."""
        return () if self._tracker is None else self._tracker.sigmas

    @property
    def falls(self) -> bool:
        """Whether each sigma is below the one before it."""
        return self._tracker is not None and self._tracker.order == "falls"


def counting_steps(key: str, at_end: Callable[[Any, Mapping[str, Any]], None]) -> Wrapper:
    """A wrapper around the sampler: its callback counts steps for the `finder` of the run's state at `key`, and at the
    sampler's end `at_end` gets that state and the transformer options.
    """

    def sampler_sample(
        executor: Any, model_wrap: Any, sigmas: Any, extra_args: dict, callback: Any, *args: Any, **kwargs: Any
    ) -> Any:
        options = extra_args.get("model_options", {}).get("transformer_options", {})
        run = state_of(options, key)
        heard = callback if run is None else run.finder.listening(callback)
        result = executor(model_wrap, sigmas, extra_args, heard, *args, **kwargs)
        if run is not None:
            at_end(run, options)
        return result

    return sampler_sample


class Part(NamedTuple):
    """The run's first step is step `first` of the `total` steps of the whole schedule."""

    first: int
    total: int


def window(start: float, end: float, steps: int, part: Part | None) -> tuple[int, int]:
    """The first step of a window and the step behind its last one, as steps of a run of `steps` steps.

    `start` and `end` are shares of the whole schedule, of which the run is a `part`; without it the run is the whole.
    """
    part = part or Part(0, steps)
    first, last = (min(max(steps_before(share, part.total) - part.first, 0), steps) for share in (start, end))
    return first, last


# The largest sigma of a model and the first one of a scheduler differ by less; an img2img run starts far below.
_STARTS_AT = 0.9
# FlipSigmas writes 0.0001 where a schedule ended in 0, and UniPC 0.001, also into the sigmas that it was given.
_LAST = 0.00101


def part_of(sigmas: torch.Tensor) -> Part:
    """The place of `sigmas` [steps + 1] in the schedule behind it; a schedule of its own where none is found."""
    own = Part(0, len(sigmas) - 1)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas.stride(0) != 1:
        return own
    storage = sigmas.untyped_storage()
    entries, rest = divmod(storage.nbytes(), sigmas.element_size())
    if rest or entries <= len(sigmas):
        return own
    whole = torch.as_strided(sigmas, (entries,), (1,), 0).detach().double().cpu()
    first = int(sigmas.storage_offset())
    end = first + own.total
    whole = _without_padding(whole, end)
    # KSampler (Advanced) sets the last sigma of a run that ends early to 0, in the whole schedule too.
    kept = torch.cat([whole[:end], whole[end + 1 :]]) if whole[end] == 0 else whole
    if not torch.isfinite(whole).all():
        return own
    falls = bool((kept.diff() <= 0).all() and whole[0] > whole[-1] >= 0)
    rises = bool((whole.diff() >= 0).all() and whole[-1] > whole[0] >= 0)
    return Part(first, len(whole) - 1) if falls or rises else own


def is_cut(sigmas: torch.Tensor) -> bool:
    """Whether something that is not 0 lies before or behind `sigmas`, of which `part_of` may make nothing."""
    if sigmas.stride(0) != 1:
        return False
    entries, rest = divmod(sigmas.untyped_storage().nbytes(), sigmas.element_size())
    if rest or entries <= len(sigmas):
        return False
    stored = torch.as_strided(sigmas, (entries,), (1,), 0).detach()
    first = int(sigmas.storage_offset())
    return bool((stored[:first] != 0).any() or (stored[first + len(sigmas) :] != 0).any())


def _without_padding(whole: torch.Tensor, end: int) -> torch.Tensor:
    """`whole` without the zeros behind its last step, as a buffer has them that is larger than its schedule.

    `end` is the last entry of the run. One zero behind a run that ends in 0 is no padding: such a run ends a step
    early, and KSampler (Advanced) wrote its own 0.
    """
    positive = torch.nonzero(whole != 0).flatten()
    zeros = int(positive[-1]) + 1 if len(positive) else 0
    if zeros <= end == len(whole) - 2:
        return whole
    return whole[: max(end, min(zeros, len(whole) - 1)) + 1]


def is_whole(sigmas: torch.Tensor, model_sampling: Any) -> bool:
    """Whether `sigmas` run from end to end of a model's sigmas, so that nothing lies before or behind them.

    From the largest to 0, or back as FlipSigmas turns them, or there and back.
    """
    first, last = (float(sigma) for sigma in (sigmas[0], sigmas[-1]))
    largest = getattr(model_sampling, "sigma_max", None)
    if largest is None:
        return last <= _LAST or first <= _LAST
    top = _STARTS_AT * float(largest)
    if last <= _LAST:
        return first >= top or first <= _LAST or _starts_lower(first, len(sigmas), model_sampling)
    return last >= top and (first <= _LAST or (first >= top and float(sigmas.min()) < top))


def _starts_lower(first: float, count: int, model_sampling: Any) -> bool:
    """Whether a whole schedule of ddim_uniform starts there: the one scheduler of ComfyUI that starts far below."""
    if not hasattr(model_sampling, "sigmas"):
        return False
    from comfy.samplers import ddim_scheduler

    # With few steps ddim_uniform gives a step more than was asked for, or one less.
    starts = (float(ddim_scheduler(model_sampling, steps)[0]) for steps in (count - 2, count - 1, count) if steps > 0)
    return any(abs(first - start) <= 1e-4 * start for start in starts)

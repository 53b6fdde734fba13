"""The step that a model evaluation belongs to, for techniques that act on some steps only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..schedule import StepTracker
from .whole_schedule import Part, is_cut, is_whole, part_of


class Position(NamedTuple):
    """Step `step` of a run of `steps` steps, which is a `part` of a schedule.

    `reached` is the step that the sampler has come to, before which it evaluates no more unless it `went_back`.
    """

    step: int
    steps: int
    part: Part
    reached: int
    went_back: bool


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
            "this sampler evaluates at a sigma to which its schedule, which neither falls nor rises all the way, does "
            "not lead there, so that the step is not known"
        )

    def locate(self, model_options: Mapping[str, Any], timestep: Any) -> Position | None:
        """Where the evaluation at `timestep` (a tensor of sigmas, one a latent) stands.

        None where ComfyUI gave no schedule of at least one step, as a guider of another pack may do, and where a
        schedule that turns or repeats sigmas does not lead through this one.
        """
        if self._tracker is None:
            schedule = model_options.get("transformer_options", {}).get("sample_sigmas")
            if schedule is None or len(schedule) < 2:
                return None
            self._tracker = StepTracker(tuple(schedule.detach().float().cpu().tolist()))
        tracker = self._tracker
        reached, step = tracker.reached, tracker.locate(float(timestep.detach().reshape(-1)[0]))
        if step is None:
            return None
        steps = len(tracker.sigmas) - 1
        return Position(step, steps, self.part or Part(0, steps), reached, tracker.went_back)

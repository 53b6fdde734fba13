"""The step that a model evaluation belongs to, for techniques that act on some steps only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..schedule import step_of
from .whole_schedule import Part, is_whole, part_of


class Position(NamedTuple):
    """Step `step` of a run of `steps` steps, which is a `part` of a schedule."""

    step: int
    steps: int
    part: Part


@dataclass
class StepFinder:
    """Locates the evaluations of one run. Make one for each run.

    The schedule is copied to the host once a run. An evaluation's own sigma is read each time: on a GPU that waits for
    the queued work, once an evaluation, which costs the launch latency of the next kernels and nothing more.
    """

    part: Part | None = None
    # Whether these sigmas are a part of a schedule that is not behind them, so that shares count the part alone.
    is_lost: bool = False
    _sigmas: tuple[float, ...] = field(default=())

    @classmethod
    def of_run(cls, guider: Any, noise: Any, latent: Any, sampler: Any, sigmas: Any, *_: Any, **__: Any) -> StepFinder:
        """From the guider and the arguments of OUTER_SAMPLE, which gets the sigmas as they were cut."""
        if not isinstance(sigmas, torch.Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
            return cls()
        part = part_of(sigmas)
        is_own = part == Part(0, len(sigmas) - 1)
        return cls(part, is_own and not is_whole(sigmas, guider.model_patcher.get_model_object("model_sampling")))

    def lost_text(self, technique: str, what: str) -> str:
        """The warning of a technique whose `what` counts steps of the whole schedule, where `is_lost`."""
        return (
            f"{technique}: these sigmas are a part of a schedule, and the rest of it cannot be found behind them, so "
            f"{what} counts the steps of this run alone. Nodes such as SetFirstSigma cut a part off from its whole: "
            "use them before SplitSigmas."
        )

    def locate(self, model_options: Mapping[str, Any], timestep: Any) -> Position | None:
        """Where the evaluation at `timestep` (a tensor of sigmas, one a latent) stands.

        None where ComfyUI gave no schedule of at least one step, as a guider of another pack may do.
        """
        if not self._sigmas:
            schedule = model_options.get("transformer_options", {}).get("sample_sigmas")
            if schedule is None or len(schedule) < 2:
                return None
            self._sigmas = tuple(schedule.detach().float().cpu().tolist())
        sigma = float(timestep.detach().reshape(-1)[0])
        steps = len(self._sigmas) - 1
        return Position(step_of(sigma, self._sigmas), steps, self.part or Part(0, steps))

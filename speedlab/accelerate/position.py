"""The step that a model evaluation belongs to, for techniques that act on some steps only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..schedule import step_of
from .whole_schedule import Part, part_of


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
    _sigmas: tuple[float, ...] = field(default=())

    @classmethod
    def of_run(cls, noise: Any, latent: Any, sampler: Any, sigmas: Any, *_: Any, **__: Any) -> StepFinder:
        """From the arguments of OUTER_SAMPLE, which gets the sigmas as they were cut."""
        return cls(part_of(sigmas) if isinstance(sigmas, torch.Tensor) else None)

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

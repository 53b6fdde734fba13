"""The step that a model evaluation belongs to, for techniques that act on some steps only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..schedule import step_of


class Position(NamedTuple):
    """Step `step` of a schedule of `steps` steps."""

    step: int
    steps: int


@dataclass
class StepFinder:
    """Locates the evaluations of one run. Make one for each run.

    The schedule is copied to the host once a run. An evaluation's own sigma is read each time: on a GPU that waits for
    the queued work, once an evaluation, which costs the launch latency of the next kernels and nothing more.
    """

    _sigmas: tuple[float, ...] = field(default=())

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
        return Position(step_of(sigma, self._sigmas), len(self._sigmas) - 1)

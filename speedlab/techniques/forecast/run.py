"""One sampling run with forecasts: which of its steps are forecast, and what is said about it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...patching.notes import report_note, report_saved, warn
from ...patching.position import Position, StepFinder
from ...patching.wrappers import SharedState
from ..error_control import Budget, obstacle
from .history import Evaluation, Histories
from .plan import FEWEST_STEPS, ForecastConfig, fixed_plan, open_steps


@dataclass
class Run(SharedState):
    """State of one run, reachable through `patching.state_of` until the run ends."""

    config: ForecastConfig
    finder: StepFinder = field(default_factory=StepFinder)
    histories: Histories = field(default_factory=Histories)
    current: Evaluation | None = None
    is_forecast: bool = False
    # Whether the last call was answered by a forecast; `patching.notes.is_forecast` reads it.
    has_forecast: bool = False
    # Why no step of this run was forecast, where that is known before its end.
    reason: str | None = None
    stepped_aside: bool = False
    # Whether an evaluation of this run was answered by a forecast.
    answered: bool = False
    # Calls of calc_cond_batch, all and those that were forecast.
    calls: int = 0
    forecasts: int = 0
    _steps: int | None = None
    _open: range = range(0)
    _plan: frozenset[int] = frozenset()
    _decided: dict[int, bool] = field(default_factory=dict)
    _budget: Budget = field(init=False)
    _reported_numbers: bool = False
    # All that was asked for, and the step of the first evaluation.
    _asked: set[Hashable] = field(default_factory=set)
    _began: int | None = None

    def __post_init__(self) -> None:
        self._budget = Budget(self.config.tolerance)

    @property
    def is_new(self) -> bool:
        """Whether no evaluation of this run was located yet."""
        return self._steps is None

    def step_aside(self, reason: str, options: Mapping[str, Any]) -> None:
        """Evaluate the rest of the run in full, and say why."""
        self.stepped_aside, self.has_forecast = True, False
        self.histories.clear()
        rest = "the rest of this run" if self.answered else "this run"
        warn(options, f"Forecast: {reason}; nothing is forecast in {rest}.")

    def obstacle(self, position: Position | None) -> str | None:
        """Why the place of an evaluation in the run is not sound enough to forecast anything from here on."""
        is_new = position is not None and position.step not in self._decided
        return obstacle(self.finder, position, is_new)

    def tell_of_changes(self, keys: Iterable[Hashable], options: Mapping[str, Any]) -> None:
        """Say that something is asked for, under `keys`, that was not at the run's first step."""
        assert self.current is not None
        self._began = self.current.step if self._began is None else self._began
        new = set(keys) - self._asked
        self._asked |= new
        if new and self.current.step != self._began and self.reason is None:
            report_note(
                options,
                "Forecast: the prompts, ControlNets, sizes or guidance that act change during this run; steps where "
                "something begins or ends are evaluated in full.",
            )

    @contextmanager
    def evaluating(self, position: Position, cfg: float | None, options: Mapping[str, Any]) -> Iterator[None]:
        """Everything inside belongs to the step at `position`."""
        if self._steps is None:
            self._steps = position.steps
            self._open = open_steps(self.config, position.steps, position.part)
            self._plan = fixed_plan(self.config, position.steps, position.part)
            self.reason = self._nothing_to_do(position.steps)
        step = position.step
        self.histories.forget_before(min(step, position.reached))
        if step not in self._decided:
            self._decided[step] = self._wants_forecast(step, options)
        outer = self.current, self.is_forecast
        self.current, self.is_forecast = Evaluation(step, position.sigma, cfg), self._decided[step]
        try:
            yield
        finally:
            self.current, self.is_forecast = outer

    def _nothing_to_do(self, steps: int) -> str | None:
        if steps < FEWEST_STEPS:
            return f"it does nothing in runs of fewer than {FEWEST_STEPS} steps, and this one has {steps}"
        if not self._open:
            return "no step but the first four and the last two lies between start_percent and end_percent"
        return None

    def _wants_forecast(self, step: int, options: Mapping[str, Any]) -> bool:
        """The first decision about a step. What the device computed of the last full step is read here, where the
        device has just been waited for, to know the step."""
        if step not in self._open:
            return False
        if not self.histories.are_finite():
            self.histories.clear()
            if not self._reported_numbers:
                self._reported_numbers = True
                warn(options, "Forecast: a prediction of the model held NaN or infinity; nothing is forecast from it.")
            return False
        if self.config.mode == "fixed":
            return step in self._plan
        sigmas, last = self.finder.sigmas, max((full for full in self.histories.full if full < step), default=-1)
        if last < 0 or step - last > self.config.max_skip:
            return self._budget.refuses()
        error = self.histories.backtests.error_at(last, math.log(sigmas[last] / sigmas[step]))
        return self._budget.refuses() if error is None else self._budget.allows(error, step, last, sigmas)

    def end(self, options: Mapping[str, Any]) -> bool:
        """Report how much was forecast, and the reason where nothing was."""
        report_saved(options, "forecast", self.forecasts, self.calls, "evaluations")
        if not self.answered and not self.stepped_aside:
            report_note(
                options, f"Forecast: no step of this run was forecast, because {self.reason or self._why_not()}."
            )
        return self.answered

    def _why_not(self) -> str:
        if not self.histories.full:
            return "its guider does not evaluate the model by ComfyUI's calc_cond_batch"
        if self.config.mode == "adaptive":
            return "no forecast would have stayed within tolerance"
        return "the prompts or the size changed before anything could be forecast"

"""How a technique tells the record of the run that is being profiled what it did, without knowing the profiler.

A sentence is for the reader. What a technique did in place of what it was asked for is given as data too, so that
the record credits what ran.

How a technique tells a profiler, without knowing it, that a model evaluation was answered from a cache.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .wrappers import state_of

# In `transformer_options` during sampling: a callable that takes one sentence. Absent without a profiler.
REPORT_NOTE = "speedlab_report_note"
# Likewise: a callable that takes a technique's name and the options that it ran with, None where it did nothing.
REPORT_RAN = "speedlab_report_ran"


def report_note(transformer_options: Mapping[str, Any], text: str) -> None:
    """Add `text` to what the record says about this run: a choice that was made, or something that was set aside."""
    report = transformer_options.get(REPORT_NOTE)
    if report is not None:
        report(text)


def warn(transformer_options: Mapping[str, Any], text: str) -> None:
    """Something that did not happen as the user asked for: a warning of the log and of the record."""
    logging.warning("%s", text)
    report_note(transformer_options, text)


def report_ran(transformer_options: Mapping[str, Any], name: str, options: Mapping[str, Any] | None) -> None:
    """Tell what technique `name` did in this run in place of what it declared; `options` None: nothing at all."""
    report = transformer_options.get(REPORT_RAN)
    if report is not None:
        report(name, options)


# Likewise: a callable that takes a technique's name, how much of its work a run was spared, of how much, and of what.
REPORT_SAVED = "speedlab_report_saved"
# Of so few steps each changes the image much: models are distilled to need no more.
MOST_FEW_STEPS = 8


def report_saved(transformer_options: Mapping[str, Any], name: str, saved: int, of: int, unit: str) -> None:
    """Tell what technique `name` left out in this run, 0 included: `saved` of `of` `unit`.

    Samplers without a record have it in the log.
    """
    report = transformer_options.get(REPORT_SAVED)
    if report is not None:
        report(name, saved, of, unit)
    else:
        logging.info("SpeedLab: %s left out %d of %d %s, %.0f %%", name, saved, of, unit, 100 * saved / max(of, 1))


# In `transformer_options`: a callable without arguments. Absent without a profiler.
REPORT_CACHED = "speedlab_report_cached"


def report_cached(transformer_options: Mapping[str, Any]) -> None:
    """Note that the evaluation that is running re-uses earlier results, wholly or in part."""
    report = transformer_options.get(REPORT_CACHED)
    if report is not None:
        report()


# The key of the run state that forecasts predictions. Its `has_forecast` tells of the evaluation that is running; an
# entry of the options that came or changed within a run would make compiled code compile anew.
FORECAST = "speedlab.forecast"


def is_forecast(transformer_options: Mapping[str, Any]) -> bool:
    """Whether the predictions of the evaluation that is running were forecast, and say nothing new about the model."""
    return bool(getattr(state_of(transformer_options, FORECAST), "has_forecast", False))

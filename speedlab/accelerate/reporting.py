"""How a technique tells a profiler, without knowing it, that a model evaluation was answered from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# In `transformer_options`: a callable without arguments. Absent where nobody is profiling.
REPORT_CACHED = "speedlab_report_cached"


def report_cached(transformer_options: Mapping[str, Any]) -> None:
    """Note that the evaluation that is running re-uses earlier results, wholly or in part."""
    report = transformer_options.get(REPORT_CACHED)
    if report is not None:
        report()

"""How a technique leaves a sentence in the record of the run that is being profiled, without knowing the profiler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# In `transformer_options` during sampling: a callable that takes one sentence. Absent where nobody is profiling.
REPORT_NOTE = "speedlab_report_note"


def report_note(transformer_options: Mapping[str, Any], text: str) -> None:
    """Add `text` to what the record says about this run: a choice that was made, or something that was set aside."""
    report = transformer_options.get(REPORT_NOTE)
    if report is not None:
        report(text)

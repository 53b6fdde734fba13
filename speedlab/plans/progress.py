"""How far a sweep is: ComfyUI's bar over all steps, and a line with the time left."""

from __future__ import annotations

import logging
import sys
import time

from ..measure import timeline

log = logging.getLogger(__name__)


class SweepProgress:
    """Counts sampling steps over all cells. Each step is a place where a cancel takes hold."""

    def __init__(self, total_steps: int) -> None:
        import comfy.utils

        self.total = max(total_steps, 1)
        self.done = 0
        self._bar = comfy.utils.ProgressBar(self.total)
        self._started = time.monotonic()
        self._node = timeline.executing().node_id

    def begin(self, text: str) -> None:
        """Say which run begins."""
        left = self.left_s()
        line = text if left is None else f"{text}, {_duration(left)} left"
        log.info("SpeedLab: %s", line)
        # The text is a convenience of newer servers; none is there in tests and in headless use.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and self._node is not None and hasattr(server, "send_progress_text"):
            server.send_progress_text(line, self._node)

    def step(self, step: int) -> None:
        """Step number `step` of the running sampling is done. Raises ComfyUI's interrupt where one is asked for."""
        import comfy.model_management as mm

        mm.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(min(self.done + step, self.total), self.total)

    def finished(self, steps: int) -> None:
        """A sampling of `steps` steps is done."""
        self.done += steps
        self._bar.update_absolute(min(self.done, self.total), self.total)

    def more(self, steps: int) -> None:
        """There is more (or, negative, less) to do than was known."""
        self.total = max(self.total + steps, self.done, 1)

    def left_s(self) -> float | None:
        """Seconds that the rest takes at the speed so far; None before anything was done."""
        if not self.done:
            return None
        return (time.monotonic() - self._started) / self.done * (self.total - self.done)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"

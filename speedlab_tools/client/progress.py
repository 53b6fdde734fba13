"""One line that tells how far a run is: written over in a terminal, a few lines where output is a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from .events import LOADERS, SAMPLERS, SAVERS, TEXT_ENCODERS, Event

BAR = 24


def duration(value: float) -> str:
    """Seconds as `42 s` or `3:07 min`."""
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"


def progress_text(title: str, value: int, maximum: int, elapsed_s: float) -> str:
    """`title  [####....] step 5/20, 12 s left`. The first step carries warm-up, so it alone predicts nothing."""
    filled = BAR * value // max(maximum, 1)
    left = ""
    if 0 < value < maximum and elapsed_s > 0:
        left = f", {duration(elapsed_s / value * (maximum - value))} left"
    return f"{title}  [{'#' * filled}{'.' * (BAR - filled)}] step {value}/{maximum}{left}"


def activity(class_type: str, title: str) -> str:
    """What a node does, in words."""
    for classes, words in (
        (LOADERS, "loading the model"),
        (TEXT_ENCODERS, "encoding the text"),
        (SAMPLERS, "sampling"),
        (SAVERS, "saving"),
    ):
        if class_type in classes:
            return words
    return title or class_type


class ProgressLine:
    """A listener for ComfyClient.run that prints to `stream` (standard error by default)."""

    def __init__(self, title: str, graph: Mapping[str, Mapping[str, Any]], stream: TextIO | None = None) -> None:
        self.title = title
        self.graph = graph
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._width = 0
        self._node: str | None = None
        self._started_s = 0.0
        self._quarter = -1

    def __call__(self, event: Event) -> None:
        if event.kind == "executing" and event.node is not None:
            self._enter(event)
        elif event.kind == "progress" and event.maximum > 0 and self._class(event.node) in SAMPLERS:
            self._step(event)

    def done(self) -> None:
        """End the line."""
        if self.terminal and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
        self._width = 0

    def _class(self, node: str | None) -> str:
        return str(self.graph.get(node or "", {}).get("class_type", ""))

    def _enter(self, event: Event) -> None:
        self._node, self._started_s, self._quarter = event.node, event.time_s, -1
        if self.terminal:
            node = self.graph.get(event.node or "", {})
            title = str(node.get("_meta", {}).get("title", ""))
            self._show(f"{self.title}  {activity(self._class(event.node), title)}")

    def _step(self, event: Event) -> None:
        if event.value <= 1:
            self._quarter = -1
        quarter = 4 * event.value // event.maximum
        if not self.terminal and quarter == self._quarter:
            return
        self._quarter = quarter
        self._show(progress_text(self.title, event.value, event.maximum, event.time_s - self._started_s))

    def _show(self, text: str) -> None:
        if self.terminal:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

"""`python -m speedlab_tools synthetic checkpoint|controlnet|lora|taesd|vae|drawn ...`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from speedlab.common.errors import SpeedLabError

from ..host.progress import Reporter
from . import CheckpointSpec, write_checkpoint, write_controlnet, write_lora, write_taesd, write_vae
from .drawn.factors import FAMILIES
from .drawn.packed import write_drawn
from .files import Progress


def run(options: argparse.Namespace) -> int:
    """Writes what the arguments ask for, its path to stdout, progress to stderr."""
    try:
        with _messages_on_stderr():
            paths = _write(options)
    except ValueError as error:
        raise SpeedLabError(str(error)) from error
    for path in paths:
        sys.stdout.write(f"{path}\n")
    return 0


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """This package's messages go to stderr. Other loggers stay: the caller may be a process with a log of its own."""
    logger, handler = logging.getLogger(__package__), logging.StreamHandler(sys.stderr)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _write(options: argparse.Namespace) -> Sequence[Path]:
    if options.what == "taesd":
        return write_taesd(options.path, options.name, options.seed)
    if options.what == "vae":
        return [write_vae(options.path, options.seed)]
    if options.what == "drawn":
        return write_drawn(options.path, progress=_progress("model that draws"), model=FAMILIES[options.family])
    if options.what == "lora":
        spec = CheckpointSpec(options.family, options.size, options.dtype)
        text = not options.no_text_encoder
        return [write_lora(options.path, spec, options.rank, options.seed, options.scale, text, options.keys)]
    spec = CheckpointSpec(options.family, options.size, options.dtype, options.seed)
    if options.what == "controlnet":
        return [write_controlnet(options.path, spec)]
    return [write_checkpoint(options.path, spec, _progress(options.path.name))]


def _progress(title: str) -> Progress:
    """Reports at most twice a second, and at the end: on one line of a terminal, else on a line each 10 %."""
    reporter = Reporter(sys.stderr)
    state = {"time": 0.0, "tenth": -1}

    def report(done: int, total: int) -> None:
        now, tenth = time.monotonic(), 10 * done // total
        text = f"{title}: {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        if done == total:
            reporter.line(text)
        elif now - state["time"] >= 0.5 and (reporter.terminal or tenth != state["tenth"]):
            state.update(time=now, tenth=tenth)
            reporter.alive(text)

    return report

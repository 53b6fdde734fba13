"""NVTX ranges for Nsight: one domain, a fixed set of names, every number in the payload.

Nsight Systems groups by domain and message, so a step number in the text would give one row a step.
With no tool attached the nvtx package hands out a dummy domain and a range costs well under a microsecond.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

log = logging.getLogger(__name__)

DOMAIN = "speedlab"
RUN = "sl/run"
LOAD = "sl/load"
TEXT_ENCODE = "sl/text_encode"
SAMPLE = "sl/sample"
STEP = "sl/step"
EVAL = "sl/eval"
FORWARD = "sl/forward"
DECODE = "sl/decode"
NAMES = (RUN, LOAD, TEXT_ENCODE, SAMPLE, STEP, EVAL, FORWARD, DECODE)


class Emitter(Protocol):
    """What the ranges below need: a push with a payload and a pop."""

    def push(self, name: str, payload: float | int | None = None) -> None: ...

    def pop(self) -> None: ...


class NullEmitter:
    """Emits nothing: ranges are switched off or the nvtx package is missing."""

    def push(self, name: str, payload: float | int | None = None) -> None:
        return None

    def pop(self) -> None:
        return None


class NvtxEmitter:
    """Pushes and pops ranges of the `speedlab` domain through NVIDIA's nvtx package."""

    def __init__(self) -> None:
        import nvtx

        self._domain = nvtx.get_domain(DOMAIN)

    def push(self, name: str, payload: float | int | None = None) -> None:
        if name not in NAMES:
            raise ValueError(f"NVTX range '{name}' is not one of {', '.join(NAMES)}")
        self._domain.push_range(self._domain.get_event_attributes(message=name, payload=payload))

    def pop(self) -> None:
        self._domain.pop_range()


@lru_cache(maxsize=1)
def _shared_emitter() -> Emitter:
    try:
        return NvtxEmitter()
    except ImportError:
        log.info("SpeedLab: NVTX ranges are off, the nvtx package is not installed (pip install nvtx).")
        return NullEmitter()


def emitter(enabled: bool = True) -> Emitter:
    """The process's emitter, or one that emits nothing."""
    return _shared_emitter() if enabled else NullEmitter()


@contextmanager
def nvtx_range(out: Emitter, name: str, payload: float | int | None = None) -> Iterator[None]:
    """A range around a block; popped in `finally`, so an error or a cancel never leaves one open."""
    out.push(name, payload)
    try:
        yield
    finally:
        out.pop()

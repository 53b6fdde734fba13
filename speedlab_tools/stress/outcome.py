"""How a reader took an input: fine, refused in words, or a defect."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from speedlab.common.errors import SpeedLabError

Verdict = Literal["fine", "refused", "defect"]
# CPU time, so that a busy machine makes no defects.
SLOW_S = 1.0
HANGS_AFTER_S = 60.0


@dataclass(frozen=True)
class Target:
    """A reader: `make` draws an input, `call` reads it. `refusals` are the errors whose text a user may see."""

    name: str
    make: Callable[[Any], Any]
    call: Callable[[Any], object]
    refusals: tuple[type[BaseException], ...] = (SpeedLabError,)


@dataclass(frozen=True)
class Outcome:
    """The verdict on one input; `reason` says what is wrong with a defect."""

    verdict: Verdict
    reason: str = ""


class Hang(BaseException):
    """A reader did not come back."""


class Broken(AssertionError):  # noqa: N818 - the name says what happened
    """A reader came back with what must not be: a path that leads out, code that ran, an answer of status 500."""


def judge(target: Target, given: Any) -> Outcome:
    """Let a reader read one input."""
    started = time.process_time()
    try:
        with _alarm(HANGS_AFTER_S):
            target.call(given)
        outcome = Outcome("fine")
    except target.refusals as error:
        outcome = _judge_words(error)
    except Hang:
        return Outcome("defect", f"no answer within {HANGS_AFTER_S:g} s")
    except Exception as error:
        return Outcome("defect", _where(error))
    took = time.process_time() - started
    return outcome if took <= SLOW_S else Outcome("defect", f"took {took:.1f} s of CPU time")


def _judge_words(error: BaseException) -> Outcome:
    text = str(error)
    if not text.strip():
        return Outcome("defect", f"{type(error).__name__} without a word")
    if "Traceback (most recent call last)" in text:
        return Outcome("defect", f"{type(error).__name__} shows a traceback")
    return Outcome("refused")


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"
    ours = next((f for f in reversed(frames) if "/speedlab/" in f.filename and "/stress/" not in f.filename), None)
    by = f" by {ours.filename.rpartition('/')[2]}:{ours.lineno}" if ours else ""
    return f"{type(error).__name__} at {place}{by}: {str(error)[:160]!r}"


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise Hang in this thread after so long, where the system has timers and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)

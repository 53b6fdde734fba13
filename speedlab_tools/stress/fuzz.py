"""Valid samples made invalid, and inputs from nothing: bytes, texts, JSON values. Seeded, so any input comes again.

Many inputs through many readers, counted: fine, refused in words, or a defect. Input `index` of a target is always
the same for a seed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import signal
import struct
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from types import FrameType
from typing import Any, Literal

from speedlab.common.errors import SpeedLabError
from speedlab.common.tables import growing_row

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


Maker = Callable[[Random], Any]
_NOTHING, _UNTOUCHED = 0.08, 0.03
# What has broken readers before: names that lead out, letters that are none, numbers past every limit, code for other
# readers of the same text.
HOSTILE_TEXTS = (
    "", " ", "\0", "a\0b", "..", "../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "C:x", "\\\\host\\share",
    "//host/share", "a/../../b", "..\\..\\b", "\u2025/\u2025/b", "\uff0e\uff0e/b", "\u202egnp.exe", "\ud800", "\ufeff",
    "e\u0301", "CON", "nul.json", "a" * 5000, "9" * 5000, "-1", "1e309", "NaN", "Infinity", "0x10", "\u0663", "true",
    "null", "=1+1", "<script>alert(1)</script>", "' OR 1=1", "%s%n", "{{7*7}}", "${x}", "[" * 3000, "(" * 3000,
    '{"a":' * 3000, "\r\n", "*", "max", "max@0", "a=b(c=d)+e(f)", ",,,", "=", "+", "@", "none",
)  # fmt: skip
HOSTILE_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 1e308, 1e-320, float("nan"),
                   float("inf"), float("-inf"))  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": None}, *HOSTILE_NUMBERS)
_TOKENS = "(){}[]=+,*@/\\\"'.:;|<>&%\n\r\t \0\u2028\u00d7\u0661\ud800\U0001f600"


def of_bytes(samples: Sequence[bytes]) -> Maker:
    """Samples with bytes changed; now and then a whole sample, or one made of nothing."""
    return _maker(samples, mutate_bytes, random_bytes)


def of_text(samples: Sequence[str]) -> Maker:
    """Samples with letters changed; now and then a whole sample, or one made of nothing."""
    return _maker(samples, mutate_text, random_text)


def of_json(samples: Sequence[Any]) -> Maker:
    """JSON values with parts replaced, removed and added; now and then a whole sample, or one made of nothing."""
    return _maker(samples, mutate_json, random_json)


def _maker(
    samples: Sequence[Any], mutate: Callable[[Random, Any], Any], from_nothing: Callable[[Random], Any]
) -> Maker:
    def make(rng: Random) -> Any:
        which = rng.random()
        if which < _NOTHING:
            return from_nothing(rng)
        sample = rng.choice(samples)
        return copy.deepcopy(sample) if which < _NOTHING + _UNTOUCHED else mutate(rng, sample)

    return make


def of_json_text(samples: Sequence[Any]) -> Maker:
    """The text of such a value, now and then with its letters changed too."""
    values = of_json(samples)

    def make(rng: Random) -> str:
        text = json.dumps(values(rng))
        return mutate_text(rng, text) if rng.random() < 0.3 else text

    return make


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """One to four changes: a bit, a cut, a piece twice, foreign bytes, a length of eight bytes."""
    work = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(work) + 1)
        what = rng.randrange(6)
        if what == 0 and work:
            work[at % len(work)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del work[at:]
        elif what == 2:
            work[at:at] = work[at : at + rng.randint(1, 64)]
        elif what == 3:
            work[at:at] = random_bytes(rng, 16)
        elif what == 4:
            place = rng.choice((0, at))
            work[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 8, 2**31, 2**63, 2**64 - 1, len(work))))
        else:
            del work[at : at + rng.randint(1, 32)]
    return bytes(work)


def mutate_text(rng: Random, text: str) -> str:
    """One to four changes: a token, a hostile text, a cut, a piece twice or away."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        what = rng.randrange(5)
        if what == 0:
            text = text[:at] + rng.choice(_TOKENS) + text[at:]
        elif what == 1:
            text = text[:at] + rng.choice(HOSTILE_TEXTS) + text[at + rng.randrange(8) :]
        elif what == 2:
            text = text[:at]
        elif what == 3:
            text = text[:at] + text[at : at + 32] + text[at:]
        else:
            text = text[:at] + text[at + rng.randint(1, 16) :]
    return text


def mutate_json(rng: Random, value: Any) -> Any:
    """One to three places of a copy replaced by a hostile value, removed, or given a neighbour."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 3)):
        parent: Any = holder
        key: Any = 0
        while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        what = rng.random()
        if what < 0.15 and parent is not holder:
            del parent[key]
        elif what < 0.3 and isinstance(parent, dict):
            parent[rng.choice(HOSTILE_TEXTS)] = random_json(rng)
        elif what < 0.4 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = random_json(rng)
    return holder[0]


def random_bytes(rng: Random, most: int = 256) -> bytes:
    """Up to `most` bytes."""
    return rng.randbytes(rng.randrange(most + 1))


def random_text(rng: Random) -> str:
    """A hostile text, or some letters of all kinds."""
    if rng.random() < 0.4:
        return rng.choice(HOSTILE_TEXTS)
    letters = (_TOKENS, "abcxyz0189", "".join(chr(rng.randrange(0x10FFFF)) for _ in range(4)))
    return "".join(rng.choice(rng.choice(letters)) for _ in range(rng.randrange(40)))


def random_json(rng: Random, depth: int = 0) -> Any:
    """A hostile value, a text, or a small list or object of such."""
    what = rng.random()
    if depth < 3 and what < 0.12:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and what < 0.24:
        return {random_text(rng): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}
    return random_text(rng) if what < 0.55 else copy.deepcopy(rng.choice(HOSTILE_VALUES))


SEED = 20260101
_KEPT_DEFECTS = 20


@dataclass
class Tally:
    """What became of a target's inputs. `defects`: a reason with the first input that showed it, and how many did."""

    target: str
    counts: Counter[str] = field(default_factory=Counter)
    defects: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """How many were read."""
        return sum(self.counts.values())

    def line(self) -> str:
        """One line of the printed table."""
        counts = (self.counts[outcome] for outcome in ("fine", "refused", "defect"))
        return growing_row(self.target, self.inputs, *counts, self.seconds)


HEADER = growing_row("reader", "inputs", "fine", "refused", "defects", "seconds")


def draw(target: Target, index: int, seed: int = SEED) -> object:
    """The input of that number."""
    return target.make(Random(f"{seed}/{target.name}/{index}"))


def fuzz(target: Target, inputs: int, seed: int = SEED) -> Tally:
    """Read so many inputs."""
    tally = Tally(target.name)
    started = time.perf_counter()
    with _quiet():
        for index in range(inputs):
            outcome = judge(target, draw(target, index, seed))
            tally.counts[outcome.verdict] += 1
            if outcome.verdict == "defect" and (outcome.reason in tally.defects or len(tally.defects) < _KEPT_DEFECTS):
                first, count = tally.defects.get(outcome.reason, (index, 0))
                tally.defects[outcome.reason] = (first, count + 1)
    tally.seconds = time.perf_counter() - started
    return tally


def shares(targets: Sequence[Target], inputs: int) -> list[int]:
    """Inputs for each target: equal shares, whose sum is at least `inputs`."""
    return [-(-inputs // len(targets))] * len(targets)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Readers warn of what they are fed; a hundred thousand warnings are of no use."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""The axes of a sweep: each turns one value's text into a change of a cell's settings. Pure.

Values stand one a line or between commas; `*` before a value makes its cell the baseline that quality is measured
against. Plans stand one a line. `batch` may end in `max`: doubled until memory is full, then the largest that fits is
searched; `max@64` goes no further than 64.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from .plan_text import BASELINE_MARK, SweepTextError, parse_plan, parse_technique, split_outside
from .settings import MOST_PICTURES, CellSettings, main_option, number, shorten, whole_number

NO_AXIS = "none"
OFF = "off"
MOST_CELLS = 400
_SIZE = re.compile(r"(\d{1,9})\s*[x×X]\s*(\d{1,9})|(\d{1,9})")  # noqa: RUF001 - people paste the multiplication sign
_SAMPLER = re.compile(r"(?P<sampler>[^/@\s]+)(?:/(?P<scheduler>[^/@\s]+))?(?:@(?P<steps>\d{1,9}))?")
_OPEN_END = re.compile(r"max(?:@(\d{1,9}))?", re.IGNORECASE)
# Axes whose value has a column of its own in every table that is shown; the other ones name the plan.
OWN_COLUMN = frozenset({"batch", "resolution", "steps", "cfg"})


@dataclass(frozen=True)
class AxisValue:
    """One value: as the tables show it, and the settings it makes of those before."""

    label: str
    apply: Callable[[CellSettings], CellSettings]


@dataclass(frozen=True)
class Axis:
    """An axis with its values. `baseline`: index of the marked value, if any. `most`: an open end's limit."""

    name: str
    values: tuple[AxisValue, ...]
    baseline: int | None = None
    open_end: bool = False
    most: int | None = None


NONE = Axis(NO_AXIS, (AxisValue("", lambda settings: settings),))


def _steps(text: str) -> AxisValue:
    steps = whole_number(text, "steps")
    return AxisValue(str(steps), lambda s: replace(s, steps=steps))


def _batch(text: str) -> AxisValue:
    batch = whole_number(text, "batch")
    return AxisValue(str(batch), lambda s: replace(s, batch=batch))


def _cfg(text: str) -> AxisValue:
    cfg = number(text, "cfg")
    return AxisValue(f"{cfg:g}", lambda s: replace(s, cfg=cfg))


def _resolution(text: str) -> AxisValue:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SweepTextError(f"'{shorten(text)}' is no resolution: write 768x512, or 512 for a square.")
    width, height = (int(match[1]), int(match[2])) if match[1] else (int(match[3]), int(match[3]))
    return AxisValue(f"{width}x{height}", lambda s: replace(s, width=width, height=height))


def _sampler(text: str) -> AxisValue:
    match = _SAMPLER.fullmatch(text)
    if match is None:
        raise SweepTextError(f"'{shorten(text)}' is no sampler: write dpmpp_2m, dpmpp_2m/karras or dpmpp_2m/karras@20.")
    changes: dict[str, object] = {"sampler": match["sampler"]}
    if match["scheduler"]:
        changes["scheduler"] = match["scheduler"]
    if match["steps"]:
        changes["steps"] = int(match["steps"])
    return AxisValue(text, lambda s: replace(s, **changes))  # type: ignore[arg-type]


def _scheduler(text: str) -> AxisValue:
    return AxisValue(text, lambda s: replace(s, scheduler=text))


def _prompt_tokens(text: str) -> AxisValue:
    tokens = whole_number(text, "prompt_tokens")
    if not 2 <= tokens <= 77 * 64:
        raise SweepTextError(f"prompt_tokens {tokens}: choose 2 to {77 * 64}; start and end of the text count.")
    return AxisValue(str(tokens), lambda s: replace(s, prompt_tokens=tokens))


def _handoff(text: str) -> AxisValue:
    share = number(text, "handoff")
    if not 0.0 <= share <= 1.0:
        raise SweepTextError(f"handoff {share:g}: it is a share of the steps, 0 to 1.")
    return AxisValue(f"{share:g}", lambda s: replace(s, handoff=share))


def _technique(name: str) -> Callable[[str], AxisValue]:
    """An axis whose value is a technique's main option, or its whole `(option=value, ...)`; `off` leaves it out."""

    def parse(text: str) -> AxisValue:
        if text == OFF:
            return AxisValue(OFF, lambda s: s.without(name))
        if not text.startswith("("):
            return AxisValue(text, lambda s: s.with_main(name, text))
        written = parse_technique(f"{name}{text}")
        return AxisValue(text, lambda s: s.with_technique(written))

    return parse


def _in_range(parse: Callable[[str], AxisValue], what: str, low: float, high: float) -> Callable[[str], AxisValue]:
    def checked(text: str) -> AxisValue:
        if text != OFF and not text.startswith("("):
            value = number(text, what)
            if not low <= value <= high:
                raise SweepTextError(f"{what} {text}: choose {low:g} to {high:g}, or off.")
        return parse(text)

    return checked


def _decoder(text: str) -> AxisValue:
    # A name alone is a tiny decoder's file, as Tiny VAE Decode lists them.
    known = text.partition("(")[0].strip() in ("full", "tiny")
    written = parse_technique(text) if known else main_option("tiny", text)
    return AxisValue(text, lambda s: s.with_technique(written))


def _plan(text: str) -> AxisValue:
    plan = parse_plan(text)
    return AxisValue(plan.name, lambda s: replace(s.with_stack(plan.techniques), plan=plan.name))


_PARSERS: dict[str, Callable[[str], AxisValue]] = {
    "batch": _batch,
    "resolution": _resolution,
    "steps": _steps,
    "cfg": _cfg,
    "sampler": _sampler,
    "scheduler": _scheduler,
    "prompt_tokens": _prompt_tokens,
    "precision": _technique("weights"),
    "attention": _technique("attention"),
    "compile": _technique("compile"),
    "deepcache_interval": _in_range(_technique("deepcache"), "deepcache_interval", 1, 100),
    "cfg_stop_at": _in_range(_technique("dynamic_cfg"), "cfg_stop_at", 0.0, 1.0),
    "decoder": _decoder,
    "offload": _technique("memory_plan"),
    "handoff": _handoff,
    "plan": _plan,
}
AXES = tuple(_PARSERS)


def written_values(name: str, text: str) -> list[str]:
    """The values of an axis as they are written, marks included."""
    return [part for part in split_outside(text, "\n" if name == "plan" else "\n,") if part]


def parse_axis(name: str, text: str) -> Axis:
    """Read an axis. Raises SweepTextError for an unknown axis or a value that cannot be read or is out of range."""
    if name == NO_AXIS:
        return NONE
    if name not in _PARSERS:
        close = difflib.get_close_matches(name, AXES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SweepTextError(f"There is no axis '{name}'.{hint} The axes are {', '.join(AXES)}.")
    texts = written_values(name, text)
    open_end, most = False, None
    if name == "batch" and texts and (ending := _OPEN_END.fullmatch(texts[-1])):
        open_end, most = True, int(ending[1]) if ending[1] else None
        texts = texts[:-1] or ["1"]
        if most is not None and not 1 <= most <= MOST_PICTURES:
            raise SweepTextError(f"max@{most}: choose a limit of 1 to {MOST_PICTURES} pictures.")
    if not texts:
        raise SweepTextError(f"The axis {name} has no values: write them one a line or between commas.")
    marked = [index for index, part in enumerate(texts) if part.startswith(BASELINE_MARK)]
    if len(marked) > 1:
        raise SweepTextError(f"The axis {name} has more than one baseline: mark one value with {BASELINE_MARK}.")
    if name == "batch" and any(_OPEN_END.fullmatch(part.removeprefix(BASELINE_MARK).strip()) for part in texts):
        raise SweepTextError("max stands last among the values of batch, and is no baseline: write 1, 2, max.")
    values = tuple(_value(name, part.removeprefix(BASELINE_MARK).strip()) for part in texts)
    labels = [value.label for value in values]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise SweepTextError(f"The axis {name} has '{twice[0]}' more than once.")
    if most is not None and (given := max(int(label) for label in labels)) > most:
        raise SweepTextError(f"batch {given} is above the limit max@{most}: leave it out, or raise the limit.")
    return Axis(name, values, marked[0] if marked else None, open_end, most)


def with_batch(axis: Axis, batch: int) -> tuple[Axis, int]:
    """An open batch axis that has `batch` among its values, and the place of it."""
    labels = [value.label for value in axis.values]
    if str(batch) in labels:
        return axis, labels.index(str(batch))
    return replace(axis, values=(*axis.values, _batch(str(batch)))), len(labels)


def _value(name: str, text: str) -> AxisValue:
    value = _PARSERS[name](text)
    # What no setting of ours can be is an error here, before anything runs.
    value.apply(CellSettings())
    return value

"""The axes of a sweep: each turns one value's text into a change of a cell's settings. Pure.

Values stand one a line or between commas; `*` before a value makes its cell the baseline that quality is measured
against. Plans stand one a line. `batch` may end in `max`: doubled until memory is full, then the largest that fits is
searched; `max@64` goes no further than 64.

What one cell of a sweep runs with: a frozen set of settings that axes and plans change.

The cells of a sweep: every pair of values of its two axes, and which cell each one is compared with. Pure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from .plan_text import (
    BASELINE_MARK,
    MAIN,
    MAIN_OPTION,
    STOCK,
    SweepTextError,
    TechniqueText,
    parse_plan,
    parse_technique,
    split_outside,
)

NO_AXIS = "none"
OFF = "off"
MOST_CELLS = 400
_SIZE = re.compile(r"(\d{1,9})\s*[x×X]\s*(\d{1,9})|(\d{1,9})")  # noqa: RUF001 - people paste the multiplication sign
_SAMPLER = re.compile(r"(?P<sampler>[^/@\s]+)(?:/(?P<scheduler>[^/@\s]+))?(?:@(?P<steps>\d{1,9}))?")
_OPEN_END = re.compile(r"max(?:@(\d{1,9}))?", re.IGNORECASE)
# Axes whose value has a column of its own in every table that is shown; the other ones name the plan.
OWN_COLUMN = frozenset({"batch", "resolution", "steps", "cfg"})
# Axes of settings, which hold whatever a technique did in place of what it was asked for.
_OF_SETTINGS = frozenset({"sampler", "scheduler", "sigmas", "prompt_tokens", "precision", "handoff"})
# Core's nodes that make sigmas. Without options those of _SCHEDULERS_TOO are the schedulers of KSampler.
SIGMAS = {
    "ays": "AlignYourStepsScheduler", "gits": "GITSScheduler", "polyexponential": "PolyexponentialScheduler",
    "laplace": "LaplaceScheduler", "vp": "VPScheduler", "sd_turbo": "SDTurboScheduler",
    "karras": "KarrasScheduler", "exponential": "ExponentialScheduler", "beta": "BetaSamplingScheduler",
}  # fmt: skip
_SCHEDULERS_TOO = frozenset({"karras", "exponential", "beta"})


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
        changes |= {"scheduler": match["scheduler"], "sigmas": None}
    if match["steps"]:
        changes["steps"] = int(match["steps"])
    return AxisValue(text, lambda s: replace(s, **changes))  # type: ignore[arg-type]


def _scheduler(text: str) -> AxisValue:
    return AxisValue(text, lambda s: replace(s, scheduler=text, sigmas=None))


def _sigmas(text: str) -> AxisValue:
    return AxisValue(text, lambda s: s.with_sigmas(text))


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
    "sigmas": _sigmas,
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
        if most is not None and not 1 <= most <= MOST_IMAGES:
            raise SweepTextError(f"max@{most}: choose a limit of 1 to {MOST_IMAGES} images.")
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


MOST_IMAGES = 4096
_LARGEST_SIDE, _MOST_STEPS, _HIGHEST_CFG = 16384, 10000, 100.0


@dataclass(frozen=True)
class CellSettings:
    """Sizes in pixels. `techniques` in the order in which they are attached; `decoder` makes the images."""

    width: int = 512
    height: int = 512
    batch: int = 1
    steps: int = 20
    cfg: float = 8.0
    sampler: str = "euler"
    scheduler: str = "normal"
    plan: str = STOCK
    techniques: tuple[TechniqueText, ...] = ()
    decoder: TechniqueText = field(default_factory=lambda: TechniqueText("full"))
    weights: TechniqueText | None = None
    # One of SIGMAS in place of the scheduler, with its options.
    sigmas: TechniqueText | None = None
    prompt_tokens: int | None = None
    handoff: float | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if not 64 <= value <= _LARGEST_SIDE or value % 8:
                raise SweepTextError(f"{name} {value}: sizes are multiples of 8 from 64 to {_LARGEST_SIDE}.")
        for name, most in (("batch", MOST_IMAGES), ("steps", _MOST_STEPS)):
            if not 1 <= getattr(self, name) <= most:
                raise SweepTextError(f"{name} {getattr(self, name)}: choose 1 to {most}.")
        if not 0.0 <= self.cfg <= _HIGHEST_CFG:
            raise SweepTextError(f"cfg {self.cfg:g}: choose 0 to {_HIGHEST_CFG:g}.")

    def with_technique(self, technique: TechniqueText) -> CellSettings:
        """The settings with one technique more: one of the model, or what `vae`, `weights` and `settings` stand for."""
        if technique.name in ("full", "tiny"):
            return replace(self, decoder=technique)
        if technique.name == "weights":
            return replace(self, weights=technique)
        if technique.name == "settings":
            return self._changed_by(technique)
        others = tuple(known for known in self.techniques if known.name != technique.name)
        return replace(self, techniques=(*others, technique))

    def with_sigmas(self, text: str) -> CellSettings:
        """The settings with another schedule: one of SIGMAS with its options, or a scheduler of KSampler."""
        written = parse_technique(text)
        if written.name in SIGMAS and (written.options or written.name not in _SCHEDULERS_TOO):
            given = written.options.keys() & {"steps", "denoise"}
            if given:
                raise SweepTextError(f"{written.words()}: leave {min(given)} out, which the cell's settings say.")
            return replace(self, sigmas=written)
        if written.options:
            raise SweepTextError(f"{written.words()}: there is no such schedule. Choose {', '.join(SIGMAS)}.")
        return replace(self, scheduler=written.name, sigmas=None)

    @property
    def schedule(self) -> str:
        """What the record and the tables call the schedule."""
        return self.scheduler if self.sigmas is None else self.sigmas.words()

    def without(self, name: str) -> CellSettings:
        """The settings without a technique of the model, or without `weights`."""
        if name == "weights":
            return replace(self, weights=None)
        return replace(self, techniques=tuple(known for known in self.techniques if known.name != name))

    def with_main(self, name: str, value: str) -> CellSettings:
        """The settings with a technique's main option changed; the options that it has already stay."""
        known = self.weights if name == "weights" else next((t for t in self.techniques if t.name == name), None)
        others = {key: text for key, text in (known.options if known else {}).items() if key != MAIN_OPTION[name]}
        return self.with_technique(TechniqueText(name, {**others, MAIN: value}))

    def with_stack(self, techniques: tuple[TechniqueText, ...]) -> CellSettings:
        """The settings with a whole stack more."""
        result = self
        for technique in techniques:
            result = result.with_technique(technique)
        return result

    def _changed_by(self, technique: TechniqueText) -> CellSettings:
        changed = self
        for name, text in technique.options.items():
            if name in ("width", "height", "batch", "steps"):
                changed = replace(changed, **{name: whole_number(text, name)})  # type: ignore[arg-type]
            elif name == "cfg":
                changed = replace(changed, cfg=number(text, name))
            elif name == "sampler":
                changed = replace(changed, sampler=text)
            elif name == "scheduler":
                changed = replace(changed, scheduler=text, sigmas=None)
            elif name == "sigmas":
                changed = changed.with_sigmas(text)
            else:
                known = "width, height, batch, steps, cfg, sampler, scheduler, sigmas"
                raise SweepTextError(f"settings({name or text}): the settings of a plan are {known}.")
        return changed

    def accelerators(self) -> tuple[str, ...]:
        """What the cell asks for beside the sampler's own settings, for a record of a cell that never ran."""
        named = [t for t in (self.weights, *self.techniques) if t is not None]
        return tuple(t.words() for t in named) + (
            () if self.decoder == TechniqueText("full") else (self.decoder.words(),)
        )


def shorten(text: str) -> str:
    """A text as a message quotes it."""
    return text if len(text) <= 40 else f"{text[:37]}..."


def whole_number(text: str, what: str) -> int:
    """An integer, or SweepTextError naming `what`."""
    try:
        return int(text)
    except ValueError:
        raise SweepTextError(f"'{shorten(text)}' is no whole number for {what}.") from None


def number(text: str, what: str) -> float:
    """A finite number, or SweepTextError naming `what`."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise SweepTextError(f"'{shorten(text)}' is no number for {what}.")
    return value


def main_option(name: str, value: str) -> TechniqueText:
    """A technique with its main option alone, as the axes make them."""
    return TechniqueText(name, {MAIN: value})


@dataclass(frozen=True)
class Cell:
    """One cell: its place in the grid, the labels of its values by axis, and its settings."""

    x: int
    y: int
    labels: tuple[tuple[str, str], ...]
    settings: CellSettings

    @property
    def name(self) -> str:
        """`steps 20, cfg 7`; `stock` for a sweep without axes."""
        return ", ".join(f"{axis} {label}" for axis, label in self.labels) or self.settings.plan

    def plan(self, carried: Sequence[str] = ()) -> str:
        """The plan column. `carried` are techniques that the graph attached before the sweep, as a record tells them.

        What no other column of a table would tell apart is named there.
        """
        own = [] if carried and self.settings.plan == STOCK else [self.settings.plan]
        return _labelled("+".join([*carried, *own]), self.labels)

    def plan_that_ran(self, plan: str) -> str:
        """The plan column where `plan` ran in place of what was asked for: axes of settings still hold."""
        return _labelled(plan, (pair for pair in self.labels if pair[0] in _OF_SETTINGS))


def make_cells(base: CellSettings, axis_x: Axis, axis_y: Axis) -> tuple[Cell, ...]:
    """Every cell, row by row. Raises SweepTextError for the same axis twice, too many cells or impossible settings."""
    if axis_x.name == axis_y.name and axis_x.name != "none":
        raise SweepTextError(f"Both axes are {axis_x.name}: choose two different ones, or none for the second.")
    axes = {axis.name: axis for axis in (axis_x, axis_y)}
    if {"scheduler", "sigmas"} <= axes.keys():
        raise SweepTextError("Both axes set the schedule: write schedulers among the values of sigmas, too.")
    for other, mark in (("steps", "@"), ("scheduler", "/"), ("sigmas", "/")):
        written = [value.label for value in axes["sampler"].values if mark in value.label] if "sampler" in axes else []
        if other in axes and written:
            raise SweepTextError(
                f"The sampler axis sets {other} too ('{written[0]}') where {other} is the other axis: leave out what "
                f"stands behind {mark}, or choose another second axis."
            )
    if axis_x.open_end and axis_y.open_end:
        raise SweepTextError("Only one axis may end in max.")
    count = len(axis_x.values) * len(axis_y.values)
    if count > MOST_CELLS:
        raise SweepTextError(f"{count} cells are more than {MOST_CELLS}: leave some values out.")
    return tuple(
        make_cell(base, axis_x, axis_y, x, y) for y in range(len(axis_y.values)) for x in range(len(axis_x.values))
    )


def make_cell(base: CellSettings, axis_x: Axis, axis_y: Axis, x: int, y: int) -> Cell:
    """The cell at one place. A plan is applied before other axes, so that their values hold."""
    pairs = [(axis_x, axis_x.values[x]), (axis_y, axis_y.values[y])]
    settings = base
    for _, value in sorted(pairs, key=lambda pair: pair[0].name != "plan"):
        settings = value.apply(settings)
    labels = tuple((axis.name, value.label) for axis, value in pairs if axis.name != "none")
    return Cell(x, y, labels, settings)


def _labelled(plan: str, labels: Iterable[tuple[str, str]]) -> str:
    named = [f"{axis}={label}" for axis, label in labels if axis not in OWN_COLUMN and axis != "plan"]
    return ", ".join([*([] if plan == STOCK and named else [plan]), *named])


def baseline_of(cell: Cell, axis_x: Axis, axis_y: Axis) -> tuple[int, int]:
    """The place of the cell that `cell`'s images are compared with.

    A mark on one axis compares along that axis, within the row or column of the cell. Marks on both axes, or on none,
    name one cell for all: the marked or first one.
    """
    marked_x, marked_y = axis_x.baseline, axis_y.baseline
    if marked_x is not None and marked_y is None:
        return marked_x, cell.y
    if marked_y is not None and marked_x is None:
        return cell.x, marked_y
    return marked_x or 0, marked_y or 0

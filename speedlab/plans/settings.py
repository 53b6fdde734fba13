"""What one cell of a sweep runs with: a frozen set of settings that axes and plans change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .plan_text import MAIN, MAIN_OPTION, STOCK, SweepTextError, TechniqueText

MOST_PICTURES = 4096
_LARGEST_SIDE, _MOST_STEPS, _HIGHEST_CFG = 16384, 10000, 100.0


@dataclass(frozen=True)
class CellSettings:
    """Sizes in pixels. `techniques` in the order in which they are attached; `decoder` makes the pictures."""

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
    prompt_tokens: int | None = None
    handoff: float | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if not 64 <= value <= _LARGEST_SIDE or value % 8:
                raise SweepTextError(f"{name} {value}: sizes are multiples of 8 from 64 to {_LARGEST_SIDE}.")
        for name, most in (("batch", MOST_PICTURES), ("steps", _MOST_STEPS)):
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
            elif name in ("sampler", "scheduler"):
                changed = replace(changed, **{name: text})  # type: ignore[arg-type]
            else:
                known = "width, height, batch, steps, cfg, sampler, scheduler"
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

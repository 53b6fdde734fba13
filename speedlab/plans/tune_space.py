"""The plans that Tune chooses from, and what each is predicted to take: exact counts of steps, times measured parts.

Pure: nothing here runs a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from ..measure.summary import CACHED, FORECAST, FULL
from ..patching.schedule import steps_before
from ..techniques.deepcache.schedule import DeepCacheConfig, sources
from ..techniques.forecast.plan import ForecastConfig, fixed_plan
from .axes import CellSettings
from .plan_text import MAIN, MAIN_OPTION, SweepTextError, TechniqueText, parse_plan

# What a step does, and whether it evaluates the negative prompt too.
Kind = tuple[str, bool]
Counts = Mapping[Kind, int]

SKIPS = (
    "", "deepcache(2)", "deepcache(3)", "deepcache(4)", "deepcache(5)", "deepcache(2,features=extrapolate)",
    "deepcache(3,features=extrapolate)", "deepcache(4,features=extrapolate)", "forecast(mode=fixed,max_skip=1)",
    "forecast(mode=fixed,max_skip=2)", "forecast(0.02)", "forecast(0.05)",
)  # fmt: skip
GUIDANCES = ("", "dynamic_cfg(0.9)", "dynamic_cfg(0.75)", "dynamic_cfg(0.5)")
DECODERS = ("", "tiny")
# Of the user's steps, in percent: as many evaluations can be saved without any technique.
FEWER_STEPS = (100, 90, 80, 70, 60, 50, 40)
_LEAVES_OUT = ("deepcache", "forecast")
_EXACT = ("attention", "compile", "compile_vae", "memory_plan", "precision")
_DEEPCACHE = {"cache_interval": "interval", "cache_branch_id": "branch", "start_percent": "start", "end_percent": "end"}
_FORECAST = {"start_percent": "start", "end_percent": "end"}


@dataclass(frozen=True)
class Candidate:
    """A plan with the sampler's settings that it runs with; `variant` is what is not one of the other three."""

    variant: str
    skip: str = ""
    guidance: str = ""
    decoder: str = ""
    steps: int = 20
    sampler: str = "euler"
    scheduler: str = "normal"  # or one of axes.SIGMAS, with its options

    @property
    def line(self) -> str:
        """The plan line, without the sampler's settings."""
        return "+".join(text for text in (self.variant, self.skip, self.guidance, self.decoder) if text) or "stock"

    @property
    def lossy(self) -> tuple[str, ...]:
        """What changes the image: candidates that are alike in it differ by rounding."""
        losing = (text for text in self.variant.split("+") if text and not is_exact(text))
        own = ("+".join(losing), self.skip, self.guidance, self.decoder)
        return (*own, str(self.steps), f"{self.sampler}/{self.scheduler}")

    def over(self, base: CellSettings) -> CellSettings:
        """The settings of a cell that runs it."""
        changed = replace(base, steps=self.steps, sampler=self.sampler, plan=self.line).with_sigmas(self.scheduler)
        return changed.with_stack(parse_plan(self.line).techniques)


def is_exact(text: str) -> bool:
    """Whether a technique of a variant changes the image by rounding alone."""
    name, _, options = text.partition("(")
    lossy = ("autocast", "sage", "int8", "fp16_accumulation=on", "tf32=on")
    return name in _EXACT and not any(word in options for word in lossy)


def of_line(line: str, base: CellSettings) -> Candidate:
    """The candidate of a plan line, which may hold `settings(steps=..., sampler=..., scheduler=..., sigmas=...)`.

    Raises SweepTextError, for other settings too: images that are to be compared share them.
    """
    settings = base.with_stack(parse_plan(line).techniques)
    own = [name for name in ("width", "height", "batch", "cfg") if getattr(settings, name) != getattr(base, name)]
    if own:
        raise SweepTextError(
            f"'{line}': Tune keeps your own {', '.join(own)}. A candidate can set steps, sampler, scheduler and sigmas."
        )
    groups: dict[str, list[str]] = {"variant": [], "skip": [], "guidance": []}
    for technique in settings.techniques:
        name = technique.name
        group = "skip" if name in _LEAVES_OUT else "guidance" if name == "dynamic_cfg" else "variant"
        groups[group].append(technique.words())
    if settings.weights is not None:
        groups["variant"].insert(0, settings.weights.words())
    parts = {group: "+".join(texts) for group, texts in groups.items()}
    decoder = "" if settings.decoder == TechniqueText("full") else settings.decoder.words()
    return Candidate(
        **parts, decoder=decoder, steps=settings.steps, sampler=settings.sampler, scheduler=settings.schedule
    )


def space(
    variants: Sequence[str], base: CellSettings, decoders: Sequence[str] = DECODERS,
    steps: Sequence[int] = (), samplers: Sequence[tuple[str, str]] = (),
) -> list[Candidate]:  # fmt: skip
    """Every plan of these variants; with the user's steps fewer plain ones too. `steps` and `samplers` open axes."""
    own = (base.sampler, base.scheduler)
    found = [
        Candidate(variant, skip, guidance, decoder, count, *sampler)
        for variant, skip, guidance, decoder, count, sampler in product(
            variants, SKIPS, GUIDANCES, decoders, steps or (base.steps,), samplers or (own,)
        )
    ]
    return list(dict.fromkeys([*found, *fewer_steps(variants, base, decoders)]))


def fewer_steps(variants: Sequence[str], base: CellSettings, decoders: Sequence[str] = ("",)) -> list[Candidate]:
    """The user's own settings in every exact way, and with fewer plain steps: what each technique has to beat."""
    counts = sorted({max(base.steps * percent // 100, 1) for percent in FEWER_STEPS}, reverse=True)
    own = (base.sampler, base.scheduler)
    return [Candidate(v, "", "", d, count, *own) for v, d, count in product(variants, decoders, counts)]


def counts_of(candidate: Candidate, guided: bool = True, seen: Mapping[str, int] | None = None) -> Counts | None:
    """How many steps of each kind a run has. `guided`: whether it has a negative prompt at all.

    `seen`: forecast steps, by technique, of what decides while it runs; None where that is not known yet.
    """
    steps, kinds = candidate.steps, [FULL] * candidate.steps
    for text in filter(None, candidate.skip.split("+")):
        found = _skipped(text, steps, seen or {})
        if found is None:
            return None
        kind, places = found
        for step in places:
            kinds[step] = kind
    stop = steps
    for text in filter(None, candidate.guidance.split("+")):
        options = _options(text)
        if set(options) - {"stop_at"}:
            return None
        stop = steps_before(float(options.get("stop_at", "0.75")), steps)
    return Counter((kind, guided and (step < stop or kind == FORECAST)) for step, kind in enumerate(kinds))


def _skipped(text: str, steps: int, seen: Mapping[str, int]) -> tuple[str, Iterable[int]] | None:
    name, options = text.partition("(")[0], _options(text)
    if name == "deepcache":
        if set(options) - {*_DEEPCACHE, "schedule", "center", "power", "features"}:
            return None
        options.pop("features", None)  # features are copied or extrapolated at the same steps
        config = DeepCacheConfig(**_typed(options, _DEEPCACHE))
        if config.is_adaptive:
            return None
        sources_of = sources(config, steps)
        return CACHED, [step for step, source in enumerate(sources_of) if source not in (None, step)]
    forecast = ForecastConfig(**_typed(options, _FORECAST))
    if forecast.mode == "fixed":
        return FORECAST, fixed_plan(forecast, steps)
    if text not in seen:
        return None
    # Which steps they are does not matter for their number; in the middle of the run they save both rows.
    share = min(seen[text], max(steps - 6, 0)) if steps >= 10 else 0
    return FORECAST, range(4, 4 + share)


def _options(text: str) -> dict[str, str]:
    technique = parse_plan(text).techniques[0]
    main = MAIN_OPTION.get(technique.name, MAIN)
    return {main if name == MAIN else name: value for name, value in technique.options.items()}


def _typed(options: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Any]:
    words = {"mode", "schedule"}
    whole = {"cache_interval", "cache_branch_id", "max_skip", "center"}
    return {
        names.get(name, name): value if name in words else int(value) if name in whole else float(value)
        for name, value in options.items()
    }


@dataclass(frozen=True)
class VariantParts:
    """What was measured of a variant, in ms: a step of each kind, what a run takes beside all else that is known, and
    its full decode, None where that is not its own. `peak_gb`: memory at its worst, None where the device does not
    tell; `refused`: what it does not go with, and why."""

    steps: Mapping[Kind, float]
    beside: float = 0.0
    peak_gb: float | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    decode: float | None = None


@dataclass(frozen=True)
class Parts:
    """Everything measured once: `text` and `save` in ms, decoders by their text, variants by theirs, `forecast`: a
    forecast step, `seen`: forecast steps of what decides while it runs, `samplers`: how many times as often as the
    user's own sampler others evaluate in a step."""

    text: float
    save: float
    decoders: Mapping[str, float]
    variants: Mapping[str, VariantParts]
    forecast: float = 0.0
    seen: Mapping[str, int] = field(default_factory=dict)
    guided: bool = True
    samplers: Mapping[str, float] = field(default_factory=dict)


def predicted_s(candidate: Candidate, parts: Parts) -> float | None:
    """Seconds from text to saved image; None where a part of it was not measured."""
    variant = parts.variants.get(candidate.variant)
    counts = counts_of(candidate, parts.guided, parts.seen)
    if variant is None or counts is None or candidate.decoder not in parts.decoders:
        return None
    own_decode = None if candidate.decoder else variant.decode
    decode = parts.decoders[candidate.decoder] if own_decode is None else own_decode
    total = parts.text + parts.save + decode + variant.beside
    for kind, count in counts.items():
        ms = parts.forecast if kind[0] == FORECAST else variant.steps.get(kind)
        if ms is None:
            return None
        total += ms * count * parts.samplers.get(candidate.sampler, 1.0)
    return total / 1000.0


def why_not(candidate: Candidate, parts: Parts, budget_gb: float) -> str | None:
    """Why a candidate is dropped before it runs: a refusal, or a budget that it does not fit."""
    variant = parts.variants.get(candidate.variant)
    if variant is None:
        return f"{candidate.variant} cannot run here"
    for text in (candidate.skip, candidate.guidance, candidate.decoder):
        name = text.partition("(")[0]
        if name and name in variant.refused:
            return variant.refused[name]
    return None if variant.peak_gb is None else over_budget(variant.peak_gb, budget_gb)


def over_budget(peak_gb: float, budget_gb: float) -> str | None:
    """Why a peak does not fit a budget, of which 0 is none."""
    if not budget_gb or peak_gb <= budget_gb:
        return None
    return f"{peak_gb:.2f} GB are more than the budget of {budget_gb:g} GB"

"""Technique texts bound to nodes: names and values are checked against a node's own inputs, then the node is applied.

A technique goes through the very node that a user would put into the graph, so a sweep measures nothing of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import SpeedLabError, UnavailableError
from ..models.loading import family_of
from .axes import SIGMAS, CellSettings, number, whole_number
from .plan_text import MAIN, MAIN_OPTION, SweepTextError, TechniqueText

NodeTable = Mapping[str, Any]
_TRUE, _FALSE = ("true", "on", "yes", "1"), ("false", "off", "no", "0")
_SOCKETS = ("MODEL", "CLIP", "VAE")


@dataclass(frozen=True)
class Known:
    """The node behind a technique."""

    node_id: str


TECHNIQUES: Mapping[str, Known] = {
    "attention": Known("SpeedLabAttention"),
    "compile": Known("SpeedLabCompileModel"),
    "compile_vae": Known("SpeedLabCompileVAE"),
    "deepcache": Known("SpeedLabDeepCache"),
    "dynamic_cfg": Known("SpeedLabDynamicCFG"),
    "forecast": Known("SpeedLabForecast"),
    "freeu": Known("FreeU"),
    "memory_plan": Known("SpeedLabMemoryPlan"),
    "precision": Known("SpeedLabPrecision"),
}
DECODERS: Mapping[str, Known] = {"full": Known("SpeedLabVAEDecode"), "tiny": Known("SpeedLabTinyVAEDecode")}
WEIGHTS = Known("SpeedLabCheckpointLoader")
_NOT_OPTIONS = frozenset({"ckpt_name", "samples", "vae", "model", "clip"})


@dataclass(frozen=True)
class Parts:
    """What a cell runs on. Techniques are attached to `model`; the refiner runs as the graph gives it."""

    model: Any
    clip: Any
    vae: Any
    refiner: Any = None
    refiner_clip: Any = None


def sigmas_of(settings: CellSettings, model: Any, nodes: NodeTable) -> Any | None:
    """The sigmas of a cell whose schedule is a node of core's, else None.

    Raises SweepTextError for what that node does not take, UnavailableError without it.
    """
    written = settings.sigmas
    if written is None:
        return None
    return _called(_schedule(written, settings, model), Known(SIGMAS[written.name]), nodes, {"MODEL": model})[0]


def sigmas_node(settings: CellSettings, model: Any, nodes: NodeTable) -> tuple[str, dict[str, Any]] | None:
    """The node of core's that makes a cell's sigmas with its inputs, `model` among them where it takes one; else None.

    Raises as `sigmas_of` does.
    """
    written = settings.sigmas
    if written is None:
        return None
    known = Known(SIGMAS[written.name])
    return known.node_id, _inputs_of(_schedule(written, settings, model), known, nodes, {"MODEL": model})


def _schedule(written: TechniqueText, settings: CellSettings, model: Any) -> TechniqueText:
    options = {**written.options, "steps": str(settings.steps)}
    if written.name == "ays" and not {MAIN, "model_type"} & options.keys():
        options["model_type"] = _trained_as(model)
    return TechniqueText(written.name, options)


def _trained_as(model: Any) -> str:
    """What Align Your Steps was searched for that is nearest to this model."""
    family = family_of(model)
    if not family.startswith(("SD 1", "SD 2", "SDXL")):
        raise UnavailableError(
            f"Align Your Steps knows the steps of SD 1.x, SDXL and SVD, and this model is {family}. Choose one: "
            "ays(model_type=SD1), or another schedule."
        )
    return "SDXL" if family.startswith("SDXL") else "SD1"


def of_core(technique: TechniqueText) -> bool:
    """Whether a technique of the model is a node of ComfyUI's own, which tells no record that it acts."""
    return not TECHNIQUES[technique.name].node_id.startswith("SpeedLab")


def check_techniques(settings: CellSettings, nodes: NodeTable) -> None:
    """Raise SweepTextError for a technique, option or value that no node takes. A missing node is no such error."""
    for technique in settings.techniques:
        if technique.name not in TECHNIQUES:
            names = (*TECHNIQUES, *DECODERS, "weights", "settings")
            close = difflib.get_close_matches(technique.name, names, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise SweepTextError(f"There is no technique '{technique.name}'.{hint} There are {', '.join(names)}.")
        _check(technique, TECHNIQUES[technique.name], nodes)
    if settings.sigmas is not None:
        steps = {**settings.sigmas.options, "steps": str(settings.steps)}
        _check(TechniqueText(settings.sigmas.name, steps), Known(SIGMAS[settings.sigmas.name]), nodes)
    _check(settings.decoder, DECODERS[settings.decoder.name], nodes)
    if settings.weights is not None:
        _check(settings.weights, WEIGHTS, nodes)


def _check(technique: TechniqueText, known: Known, nodes: NodeTable) -> None:
    if known.node_id in nodes:
        options_of(technique, known, nodes)


def options_of(technique: TechniqueText, known: Known, nodes: NodeTable) -> dict[str, Any]:
    """The technique's options in the node's types. Raises SweepTextError, UnavailableError without the node."""
    specs = _inputs(_node_class(technique.name, known, nodes))
    names = [name for name, spec in specs.items() if name not in _NOT_OPTIONS and spec[0] not in _SOCKETS]
    options: dict[str, Any] = {}
    for written, text in technique.options.items():
        name = MAIN_OPTION.get(technique.name, MAIN) if written == MAIN else written
        if name not in names:
            what = f"'{text}' needs the name of an option" if written == MAIN else f"has no option '{name}'"
            raise SweepTextError(f"{technique.words()}: {technique.name} {what}; its options are {', '.join(names)}.")
        options[name] = _value(technique, name, specs[name], text)
    return options


def attach(parts: Parts, technique: TechniqueText, nodes: NodeTable) -> Parts:
    """The parts with one technique more. Raises UnavailableError without its node, and what the node raises."""
    known = TECHNIQUES[technique.name]
    have = {"MODEL": parts.model, "CLIP": parts.clip, "VAE": parts.vae}
    outputs = _called(technique, known, nodes, have)
    for kind, value in zip(_node_class(technique.name, known, nodes).RETURN_TYPES, outputs, strict=False):
        if kind in have:
            parts = replace(parts, **{kind.lower(): value})
    return parts


def _called(technique: TechniqueText, known: Known, nodes: NodeTable, have: Mapping[str, Any]) -> Any:
    """What the node gives."""
    cls = _node_class(technique.name, known, nodes)
    try:
        result = getattr(cls(), cls.FUNCTION)(**_inputs_of(technique, known, nodes, have))
    except ValueError as error:
        raise SpeedLabError(f"{technique.words()}: {error}") from error
    return result["result"] if isinstance(result, dict) else getattr(result, "result", result)


def _inputs_of(technique: TechniqueText, known: Known, nodes: NodeTable, have: Mapping[str, Any]) -> dict[str, Any]:
    """The node's inputs: the technique's options, defaults for the others, and `have` in its sockets."""
    specs = _inputs(_node_class(technique.name, known, nodes))
    values = {name: default for name, spec in specs.items() if (default := _default(spec)) is not None}
    values |= options_of(technique, known, nodes)
    return values | {
        name: have[spec[0]] for name, spec in specs.items() if isinstance(spec[0], str) and spec[0] in have
    }


def attach_all(parts: Parts, settings: CellSettings, nodes: NodeTable) -> Parts:
    """The parts with every technique of the settings, in order. Raises as `attach` does."""
    for technique in settings.techniques:
        # A VAE that is not used has no place in a memory plan.
        alone = technique.name == "memory_plan" and settings.decoder.name == "tiny"
        made = attach(replace(parts, vae=None) if alone else parts, technique, nodes)
        parts = replace(made, vae=parts.vae) if alone else made
    return parts


def _node_class(name: str, known: Known, nodes: NodeTable) -> Any:
    cls = nodes.get(known.node_id)
    if cls is None:
        raise UnavailableError(
            f"The technique '{name}' is the node {known.node_id}, which this ComfyUI does not have. Update SpeedLab or "
            "ComfyUI, or leave the technique out."
        )
    return cls


def _inputs(cls: Any) -> dict[str, Any]:
    types = cls.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def _default(spec: Any) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    choices = _choices(spec)
    return options.get("default", choices[0] if choices else None)


def _choices(spec: Any) -> list[Any] | None:
    if isinstance(spec[0], (list, tuple)):
        return list(spec[0])
    return list(spec[1].get("options", [])) if spec[0] == "COMBO" and len(spec) > 1 else None


def _value(technique: TechniqueText, name: str, spec: Any, text: str) -> Any:
    what = f"{name} in {technique.words()}"
    choices = _choices(spec)
    if choices is not None:
        if text not in choices:
            raise SweepTextError(f"'{text}' is no choice for {what}: choose {', '.join(map(str, choices))}.")
        return text
    if spec[0] == "BOOLEAN":
        if text.lower() not in (*_TRUE, *_FALSE):
            raise SweepTextError(f"'{text}' for {what} is neither true nor false.")
        return text.lower() in _TRUE
    if spec[0] not in ("INT", "FLOAT"):
        return text
    value = whole_number(text, what) if spec[0] == "INT" else number(text, what)
    limits = spec[1] if len(spec) > 1 else {}
    low, high = limits.get("min"), limits.get("max")
    if (low is not None and value < low) or (high is not None and value > high):
        raise SweepTextError(f"{what} is out of range: choose {low} to {high}.")
    return value

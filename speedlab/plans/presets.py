"""Accelerate: a whole plan put on model, text encoder and VAE, as the nodes of its techniques do it one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..common.core import output_directory, prompt_that_runs
from ..common.errors import SpeedLabError
from ..measure.context import NodeContext
from ..measure.environment import environment
from ..measure.store import RunStore
from ..models.loading import family_of
from ..techniques.compile.attach import fastest_here
from ..vae import decode as decoding
from ..vae import taesd
from . import tuned
from .axes import CellSettings
from .cell import Reloader
from .plan_text import PRESETS, SweepTextError, TechniqueText, parse_plan
from .techniques import DECODERS, WEIGHTS, NodeTable, Parts, attach_all, check_techniques, options_of

TUNED, CUSTOM = "tuned", "custom"
CHOICES = (*PRESETS, TUNED, CUSTOM)
_PLACED = TechniqueText("memory_plan", {"": "auto"})


@dataclass(frozen=True)
class Accelerated:
    """The parts with the plan on them, the plan as it was applied, and what the user has to know of it."""

    parts: Parts
    line: str
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What the node shows."""
        return "\n".join((self.line, *self.notes))


def accelerate(
    parts: Parts, preset: str, custom: str, compiled: bool, nodes: NodeTable, context: NodeContext
) -> Accelerated:
    """Put a preset, the tuned plan or a plan line on the parts; clip and vae may be None.

    Raises SweepTextError for a line that cannot be read, SpeedLabError without a tuned plan, and what the nodes raise.
    """
    notes: list[str] = []
    if preset != TUNED:
        return _applied(parts, _parsed(PRESETS.get(preset, custom)), preset in PRESETS, compiled, nodes, notes)
    env = environment(parts.model.load_device)
    store = RunStore(output_directory())
    found = tuned.find(store, str(env["device"]), family_of(parts.model), tuned.wanted_by(context))
    notes += tuned.notes_of(found, env)
    try:
        return _applied(parts, _parsed(found.plan), False, compiled, nodes, notes)
    except SpeedLabError as error:
        raise type(error)(
            f"The tuned plan {found.plan} cannot be applied: {error} Run Tune again, or choose another preset."
        ) from error


def _applied(
    parts: Parts, settings: CellSettings, placed: bool, compiled: bool, nodes: NodeTable, notes: list[str]
) -> Accelerated:
    """The settings on the parts; `placed`: with a memory plan where there are all parts for one."""
    names = {technique.name for technique in settings.techniques}
    if compiled and "compile" in names:
        notes.append("The plan compiles by itself; the switch adds nothing.")
    elif compiled:
        # A program of the whole network has its own attention.
        options = fastest_here(parts.model, "attention" in names)
        settings = settings.with_technique(TechniqueText("compile", options))
    if placed and parts.clip is not None and parts.vae is not None:
        settings = settings.with_technique(_PLACED)
    check_techniques(settings, nodes)
    decoder = settings.decoder
    if parts.vae is None and decoder != TechniqueText("full"):
        notes.append(f"{decoder.words()} is left out: no VAE is connected.")
        settings = replace(settings, decoder=TechniqueText("full"))
    if settings.weights is not None:
        wanted = options_of(settings.weights, WEIGHTS, nodes)
        parts = Reloader(parts).parts_in(wanted.get("precision", "auto"), wanted.get("memory_format"))
    parts = attach_all(parts, settings, nodes)
    if settings.decoder != TechniqueText("full"):
        parts = replace(parts, vae=_decoding(parts, settings.decoder, nodes))
    return Accelerated(parts, line_of(settings), tuple(notes))


def changed(preset: str, node_id: Any) -> Any:
    """Another text where the same preset may stand for another plan; NaN, which is never the same, where that is not
    known. What samples behind the node chooses the plan, and is none of its inputs.
    """
    if preset in PRESETS or preset == CUSTOM:
        return ""
    prompt = prompt_that_runs()
    if prompt is None:
        return float("nan")  # math.nan is one object, which ComfyUI's keys take for the same
    wanted = tuned.wanted_by(NodeContext.of(prompt, None, node_id))
    return f"{tuned.state(RunStore(output_directory()))} {sorted(wanted.items())}"


def line_of(settings: CellSettings) -> str:
    """What settings attach, as a plan line."""
    return "+".join(settings.accelerators()) or "stock"


def _parsed(line: str) -> CellSettings:
    written = [text for text in line.splitlines() if text.strip()]
    if len(written) != 1:
        raise SweepTextError(
            "The preset custom takes one plan line from the input custom, such as "
            f"deepcache(3)+dynamic_cfg(0.75)+tiny; there are {len(written)}."
        )
    techniques = parse_plan(written[0]).techniques
    sampler = next((technique for technique in techniques if technique.name == "settings"), None)
    if sampler is not None:
        raise SweepTextError(
            f"Accelerate cannot set {sampler.words()}: steps, size and sampler stand on other nodes. Set them there, "
            "and leave settings out of the plan."
        )
    return CellSettings().with_stack(techniques)


def _decoding(parts: Parts, decoder: TechniqueText, nodes: NodeTable) -> Any:
    """The VAE of a plan whose decoder is not core's: core's nodes decode with it as the pack's node does."""
    options = options_of(decoder, DECODERS[decoder.name], nodes)
    if decoder.name == "tiny":
        return taesd.tiny_vae(parts.vae, taesd.TinyDecodeConfig(**options), parts.model)
    return decoding.vae_of(parts.vae, decoding.DecodeConfig(**options), decoder.words())

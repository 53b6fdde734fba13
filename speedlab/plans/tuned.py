"""The plans that Tune found, one file each, by what they were found for: device, family, size, sampler."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import SpeedLabError
from ..measure.context import NodeContext, class_of, inputs_of, link_of
from ..measure.store import RunStore, cannot_write, write_atomically
from .axes import SIGMAS

log = logging.getLogger(__name__)

SCHEMA = 1
# With another one of these a plan was measured on other software, and may no longer be the fastest.
_VERSIONS = ("torch", "comfyui", "speedlab")


@dataclass(frozen=True)
class TunedFor:
    """What a plan was found for."""

    device: str
    family: str
    width: int
    height: int
    batch: int
    sampler: str
    scheduler: str

    def words(self) -> str:
        """`512x512, batch 1, euler/normal`."""
        return f"{self.width}x{self.height}, batch {self.batch}, {self.sampler}/{self.scheduler}"


@dataclass(frozen=True)
class TunedPlan:
    """`plan` is what Accelerate can apply; `settings` what the user sets on the sampler beside it (fewer steps, say);
    `versions` the software that it was measured on, `figures` what was found, `made` the time in seconds.
    """

    tuned_for: TunedFor
    plan: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    made: float = 0.0
    schema: int = SCHEMA


def versions_of(env: Mapping[str, Any]) -> dict[str, str]:
    """The versions, of an environment, that a tuned plan holds for."""
    return {name: str(env.get(name)) for name in _VERSIONS}


def folder_of(store: RunStore) -> Path:
    """Where the tuned plans lie."""
    return store.root / "tuned"


def state(store: RunStore) -> str:
    """Another text after each change of the tuned plans."""
    found = sorted(folder_of(store).glob("*.json"))
    return ",".join(f"{path.name}:{path.stat().st_mtime_ns}" for path in found)


def keep(store: RunStore, plan: TunedPlan) -> Path:
    """Write a plan in place of the one that was found for the same before. Raises ResultsError naming the path."""
    key = json.dumps(asdict(plan.tuned_for), sort_keys=True)
    path = folder_of(store) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        store.refuse_symlink_out()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(plan), indent=2).encode())
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def confirmed_before(store: RunStore, plan: TunedPlan) -> TunedPlan | None:
    """A confirmed plan found for the very same as one that is not, which is not worth its loss."""
    same = ("quality", "checkpoint", "steps", "cfg", "asked")
    # Of a model whose file is not known nothing tells that it is the same one.
    for known in read_all(store) if plan.figures.get("checkpoint") else ():
        if (
            (known.tuned_for, dict(known.versions)) == (plan.tuned_for, dict(plan.versions))
            and known.figures.get("confirmed") is True
            and all(known.figures.get(name) == plan.figures.get(name) for name in same)
        ):
            return known
    return None


def read_all(store: RunStore) -> list[TunedPlan]:
    """Every plan that can be read, the newest first; the others are named in the log."""
    plans = []
    for path in sorted(folder_of(store).glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.get("schema") != SCHEMA:
                log.warning("SpeedLab: %s was written by another version of SpeedLab: run Tune again.", path)
                continue
            plan = TunedPlan(**{**data, "tuned_for": TunedFor(**data["tuned_for"])})
            # A file that another program wrote may hold anything.
            named = all(isinstance(part, dict) for part in (plan.settings, plan.versions, plan.figures))
            if not (named and isinstance(plan.plan, str) and isinstance(plan.made, (int, float))):
                raise TypeError("a field of it is of another type")
            plans.append(plan)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            log.warning("SpeedLab: %s is no tuned plan (%s): delete it, or run Tune again.", path, error)
    return sorted(plans, key=lambda plan: plan.made, reverse=True)


def find(store: RunStore, device: str, family: str, wanted: Mapping[str, Any]) -> TunedPlan:
    """The newest plan for a device and family that has the `wanted` size and sampler, as far as these are known.

    Raises SpeedLabError where there is none, with what there is.
    """
    plans = read_all(store)
    mine = [plan for plan in plans if (plan.tuned_for.device, plan.tuned_for.family) == (device, family)]
    for followed in (False, True):
        for plan in mine:
            if _fits(plan, wanted, followed):
                return plan
    asked = f" with {', '.join(f'{name} {value}' for name, value in wanted.items())}" if wanted else ""
    there = "; ".join(plan.tuned_for.words() for plan in mine)
    elsewhere = sorted({f"{plan.tuned_for.family} on {plan.tuned_for.device}" for plan in plans if plan not in mine})
    raise SpeedLabError(
        f"There is no tuned plan for {family} on {device}{asked}: run Tune with this checkpoint, size and sampler, or "
        "choose another preset."
        + (f" There are plans for {there}." if there else "")
        + (f" Those of {', '.join(elsewhere)} are for others." if elsewhere else "")
    )


def _fits(plan: TunedPlan, wanted: Mapping[str, Any], followed: bool) -> bool:
    """Whether what samples is what the plan was found for; `followed`: with what the plan wants to be set there."""
    own = {**asdict(plan.tuned_for), **(plan.settings if followed else {})}
    # A schedule of a node of its own is known by its name, without its options.
    return all(str(value) in (str(own[name]), str(own[name]).partition("(")[0]) for name, value in wanted.items())


def notes_of(plan: TunedPlan, env: Mapping[str, Any]) -> list[str]:
    """What a user has to know of a plan that is taken: what it is for, what to set beside it, whether it is stale."""
    notes = [f"Tuned for {plan.tuned_for.words()}."]
    if plan.settings:
        named = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
        notes.append(f"Set {named} on the sampler: the plan was found with that.")
    if plan.figures.get("confirmed") is False:
        notes.append("This plan is not confirmed on held-out seeds, because its tune was cut off: run Tune again.")
    if plan.figures.get("synthetic"):
        notes.append("It was found with random weights, with which a distance says nothing: run Tune with your own.")
    now = versions_of(env)
    changed = [f"{name} {old}, now {now[name]}" for name, old in plan.versions.items() if now.get(name, old) != old]
    if changed:
        notes.append(f"This plan is stale, measured with {', '.join(changed)}: run Tune again.")
    return notes


def wanted_by(context: NodeContext) -> dict[str, Any]:
    """Size and sampler of what samples behind a node, as far as the prompt tells them and all agree."""
    ids = [node_id for node_id in context.samplers(context.graph) if context.node_id in context.upstream(node_id)]
    found: dict[str, set[Any]] = {}
    for node_id in ids:
        # Core's custom samplers take sampler and schedule from nodes of their own.
        values = [
            *(_told(context, node_id, "sampler", "sampler_name") or [("sampler", None)]),
            *(_told(context, node_id, "sigmas", "scheduler") or _schedules(context, node_id) or [("scheduler", None)]),
        ]
        for source in context.upstream(node_id, ("latent_image", "latent")):
            if {"width", "height"} <= inputs_of(context.graph.get(source)).keys():
                sizes = {"width": "width", "height": "height", "batch_size": "batch"}
                values += [(name, _value(context, source, key, int)) for key, name in sizes.items()]
        for name, value in values:
            found.setdefault(name, set()).add(value)
    return {name: next(iter(values)) for name, values in found.items() if len(values) == 1 and None not in values}


def _told(context: NodeContext, node_id: str, link: str, name: str) -> list[tuple[str, Any]]:
    """What a node, or those that feed its input `link`, have as the input `name`."""
    # A schedule is made of a model, in front of which another sampler may stand.
    others = set(context.samplers(context.graph)) - {node_id}
    return [
        (name.removesuffix("_name"), _value(context, source, name, str))
        for source in context.upstream(node_id, (link,))
        if source not in others and name in inputs_of(context.graph.get(source))
    ]


def _schedules(context: NodeContext, node_id: str) -> list[tuple[str, Any]]:
    """The schedule of a node of core's that makes sigmas, as settings of a plan name it."""
    names = {node: name for name, node in SIGMAS.items()}
    kinds = [class_of(context.graph.get(source)) for source in context.upstream(node_id, ("sigmas",))]
    return [("scheduler", names[kind]) for kind in kinds if kind in names]


def _value(context: NodeContext, node_id: str, name: str, kind: type) -> Any:
    """An input's value, also where a node that holds nothing but a value feeds it; None where it is not known."""
    value = inputs_of(context.graph.get(node_id)).get(name)
    link = link_of(value)
    if link is not None:
        inputs = inputs_of(context.graph.get(link[0]))
        value = inputs.get("value") if inputs.keys() == {"value"} else None
    return value if isinstance(value, kind) else None

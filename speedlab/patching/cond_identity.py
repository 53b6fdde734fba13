"""Which conds an evaluation has: a name of its own for each, and what tells one set of them from another.

Where prompts have areas, ComfyUI gives the negative prompt a copy for each area, and that copy bears the uuid of the
positive cond there: the two are then alike in all that a forward gets to see.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

Conds = list[list[dict[str, Any]] | None]


def with_unique_uuids(conds: Conds) -> Conds:
    """`conds` itself where all uuids differ, else a copy in which each later bearer of a uuid has one made from it.

    The new uuid depends on the place among all conds of the run, active or not, so that it is the same at every step.
    """
    seen: Counter[Any] = Counter()
    renamed: Conds = []
    for group in conds:
        if group is None:
            renamed.append(None)
            continue
        names = []
        for cond in group:
            names.append(_numbered(cond, seen[cond.get("uuid")]))
            seen[cond.get("uuid")] += 1
        renamed.append(names)
    return renamed if any(count > 1 for count in seen.values()) else conds


def _numbered(cond: dict[str, Any], number: int) -> dict[str, Any]:
    name = cond.get("uuid")
    if number == 0 or not isinstance(name, uuid.UUID):
        return cond
    return {**cond, "uuid": uuid.uuid5(name, str(number))}


def active_parts(group: Iterable[Mapping[str, Any]], sigma: float) -> tuple[Hashable, ...]:
    """What a group of conds is made of at `sigma`: the conds whose range holds it, each with its ControlNets that act.

    As ComfyUI's get_area_and_mult decides it, whose range of timesteps is one of sigmas.
    """
    return tuple(
        (cond.get("uuid"), _acting_controls(cond.get("control"), sigma))
        for cond in group
        if not (sigma > cond.get("timestep_start", sigma) or sigma < cond.get("timestep_end", sigma))
    )


def _acting_controls(control: Any, sigma: float) -> tuple[bool, ...]:
    acting = []
    while control is not None:
        start, end = getattr(control, "timestep_range", None) or (sigma, sigma)
        acting.append(end <= sigma <= start)
        control = getattr(control, "previous_controlnet", None)
    return tuple(acting)


def scheduled_hooks(guider: Any) -> str | None:
    """Why predictions of one step say little of the next one's, where a LoRA changes its strength during the run."""
    for conds in (getattr(guider, "conds", None) or {}).values():
        for cond in conds or ():
            for hook in getattr(cond.get("hooks"), "hooks", ()):
                frames = getattr(getattr(hook, "hook_keyframe", None), "keyframes", ())
                if len(frames) > 1 or any(frame.start_percent > 0.0 for frame in frames):
                    return "a LoRA hook with keyframes changes the model during the run"
    return None

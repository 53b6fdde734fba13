"""A name of its own for every cond of an evaluation.

Where prompts have areas, ComfyUI gives the negative prompt a copy for each area, and that copy bears the uuid of the
positive cond there: the two are then alike in all that a forward gets to see.
"""

from __future__ import annotations

import uuid
from collections import Counter
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

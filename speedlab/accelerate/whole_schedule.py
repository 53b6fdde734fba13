"""Where the steps of one run stand in the schedule that they were cut from.

ComfyUI's samplers, its schedulers and SplitSigmas cut a partial run (denoise below 1, start_at_step, end_at_step) out
of the whole schedule as a view of one tensor, so the whole is still there behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Part(NamedTuple):
    """The run's first step is step `first` of the `total` steps of the whole schedule."""

    first: int
    total: int


def part_of(sigmas: torch.Tensor) -> Part:
    """The place of `sigmas` [steps + 1] in the schedule behind it; a schedule of its own where none can be told."""
    own = Part(0, len(sigmas) - 1)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas.stride(0) != 1:
        return own
    storage = sigmas.untyped_storage()
    entries, rest = divmod(storage.nbytes(), sigmas.element_size())
    if rest or entries <= len(sigmas):
        return own
    whole = torch.as_strided(sigmas, (entries,), (1,), 0).detach().double().cpu()
    first = int(sigmas.storage_offset())
    end = first + own.total
    # KSampler (Advanced) sets the last sigma of a run that ends early to 0, in the whole schedule too.
    kept = torch.cat([whole[:end], whole[end + 1 :]]) if whole[end] == 0 else whole
    falls = bool(torch.isfinite(whole).all() and (kept.diff() <= 0).all() and whole[0] > whole[-1])
    return Part(first, entries - 1) if falls else own

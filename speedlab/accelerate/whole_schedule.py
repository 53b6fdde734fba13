"""Where the steps of one run stand in the schedule that they were cut from.

ComfyUI's samplers, its schedulers and SplitSigmas cut a partial run (denoise below 1, start_at_step, end_at_step) out
of the whole schedule as a view of one tensor, so the whole is still there behind it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Part(NamedTuple):
    """The run's first step is step `first` of the `total` steps of the whole schedule."""

    first: int
    total: int


# The largest sigma of a model and the first one of a scheduler differ by less; an img2img run starts far below.
_STARTS_AT = 0.9
# FlipSigmas writes 0.0001 where a schedule ended in 0, and UniPC 0.001, also into the sigmas that it was given.
_LAST = 0.00101


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
    whole = _without_padding(whole, end)
    # KSampler (Advanced) sets the last sigma of a run that ends early to 0, in the whole schedule too.
    kept = torch.cat([whole[:end], whole[end + 1 :]]) if whole[end] == 0 else whole
    if not torch.isfinite(whole).all():
        return own
    falls = bool((kept.diff() <= 0).all() and whole[0] > whole[-1] >= 0)
    rises = bool((whole.diff() >= 0).all() and whole[-1] > whole[0] >= 0)
    return Part(first, len(whole) - 1) if falls or rises else own


def is_cut(sigmas: torch.Tensor) -> bool:
    """Whether something that is not 0 lies before or behind `sigmas`, of which `part_of` may make nothing."""
    if sigmas.stride(0) != 1:
        return False
    entries, rest = divmod(sigmas.untyped_storage().nbytes(), sigmas.element_size())
    if rest or entries <= len(sigmas):
        return False
    stored = torch.as_strided(sigmas, (entries,), (1,), 0).detach()
    first = int(sigmas.storage_offset())
    return bool((stored[:first] != 0).any() or (stored[first + len(sigmas) :] != 0).any())


def _without_padding(whole: torch.Tensor, end: int) -> torch.Tensor:
    """`whole` without the zeros behind its last step, as a buffer has them that is larger than its schedule.

    `end` is the last entry of the run. One zero behind a run that ends in 0 is no padding: such a run ends a step
    early, and KSampler (Advanced) wrote its own 0.
    """
    positive = torch.nonzero(whole != 0).flatten()
    zeros = int(positive[-1]) + 1 if len(positive) else 0
    if zeros <= end == len(whole) - 2:
        return whole
    return whole[: max(end, min(zeros, len(whole) - 1)) + 1]


def is_whole(sigmas: torch.Tensor, model_sampling: Any) -> bool:
    """Whether `sigmas` run from end to end of a model's sigmas, so that nothing lies before or behind them.

    From the largest to 0, or back as FlipSigmas turns them, or there and back.
    """
    first, last = (float(sigma) for sigma in (sigmas[0], sigmas[-1]))
    largest = getattr(model_sampling, "sigma_max", None)
    if largest is None:
        return last <= _LAST or first <= _LAST
    top = _STARTS_AT * float(largest)
    if last <= _LAST:
        return first >= top or first <= _LAST or _starts_lower(first, len(sigmas), model_sampling)
    return last >= top and (first <= _LAST or (first >= top and float(sigmas.min()) < top))


def _starts_lower(first: float, count: int, model_sampling: Any) -> bool:
    """Whether a whole schedule of ddim_uniform starts there: the one scheduler of ComfyUI that starts far below."""
    if not hasattr(model_sampling, "sigmas"):
        return False
    from comfy.samplers import ddim_scheduler

    # With few steps ddim_uniform gives a step more than was asked for, or one less.
    starts = (float(ddim_scheduler(model_sampling, steps)[0]) for steps in (count - 2, count - 1, count) if steps > 0)
    return any(abs(first - start) <= 1e-4 * start for start in starts)

"""DeepCache in its plainest form: every block runs at every step, and what the cached part yields is then replaced.

A cached step's result depends on its outer blocks and on the kept features alone, so a full forward of ComfyUI's own,
in which the features are put in place at the same spot, must give the same image, whatever is patched in.
"""

from __future__ import annotations

from typing import Any

import torch


def with_oracle(tiny: Any, model: Any, *, interval: int = 3, branch: int = 0, first: int = 0, end: int = 10**6) -> Any:
    """A clone of `model` for one single run in which steps `first` <= step < `end` are cached."""
    from comfy.patcher_extension import WrappersMP

    place = ("output", len(tiny.unet.output_blocks) - 1 - branch)
    kept: dict[tuple, dict[int, torch.Tensor]] = {}

    def wrapper(executor: Any, x: Any, t: Any, context: Any, y: Any, control: Any, options: dict, **kwargs: Any) -> Any:
        step = _step(options)
        uuids = options["uuids"]
        # A guidance that evaluates a cond twice does it with more attention layers replaced.
        replaced = sum(len(places) for places in options.get("patches_replace", {}).values())

        def swap(h: torch.Tensor, skip: torch.Tensor, extra: dict) -> tuple[torch.Tensor, torch.Tensor]:
            if extra["block"] != place or not first <= step < end:
                return h, skip
            keys = [(uuid, replaced) for uuid in uuids]
            source = step - (step - first) % interval
            # Another cache may have left out the full step; what is older than that is stale. A sampler that looks
            # ahead has later steps' features, too.
            newest = [max((n for n in kept.get(key, ()) if source <= n <= step), default=None) for key in keys]
            if step == source or None in newest:
                for key, part in zip(keys, h.chunk(len(keys)), strict=True):
                    kept.setdefault(key, {})[step] = part.clone()
                return h, skip
            return torch.cat([kept[key][n] for key, n in zip(keys, newest, strict=True)]), skip

        patches = dict(options.get("patches", {}))
        patches["output_block_patch"] = [swap, *patches.get("output_block_patch", [])]
        return executor(x, t, context, y, control, {**options, "patches": patches}, **kwargs)

    def name_areas(executor: Any, base: Any, conds: list, *args: Any) -> Any:
        # ComfyUI gives the negative prompt's copy for an area the uuid of the positive cond there.
        return executor(base, [group and [_named(cond, n) for cond in group] for n, group in enumerate(conds)], *args)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "oracle", name_areas)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "oracle", wrapper)
    return clone


def _named(cond: dict, group: int) -> dict:
    return {**cond, "uuid": (cond["uuid"], group)}


def _step(options: dict) -> int:
    sigmas, sigma = options["sample_sigmas"][:-1], options["sigmas"][0] * (1 - 1e-5)
    return max(int((sigmas >= sigma).sum()) - 1, 0)

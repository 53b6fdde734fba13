"""How many FLOPs a plan's sampling costs, counted on the real UNet, and so the most that it can gain."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from accelerate_jobs import Plan


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one row (one cond, batch 1) of a full and of a cached evaluation."""

    full: int
    cached: int

    def of(self, plan: Plan, steps: int) -> int:
        """FLOPs of `steps` Euler steps."""
        schedule = importlib.import_module("speedlab.techniques.deepcache.schedule")
        fractions = importlib.import_module("speedlab.patching.schedule")
        sources = schedule.sources(schedule.DeepCacheConfig(interval=plan.interval), steps)
        with_uncond = fractions.steps_before(plan.stop_at, steps)
        return sum(
            (2 if step < with_uncond else 1) * (self.full if source in (None, step) else self.cached)
            for step, source in enumerate(sources)
        )

    def limit(self, plan: Plan, steps: int) -> float:
        """The largest possible speed-up of the plan over an evaluation of everything at every step."""
        return self.of(Plan(), steps) / self.of(plan, steps)


def count(unet: Any, size: int) -> ForwardCost:
    """Counts one row at `size` pixels: a full forward, and one of the outermost blocks (branch 0) alone."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    forward = importlib.import_module("speedlab.techniques.deepcache.forward")
    side = size // 8
    x, timestep, context = torch.randn(1, 4, side, side), torch.tensor([500.0]), torch.randn(1, 77, 768)
    kept: list[Any] = []

    def keep(h: Any, skip: Any, options: dict) -> tuple[Any, Any]:
        if options["block"] == ("output", forward.cut(unet, 0)):
            kept.append(h.clone())
        return h, skip

    def counted(function: Any, options: dict[str, Any]) -> int:
        # As matrix products the counter sees all of an attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            function({**options, "optimized_attention_override": _plain_attention})
        return int(counter.get_total_flops())

    full = counted(
        lambda options: unet(x, timestep, context, transformer_options=options),
        {"patches": {"output_block_patch": [keep]}},
    )
    cached = counted(
        lambda options: forward.shallow_forward(unet, 0, kept[0], x, timestep, context, None, None, options), {}
    )
    return ForwardCost(full, cached)


def _plain_attention(function: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
    import comfy.ldm.modules.attention as core

    kwargs.pop("transformer_options", None)
    return core.attention_pytorch(q, k, v, heads, *args, **kwargs)

"""DeepCache in its plainest form: every block runs at every step, and what the cached part yields is then replaced.

A cached step's result depends on its outer blocks and on the kept features alone, so a full forward of ComfyUI's own,
in which the features are put in place at the same spot, must give the same image, whatever is patched in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


def with_oracle(
    tiny: Any, model: Any, *, interval: int = 3, branch: int = 0, first: int = 0, end: int = 10**6, unseen: bool = False
) -> Any:
    """A clone of `model` for one single run in which steps `first` <= step < `end` are cached.

    `unseen`: what replaces attention of the blocks that are left out does not see them.
    """
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

        if unseen and step % interval:
            options = {**options, "patches_replace": {}}
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


@dataclass
class PlainCache:
    """One run with a line through features, or with steps chosen by their errors: loops over latents, in fp64.

    `tolerance` None: every `interval`-th step in full. `by_line`: features are continued, not copied. From step
    `alone_from` on uncond is not used, so that its errors do not count.
    """

    tiny: Any
    interval: int = 3
    branch: int = 1
    tolerance: float | None = None
    by_line: bool = False
    cfg: float = 5.0
    alone_from: float = math.inf
    cached: set[int] = field(default_factory=set)
    passes: int = 0
    seen: set[int] = field(default_factory=set)
    kept: dict[Any, dict[int, tuple[float, torch.Tensor, list[tuple[float, float]] | None]]] = field(
        default_factory=dict
    )
    errors: dict[int, list[tuple[float, float, float | None]]] = field(default_factory=dict)
    spent: float = 0.0
    # What the network is given, of the evaluation that runs.
    inputs: Any = None

    def forward(
        self, executor: Any, x: Any, t: Any, context: Any, y: Any, control: Any, options: dict, **more: Any
    ) -> torch.Tensor:
        def run(swapped: dict[Any, torch.Tensor] | None) -> tuple[torch.Tensor, dict[Any, torch.Tensor]]:
            found = {}

            def swap(h: torch.Tensor, skip: torch.Tensor, extra: dict) -> tuple[torch.Tensor, torch.Tensor]:
                if extra["block"] != ("output", len(self.tiny.unet.output_blocks) - 1 - self.branch):
                    return h, skip
                found.update(zip(keys, (part.clone() for part in h.chunk(len(keys))), strict=True))
                return (h if swapped is None else torch.cat([swapped[key].to(h.dtype) for key in keys])), skip

            patches = {**options.get("patches", {})}
            patches["output_block_patch"] = [swap, *patches.get("output_block_patch", [])]
            lists = None if control is None else {key: list(value) for key, value in control.items()}
            return executor(x, t, context, y, lists, {**options, "patches": patches}, **more), found

        sigmas, sigma, step = [float(s) for s in options["sample_sigmas"]], float(options["sigmas"][0]), _step(options)
        # A guidance that evaluates a cond twice does it with more attention layers replaced.
        replaced = sum(len(places) for places in options.get("patches_replace", {}).values())
        keys, place = [(uuid, replaced) for uuid in options["uuids"]], -math.log(sigma)
        if step not in self.seen:
            self.seen.add(step)
            if self.decides(step, sigmas):
                self.cached.add(step)
        if step in self.cached and all(self.before(key, step + 1) for key in keys):
            return run({key: self.predicted(key, step + 1, place)[0] for key in keys})[0]
        ends = step + 2 >= len(sigmas)
        guesses = {key: self.predicted(key, step, place) for key in keys if self.before(key, step)}
        cached = None
        if self.tolerance is not None and len(guesses) == len(keys) and not ends:
            self.passes += 1
            cached = run({key: guess[0] for key, guess in guesses.items()})[0]
        full, found = run(None)
        if cached is not None:
            self.measure(step, sigma, options["cond_or_uncond"], full, cached, [guesses[key] for key in keys])
        for key in keys:
            self.keep(key, step, place, found[key])
        return full

    def before(self, key: Any, step: int) -> list[int]:
        """The last two steps before `step` whose features are there."""
        return sorted(known for known in self.kept.get(key, {}) if known < step)[-2:]

    def predicted(
        self, key: Any, step: int, place: float, as_it_holds: bool = True
    ) -> tuple[torch.Tensor, float, float | None]:
        *older, newest = self.before(key, step)
        new_place, new, lasts = self.kept[key][newest]
        if not self.by_line or not older or place - new_place <= 1e-5:
            return new, place - new_place, None
        old_place, old, _ = self.kept[key][older[0]]
        if old.shape != new.shape:  # of a node that shrinks the inner blocks
            return new, place - new_place, None
        rows = []
        for row in range(len(new)):
            share, holds = (0.5, 1.0) if lasts is None else lasts[row]
            share *= holds if as_it_holds else 1.0
            slope = (new[row].double() - old[row].double()) / (new_place - old_place)
            rows.append(new[row].double() + share * (place - new_place) * slope)
        return torch.stack(rows), place - new_place, new_place - old_place

    def keep(self, key: Any, step: int, place: float, found: torch.Tensor) -> None:
        lasts, known = None, self.before(key, step)
        shapes = {self.kept[key][one][1].shape for one in known} | {found.shape}
        if len(known) == 2 and place - self.kept[key][known[1]][0] > 1e-5 and len(shapes) == 1:
            (old_place, old, _), (new_place, new, _) = (self.kept[key][one] for one in known)
            line, _, _ = self.predicted(key, step, place, as_it_holds=False)
            lasts = []
            for row in range(len(new)):
                true = found[row].double()
                before = ((new[row].double() - old[row].double()) / (new_place - old_place)).flatten()
                behind = ((true - new[row].double()) / (place - new_place)).flatten()
                share = 0.83 * min(max(float(before @ behind) / float(before @ before), 0.0), 1.0)
                is_closer = float((true - line[row]).norm()) < float((true - new[row].double()).norm())
                lasts.append((share, float(is_closer)))
        self.kept.setdefault(key, {})[step] = (place, found, lasts)

    def decides(self, step: int, sigmas: list[float]) -> bool:
        if self.tolerance is None:
            return step % self.interval != 0
        last = max((known for known in self.seen if known < step and known not in self.cached), default=-1)
        if last < 0 or step - last >= self.interval or last not in self.errors:
            self.spent = 0.0
            return False
        if step - last == 1:
            self.spent = 0.0
        distance = math.log(sigmas[last]) - math.log(sigmas[step])
        expected = []
        for error, reach, base in self.errors[last]:
            expected.append(error * distance / reach)
            if base is not None:
                expected.append(error * distance * (distance + reach) / (reach * (reach + base)))
        self.spent += 1.5 * (1 - sigmas[step + 1] / sigmas[step]) * max(expected)
        if self.spent <= self.tolerance:
            return True
        self.spent = 0.0
        return False

    def measure(
        self, step: int, sigma: float, kinds: list[int], full: torch.Tensor, cached: torch.Tensor, guesses: list
    ) -> None:
        """Of an epsilon model: the denoised latent is the noisy one minus sigma times the model's output."""
        scale = (sigma**2 + 1.0) ** 0.5
        noisy = {kind: part.double() * scale for kind, part in zip(kinds, self.inputs.chunk(len(kinds)), strict=True)}
        ends = []
        for made in (full, cached):
            parts = dict(zip(kinds, made.double().chunk(len(kinds)), strict=True))
            clean = {kind: noisy[kind] - sigma * parts[kind] for kind in parts}
            is_guided = 1 in clean and step < self.alone_from
            ends.append(clean[1] + self.cfg * (clean[0] - clean[1]) if is_guided else clean[0])
        rows = [float((a - b).norm() / a.norm()) for a, b in zip(*ends, strict=True)]
        bases = [base for _, _, base in guesses]
        base = None if None in bases else min(bases)
        self.errors.setdefault(step, []).append((max(rows), guesses[0][1], base))


def with_plain_cache(model: Any, plain: PlainCache) -> Any:
    """A clone of `model` for one single run."""
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        plain.inputs = x
        return plain.forward(executor, x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "plain cache", wrapper)
    return clone

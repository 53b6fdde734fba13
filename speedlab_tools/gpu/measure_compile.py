"""What compiling costs and what it keeps: cold, found again on disk, warm, and graphs over LoRAs and sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from speedlab.patching.compiled import compile_counts, counts_between
from speedlab.plans.techniques import Parts

from .. import synthetic
from .bench import Bench
from .measure_images import Lane, take_turns, timed
from .models import release
from .plan import STOCK, Arm, Block, Scene
from .run import ready, shoot

_LORA_RANK = 16
# Strengths of two LoRAs, stage by stage.
_LORA_STAGES = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 0.0))
# Sizes as shares of the model's own sides: square, tall, wide, smaller, and the first again.
_SIZES = ((1.0, 1.0), (0.875, 1.125), (1.125, 0.875), (0.75, 0.75), (1.0, 1.0))


def cold(bench: Bench, block: Block) -> None:
    """The first picture with empty caches, the first one of a process that finds them full, then rounds with stock."""
    for arm in bench.pending(block):
        bench.check_time()
        with _forgetting(), bench.into_row(block, arm), _fresh_folder():
            scene = bench.scene(block)
            one = bench.ready(block, arm)
            _forget()
            before = compile_counts()
            first = shoot(one, scene)
            counts = counts_between(before, compile_counts())
            _forget()
            again = shoot(bench.ready(block, arm), scene)
            lanes = [Lane(Arm(STOCK)), Lane(arm)]
            take_turns(bench, block, lanes)
            if not lanes[1].runs:
                continue
            fields = {**timed(lanes[1], scene.batch), "first_s": round(first.total_s, 3), **_counted(counts)}
            if lanes[0].runs:
                stock, mine = lanes[0].median("total_s"), lanes[1].median("total_s")
                fields["ratio"] = round(stock / mine, 4)
            fields["note"] = f"{again.total_s:.1f} s where compiled code was found on disk. {fields['note']}".strip()
            bench.write(block, arm, **fields)


def lora_tour(bench: Bench, block: Block) -> None:
    """One compiled model under two LoRAs at several strengths: graphs and first picture of each stage."""
    spec = bench.models.spec(block.model, block.dtype)

    def stages(parts: Parts) -> Iterator[tuple[str, Parts, Scene]]:
        loras = [synthetic.lora_state_dict(spec, _LORA_RANK, seed, device=bench.device) for seed in (1, 2)]
        for strengths in _LORA_STAGES:
            changed = parts
            for weights, strength in zip(loras, strengths, strict=True):
                changed = _with_lora(changed, weights, strength)
            yield "+".join(f"{s:g}" for s in strengths), changed, bench.scene(block)

    _tour(bench, block, stages)


def size_tour(bench: Bench, block: Block) -> None:
    """One compiled model at several sizes: graphs and first picture of each."""

    def stages(parts: Parts) -> Iterator[tuple[str, Parts, Scene]]:
        scene = bench.scene(block)
        for wide, high in _SIZES:
            # Whole steps of 64 pixels, so that every level of the network has even sides.
            width, height = (max(64, round(side * share / 64) * 64) for side, share in
                             ((scene.width, wide), (scene.height, high)))  # fmt: skip
            yield f"{width}x{height}", parts, replace(scene, width=width, height=height)

    _tour(bench, block, stages)


def _tour(bench: Bench, block: Block, stages: Callable[[Parts], Iterable[tuple[str, Parts, Scene]]]) -> None:
    for arm in bench.pending(block):
        with _forgetting(), bench.into_row(block, arm), _fresh_folder():
            _forget()
            seen: list[dict[str, Any]] = []
            start = compile_counts()
            for name, parts, scene in stages(bench.models.parts(block.model, block.dtype)):
                bench.check_time()
                before = compile_counts()
                one = ready(arm, parts, bench.nodes)
                first = shoot(one, scene)
                counts = counts_between(before, compile_counts())
                warm = shoot(one, scene)
                seen.append({"stage": name, "first_s": round(first.total_s, 3), "warm_s": round(warm.total_s, 3),
                             "finite": first.finite and warm.finite, **counts})  # fmt: skip
            total = counts_between(start, compile_counts())
            note = "; ".join(f"{s['stage']}: {s['graphs']} graphs, {s['first_s']:g} s, {s['warm_s']:g} s" for s in seen)
            bad = not all(stage["finite"] for stage in seen)
            bench.write(
                block, arm, first_s=seen[0]["first_s"], n=len(seen), note=note, stages=seen, **_counted(total),
                **({"status": "error", "error": "NaN or Inf in latents or pictures"} if bad else {}),
            )  # fmt: skip


def _with_lora(parts: Parts, weights: dict[str, Any], strength: float) -> Parts:
    import comfy.sd

    if not strength:
        return parts
    model, clip = comfy.sd.load_lora_for_models(parts.model, parts.clip, dict(weights), strength, strength)
    return replace(parts, model=model, clip=clip)


def _counted(counts: dict[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in ("graphs", "graph_breaks", "recompiles")}


@contextmanager
def _forgetting() -> Iterator[None]:
    """Leave neither compiled code nor weights behind, whatever happens."""
    try:
        yield
    finally:
        _forget()
        release()


def _forget() -> None:
    """Drop what this process has compiled; what lies on disk stays."""
    import torch._dynamo
    import torch._inductor.utils

    torch._dynamo.reset()
    # Loaded programs, which inductor finds again without looking at its folder. Older PyTorch has no such function.
    getattr(torch._inductor.utils, "clear_caches", lambda: None)()


@contextmanager
def _fresh_folder() -> Iterator[None]:
    """An empty place for compiled code."""
    import folder_paths

    before = folder_paths.get_user_directory()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder_paths.set_user_directory(str(Path(folder)))
        try:
            yield
        finally:
            folder_paths.set_user_directory(before)

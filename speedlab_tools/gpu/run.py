"""One picture from text, timed phase by phase; through core's nodes alone for stock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from speedlab.common.core import core_nodes
from speedlab.measure.clock import synchronize
from speedlab.measure.peaks import MemoryPeak, measure_peak
from speedlab.memory.streaming import NetworkStream
from speedlab.models import text as conditioning
from speedlab.plans.plan_text import parse_stack
from speedlab.plans.settings import CellSettings
from speedlab.plans.techniques import DECODERS, NodeTable, Parts, attach, check_techniques, options_of
from speedlab.vae import decode as decoding
from speedlab.vae import taesd

from .plan import STOCK, Arm, Scene


@dataclass(frozen=True)
class Ready:
    """An arm with its techniques attached. `decoder` is core's own where it is None."""

    arm: Arm
    parts: Parts
    settings: CellSettings
    decoder: dict[str, Any] | None


@dataclass(frozen=True)
class Shot:
    """Seconds of each phase of a picture; `total_s` from text to pixels in the host's memory, without a file."""

    encode_s: float
    sampling_s: float
    decode_s: float
    total_s: float
    peak: MemoryPeak
    latent: Any
    finite: bool
    note: str = ""


def ready(arm: Arm, parts: Parts, nodes: NodeTable) -> Ready:
    """Attach the arm's techniques. Raises SpeedLabError for one that cannot run here."""
    settings = CellSettings().with_stack(parse_stack(arm.stack))
    check_techniques(settings, nodes)
    is_tiny = settings.decoder.name == "tiny"
    made = parts
    for technique in settings.techniques:
        # A VAE that is not used has no place in a memory plan.
        alone = technique.name == "memory_plan" and is_tiny
        made = attach(replace(made, vae=None) if alone else made, technique, nodes)
        made = replace(made, vae=parts.vae) if alone else made
    decoder = None if arm.stack == STOCK else options_of(settings.decoder, DECODERS[settings.decoder.name], nodes)
    return Ready(arm, made, settings, decoder)


def shoot(one: Ready, scene: Scene) -> Shot:
    """Make one picture."""
    import torch

    nodes, parts = core_nodes(), one.parts
    device = parts.model.load_device
    with _prefetching(one.arm.prefetch), measure_peak(device) as memory:
        synchronize(device)
        began = time.perf_counter()
        positive, negative = (conditioning.encode(parts.clip, text) for text in (scene.prompt, scene.negative))
        synchronize(device)
        encoded = time.perf_counter()
        latent = nodes.EmptyLatentImage().generate(scene.width, scene.height, scene.batch)[0]
        sampled = sample(parts.model, scene, positive, negative, latent)
        synchronize(device)
        done = time.perf_counter()
        pictures, note = _decoded(one, sampled)
        synchronize(device)
        end = time.perf_counter()
    kept = sampled["samples"].detach().float().cpu()
    finite = bool(torch.isfinite(kept).all()) and bool(torch.isfinite(pictures).all())
    return Shot(encoded - began, done - encoded, end - done, end - began, memory.peak, kept, finite, note)


def sample(model: Any, scene: Scene, positive: Any, negative: Any, latent: dict[str, Any]) -> dict[str, Any]:
    """Core's KSampler on a scene."""
    result = core_nodes().common_ksampler(
        model, scene.seed, scene.steps, scene.cfg, scene.sampler, scene.scheduler, positive, negative, latent
    )
    return dict(result[0])


def _decoded(one: Ready, latent: dict[str, Any]) -> tuple[Any, str]:
    """Pictures in the host's memory, and what a decoder of this pack had to do otherwise than asked."""
    if one.decoder is None:
        return core_nodes().VAEDecode().decode(one.parts.vae, latent)[0].cpu(), ""
    if one.settings.decoder.name == "tiny":
        config = taesd.TinyDecodeConfig(**one.decoder)
        result = taesd.decode_tiny(latent, config, one.parts.model)
    else:
        result = decoding.decode(one.parts.vae, latent, decoding.DecodeConfig(**one.decoder))
    return result.images.cpu(), str(result.info.get("warning", ""))


@contextmanager
def _prefetching(wanted: bool) -> Iterator[None]:
    before = NetworkStream.prefetch
    NetworkStream.prefetch = wanted
    try:
        yield
    finally:
        NetworkStream.prefetch = before

"""One image from text, timed phase by phase; through core's nodes alone for stock.

What every measurement works with: models, rows, the clock of the call, and errors that become rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedlab.common.core import compute_device, core_nodes, release_unused_memory
from speedlab.common.errors import ResultsError, SpeedLabError, UnavailableError, first_line
from speedlab.measure.clock import synchronize
from speedlab.measure.peaks import MemoryPeak, measure_peak
from speedlab.memory.streaming import NetworkStream
from speedlab.models import text as conditioning
from speedlab.plans.axes import CellSettings
from speedlab.plans.plan_text import parse_stack
from speedlab.plans.techniques import DECODERS, NodeTable, Parts, attach, check_techniques, options_of
from speedlab.sampling.profiled import failure_message, failure_status
from speedlab.techniques.compile.backends.dynamo import graphs_refused
from speedlab.vae import decode as decoding
from speedlab.vae import taesd

from .models import Models, release
from .plan import STOCK, Block, Variant, Workload, workload_of
from .report import Journal


@dataclass(frozen=True)
class Ready:
    """A variant with its techniques attached. `decoder` is core's own where it is None."""

    variant: Variant
    parts: Parts
    settings: CellSettings
    decoder: dict[str, Any] | None


@dataclass(frozen=True)
class ImageRun:
    """Seconds of each phase of an image; `total_s` from text to pixels in the host's memory, without a file."""

    encode_s: float
    sampling_s: float
    decode_s: float
    total_s: float
    peak: MemoryPeak
    latent: Any
    finite: bool
    note: str = ""


def ready(variant: Variant, parts: Parts, nodes: NodeTable) -> Ready:
    """Attach the variant's techniques. Raises SpeedLabError for one that cannot run here."""
    settings = CellSettings().with_stack(parse_stack(variant.stack))
    check_techniques(settings, nodes)
    is_tiny = settings.decoder.name == "tiny"
    made = parts
    for technique in settings.techniques:
        # A VAE that is not used has no place in a memory plan.
        alone = technique.name == "memory_plan" and is_tiny
        made = attach(replace(made, vae=None) if alone else made, technique, nodes)
        made = replace(made, vae=parts.vae) if alone else made
    decoder = None if variant.stack == STOCK else options_of(settings.decoder, DECODERS[settings.decoder.name], nodes)
    return Ready(variant, made, settings, decoder)


def run_image(one: Ready, workload: Workload) -> ImageRun:
    """Make one image."""
    import torch

    nodes, parts = core_nodes(), one.parts
    device = parts.model.load_device
    with _prefetching(one.variant.prefetch), measure_peak(device) as memory:
        synchronize(device)
        began = time.perf_counter()
        positive, negative = (conditioning.encode(parts.clip, text) for text in (workload.prompt, workload.negative))
        synchronize(device)
        encoded = time.perf_counter()
        latent = nodes.EmptyLatentImage().generate(workload.width, workload.height, workload.batch)[0]
        sampled = sample(parts.model, workload, positive, negative, latent)
        synchronize(device)
        done = time.perf_counter()
        pictures, note = _decoded(one, sampled)
        synchronize(device)
        end = time.perf_counter()
    kept = sampled["samples"].detach().float().cpu()
    finite = bool(torch.isfinite(kept).all()) and bool(torch.isfinite(pictures).all())
    return ImageRun(encoded - began, done - encoded, end - done, end - began, memory.peak, kept, finite, note)


def sample(model: Any, workload: Workload, positive: Any, negative: Any, latent: dict[str, Any]) -> dict[str, Any]:
    """Core's KSampler on a workload."""
    result = core_nodes().common_ksampler(
        model,
        workload.seed,
        workload.steps,
        workload.cfg,
        workload.sampler,
        workload.scheduler,
        positive,
        negative,
        latent,
    )
    return dict(result[0])


def _decoded(one: Ready, latent: dict[str, Any]) -> tuple[Any, str]:
    """Images in the host's memory, and what a decoder of this pack had to do otherwise than asked."""
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


log = logging.getLogger(__name__)

# A context that was lost answers every call with an error: only a new process helps.
_LOST = ("cuda error", "cublas_status", "cudnn_status_execution_failed", "an illegal memory access", "driver shutting")


class OutOfTimeError(BaseException):
    """The call's time is over; what is left belongs to the next call. No failure of anything that it passes through."""


class OtherAllocatorError(SpeedLabError):
    """All that is left needs another memory allocator, and so another process."""


class LostDeviceError(SpeedLabError):
    """The device no longer answers in this process."""


@dataclass(frozen=True)
class Settings:
    """How a call measures. `minutes` is its time; `repeats` are runs of each variant that count; `native`: this
    process is for what needs PyTorch's own memory allocator, and for nothing else."""

    out: Path
    minutes: float = 8.0
    repeats: int = 5
    small: bool = False
    native: bool = False


class Bench:
    """The tools of one call."""

    def __init__(self, pack: Any, journal: Journal, settings: Settings, began: float) -> None:
        self.nodes: Mapping[str, Any] = {**core_nodes().NODE_CLASS_MAPPINGS, **pack.NODE_CLASS_MAPPINGS}
        self.journal, self.settings = journal, settings
        self.device = compute_device()
        self.models = Models(self.device, settings.small)
        self._open: set[str] = set()
        self._deadline = began + 60.0 * settings.minutes

    def pending(self, block: Block) -> list[Variant]:
        """Variants that have no row yet."""
        return [variant for variant in block.variants if block.row(variant) not in self.journal.rows]

    def has_allocator_for(self, block: Block) -> bool:
        """Whether this process's memory allocator is the block's: the one that ComfyUI chose, or PyTorch's own."""
        if self.device.type != "cuda":
            return True
        return not graphs_refused(self.device) if block.own_allocator else not self.settings.native

    def workload(self, block: Block) -> Workload:
        """What a block makes."""
        return workload_of(block.model, self.settings.small)

    def time_left(self) -> float:
        """Seconds that this call still has."""
        return self._deadline - time.monotonic()

    def check_time(self) -> None:
        """Raises OutOfTimeError once the call's time is over."""
        if self.time_left() <= 0:
            raise OutOfTimeError("the time of this call is over")

    def ready(self, block: Block, variant: Variant) -> Ready:
        """A variant on the block's model."""
        return ready(variant, self.models.parts(block.model, block.dtype), self.nodes)

    def facts(self, block: Block, variant: Variant) -> dict[str, Any]:
        """What a row says of the variant, whatever becomes of it."""
        workload = self.workload(block)
        return {
            "shows": block.shows, "model": block.model, "dtype": block.dtype, "plan": variant.stack,
            "width": workload.width, "height": workload.height, "batch": workload.batch, "steps": workload.steps,
        }  # fmt: skip

    def write(self, block: Block, variant: Variant, **fields: Any) -> None:
        """A variant's row."""
        self.journal.write(block.row(variant), {**self.facts(block, variant), **fields})
        log.info("%s done, %.0f s left", block.row(variant), self.time_left())

    @contextmanager
    def into_row(self, block: Block, variant: Variant) -> Iterator[None]:
        """What goes wrong inside is the variant's row. Raises what ends the call: its time, a cancel, a lost device."""
        import comfy.model_management as mm

        failure: dict[str, Any] | None = None
        lost, row = "", block.row(variant)
        outermost = row not in self._open
        if outermost:
            self._open.add(row)
            self.journal.begin(row)
        try:
            yield
        except (OutOfTimeError, LostDeviceError, ResultsError, mm.InterruptProcessingException):
            raise
        except Exception as error:
            # Techniques, compilers and drivers raise types of their own; each of them belongs into its row.
            status = "unavailable" if isinstance(error, UnavailableError) else failure_status(error)
            failure = {"status": status, "error": failure_message(error)}
            log.warning("%s: %s: %s", row, status, first_line(error))
            lost = first_line(error) if status != "oom" and is_lost(error) else ""
        finally:
            if outermost:
                self._open.discard(row)
                self.journal.withdraw(row)
        if failure is not None:
            # Not inside the handler: there the error's frames still hold what did not fit.
            if self.journal.rows.get(row, {}).get("status") != "ok":
                self.write(block, variant, **failure)
            if lost:
                raise LostDeviceError(lost)
            release_unused_memory()
            if failure["status"] == "oom":
                release()


def is_lost(error: BaseException) -> bool:
    """Whether an error means that the device's context is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)

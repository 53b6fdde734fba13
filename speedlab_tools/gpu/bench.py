"""The tools of one call: a variant as a cell of Benchmark, one image of it, rows, the clock, errors that become rows.

Images are made and measured by what measures Benchmark's cells, so that a number here is what it is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedlab.common.core import compute_device, core_nodes
from speedlab.common.errors import SpeedLabError, UnavailableError, first_line
from speedlab.measure.context import NodeContext
from speedlab.measure.environment import dynamic_vram
from speedlab.measure.store import new_run_id
from speedlab.memory.streaming import NetworkStream
from speedlab.plans.axes import Cell, CellSettings
from speedlab.plans.cell import OneRun, Prepared, Prompt, Reloader, prepare, run_once
from speedlab.plans.cell_record import CellRuns
from speedlab.plans.in_turn import own_failure
from speedlab.plans.techniques import Parts, check_techniques
from speedlab.sampling.profiled import failure_message, failure_status
from speedlab.techniques.compile.backends.dynamo import graphs_refused

from ..scenarios.scenario import LIGHTHOUSE
from .models import Models
from .plan import Block, Variant, workload_of
from .report import Journal

PROMPT = Prompt(LIGHTHOUSE.text, LIGHTHOUSE.negative or "", LIGHTHOUSE.seed)


@dataclass(kw_only=True, eq=False)
class VariantRuns(CellRuns):
    """A variant of a block and what was measured of it."""

    variant: Variant
    prepared: Prepared | None = None


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
        self.models = Models(self.device, settings.small, from_files=bool(dynamic_vram()))
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

    def workload(self, block: Block, variant: Variant) -> CellSettings:
        """What a variant makes."""
        return workload_of(block.model, variant, self.settings.small)

    def time_left(self) -> float:
        """Seconds that this call still has."""
        return self._deadline - time.monotonic()

    def check_time(self) -> None:
        """Raises OutOfTimeError once the call's time is over."""
        if self.time_left() <= 0:
            raise OutOfTimeError("the time of this call is over")

    def series(self, block: Block, variant: Variant) -> VariantRuns:
        """A variant of which nothing was measured yet."""
        return VariantRuns(Cell(0, 0, (), self.workload(block, variant)), new_run_id(), variant=variant)

    def parts(self, block: Block, variant: Variant) -> Parts:
        """The block's model, and the refiner beside it where the variant hands over."""
        names = [(block.model, block.dtype)] + ([] if variant.handoff is None else [("refiner", block.dtype)])
        base, *refiner = self.models.together(names)
        return replace(base, refiner=refiner[0].model, refiner_clip=refiner[0].clip) if refiner else base

    def ready(self, block: Block, variant: Variant, parts: Parts | None = None) -> Prepared:
        """A variant's techniques on the block's model, or on `parts`. Raises SpeedLabError for what cannot run here."""
        parts, workload = parts or self.parts(block, variant), self.workload(block, variant)
        check_techniques(workload, self.nodes)
        made = prepare(parts, workload, self.nodes, Reloader(parts))
        return replace(made, decoder=None) if variant.is_stock else made

    def image(self, prepared: Prepared, prefetch: bool = True) -> OneRun:
        """Make one image, which is not saved. Raises SpeedLabError for one that is none."""
        import torch

        before, NetworkStream.prefetch = NetworkStream.prefetch, prefetch
        try:
            run = run_once(prepared, PROMPT, NodeContext())
        finally:
            NetworkStream.prefetch = before
        if not all(bool(torch.isfinite(made).all()) for made in (run.latent, run.images)):
            raise SpeedLabError("NaN or Inf in latents or images: the times mean nothing")
        return replace(run, images=None)

    def facts(self, block: Block, variant: Variant) -> dict[str, Any]:
        """What a row says of the variant, whatever becomes of it."""
        workload = self.workload(block, variant)
        return {
            "shows": block.shows, "model": block.model, "dtype": block.dtype, "plan": variant.plan,
            "asked": variant.plan, "width": workload.width, "height": workload.height, "batch": workload.batch,
            "steps": workload.steps,
        }  # fmt: skip

    def write(self, block: Block, variant: Variant, **fields: Any) -> None:
        """A variant's row."""
        self.journal.write(block.row(variant), {**self.facts(block, variant), **fields})
        log.info("%s done, %.0f s left", block.row(variant), self.time_left())

    @contextmanager
    def into_row(self, block: Block, variant: Variant, series: VariantRuns | None = None) -> Iterator[None]:
        """What goes wrong inside is the variant's row. Raises what ends the call: its time, a cancel, a lost device."""
        failed: dict[str, str] = {}
        lost, row = "", block.row(variant)

        def note(error: Exception) -> str | None:
            nonlocal lost
            if isinstance(error, LostDeviceError):
                raise error
            status = "unavailable" if isinstance(error, UnavailableError) else failure_status(error)
            failed.update(status=status, error=failure_message(error))
            if series is not None:
                series.status, series.error = status, failed["error"]
            log.warning("%s: %s: %s", row, status, first_line(error))
            lost = first_line(error) if status != "oom" and is_lost(error) else ""
            return None if lost else status

        outermost = row not in self._open
        if outermost:
            self._open.add(row)
            self.journal.begin(row)
        try:
            with own_failure(note):
                yield
        finally:
            if outermost:
                self._open.discard(row)
                self.journal.withdraw(row)
        if failed and self.journal.rows.get(row, {}).get("status") != "ok":
            self.write(block, variant, **failed)
        if lost:
            raise LostDeviceError(lost)


def is_lost(error: BaseException) -> bool:
    """Whether an error means that the device's context is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)

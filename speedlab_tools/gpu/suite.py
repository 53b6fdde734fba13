"""Runs the blocks in order until all is measured or the call's time is over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from speedlab.common.errors import ResultsError, first_line
from speedlab.sampling.profiled import failure_message, failure_status
from speedlab.techniques.compile.backends.dynamo import graphs_refused

from . import measure_device, measure_models
from .bench import Bench, LostDeviceError, OtherAllocatorError, OutOfTimeError, is_lost
from .plan import Block

log = logging.getLogger(__name__)

# What a process takes to begin, in seconds.
_START_S = 30.0
Runner = Callable[[Bench, Block], None]
RUNNERS: dict[str, Runner] = {
    "peak": measure_device.peak,
    "work": measure_device.work,
    "images": measure_models.run,
    "kernels": measure_device.kernels,
    "overhead": measure_device.overhead,
    "compile": measure_models.cold,
    "tour_lora": measure_models.lora_tour,
    "tour_size": measure_models.size_tour,
    "batches": measure_device.batches,
}


def run(bench: Bench, blocks: Sequence[Block], said: Callable[[str], None]) -> bool:
    """Measure what has no row yet. Whether nothing is left.

    Raises LostDeviceError and OtherAllocatorError where only a new process helps.
    """
    bench.journal.give_up()
    pending = [block for block in blocks if bench.pending(block)]
    left = [block for block in pending if bench.has_allocator_for(block)]
    began_one = False
    for number, block in enumerate(left):
        # A block that takes longer than a whole call must still start in some call: as the first one.
        if bench.time_left() <= 0 or (began_one and bench.time_left() < block.needs_s and not bench.settings.small):
            log.info("%s is left to the next call: %.0f s left", block.id, bench.time_left())
            continue
        said(f"[{number + 1}/{len(left)}] {block.id}: {block.shows} ({bench.time_left():.0f} s left)")
        began_one, before, had_time = True, len(bench.journal.rows), bench.time_left() >= block.needs_s
        try:
            RUNNERS[block.runner](bench, block)
        except OutOfTimeError as over:
            log.info("%s: %s", block.id, over)
            if had_time and len(bench.journal.rows) == before and bench.journal.overran(block.id):
                _write_overrun(bench, block)
            break
        except (LostDeviceError, ResultsError):
            raise
        except Exception as error:
            _give_up(bench, block, error)
        finally:
            if len(bench.journal.rows) > before:
                bench.journal.progressed(block.id)
    other = [block for block in pending if block not in left]
    if bench.settings.native:
        _write_refused(bench, [block for block in other if block.own_allocator])
    elif other and bench.time_left() > other[0].needs_s + _START_S:
        raise OtherAllocatorError("what is left records CUDA graphs")
    return not any(bench.pending(block) for block in blocks)


def _write_refused(bench: Bench, blocks: Iterable[Block]) -> None:
    """The user's own settings rule PyTorch's allocator out even in the process that is meant for it."""
    for block in blocks:
        for variant in bench.pending(block):
            bench.write(block, variant, status="unavailable", error=graphs_refused(bench.device))


def _write_overrun(bench: Bench, block: Block) -> None:
    """A block that comes to no row in the time it should take, twice, would keep those after it from being measured."""
    for variant in bench.pending(block):
        bench.write(
            block, variant, status="error", error="it came to no result in its time, twice; --minutes gives more"
        )


def _give_up(bench: Bench, block: Block, error: Exception) -> None:
    """What failed outside of any variant takes its block with it, never the suite."""
    log.error("%s: %s", block.id, first_line(error), exc_info=True)
    status = failure_status(error)
    lost = status != "oom" and is_lost(error)
    # With a lost device the first variant's row is written all the same: the next process must not begin here again.
    for variant in bench.pending(block)[: 1 if lost else None]:
        bench.write(block, variant, status=status, error=failure_message(error))
    if lost:
        raise LostDeviceError(first_line(error)) from error

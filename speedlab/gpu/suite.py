"""Runs the blocks in order until all is measured or the call's time is over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..errors import ResultsError, first_line
from ..profiling.runner import failure_message, failure_status
from . import measure_compile, measure_device, measure_more, measure_pictures
from .bench import Bench, LostDeviceError, OutOfTimeError, is_lost
from .plan import Block

log = logging.getLogger(__name__)

Runner = Callable[[Bench, Block], None]
RUNNERS: dict[str, Runner] = {
    "peak": measure_device.peak,
    "work": measure_device.work,
    "pictures": measure_pictures.run,
    "kernels": measure_device.kernels,
    "overhead": measure_device.overhead,
    "compile": measure_compile.cold,
    "tour_lora": measure_compile.lora_tour,
    "tour_size": measure_compile.size_tour,
    "batches": measure_more.batches,
    "ensemble": measure_more.ensemble,
}


def run(bench: Bench, blocks: Sequence[Block], said: Callable[[str], None]) -> bool:
    """Measure what has no row yet. Whether nothing is left. Raises LostDeviceError where only a new process helps."""
    bench.journal.give_up()
    left = [block for block in blocks if bench.pending(block)]
    began_one = False
    for number, block in enumerate(left):
        # A block that takes longer than a whole call must still start in some call: as the first one.
        if bench.time_left() <= 0 or (began_one and bench.time_left() < block.needs_s and not bench.settings.small):
            log.info("%s is left to the next call: %.0f s left", block.id, bench.time_left())
            continue
        said(f"[{number + 1}/{len(left)}] {block.id}: {block.shows} ({bench.time_left():.0f} s left)")
        began_one = True
        try:
            RUNNERS[block.runner](bench, block)
        except OutOfTimeError as over:
            log.info("%s: %s", block.id, over)
            break
        except (LostDeviceError, ResultsError):
            raise
        except Exception as error:
            _give_up(bench, block, error)
    return not any(bench.pending(block) for block in blocks)


def _give_up(bench: Bench, block: Block, error: Exception) -> None:
    """What failed outside of any arm takes its block with it, never the suite."""
    if is_lost(error):
        raise LostDeviceError(first_line(error)) from error
    log.error("%s: %s", block.id, first_line(error), exc_info=True)
    for arm in bench.pending(block):
        bench.write(block, arm, status=failure_status(error), error=failure_message(error))

"""What every measurement works with: models, rows, the clock of the call, and errors that become rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedlab.common.core import compute_device, core_nodes, release_unused_memory
from speedlab.common.errors import ResultsError, SpeedLabError, UnavailableError, first_line
from speedlab.sampling.profiled import failure_message, failure_status
from speedlab.techniques.compile.backends.dynamo import graphs_refused

from .journal import Journal
from .models import Models, release
from .plan import Arm, Block, Scene, scene_of
from .run import Ready, ready

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
    """How a call measures. `minutes` is its time; `repeats` are runs of each arm that count; `native`: this process is
    for what needs PyTorch's own memory allocator, and for nothing else."""

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

    def pending(self, block: Block) -> list[Arm]:
        """Arms that have no row yet."""
        return [arm for arm in block.arms if block.row(arm) not in self.journal.rows]

    def has_allocator_for(self, block: Block) -> bool:
        """Whether this process's memory allocator is the block's: the one that ComfyUI chose, or PyTorch's own."""
        if self.device.type != "cuda":
            return True
        return not graphs_refused(self.device) if block.own_allocator else not self.settings.native

    def scene(self, block: Block) -> Scene:
        """What a block makes."""
        return scene_of(block.model, self.settings.small)

    def time_left(self) -> float:
        """Seconds that this call still has."""
        return self._deadline - time.monotonic()

    def check_time(self) -> None:
        """Raises OutOfTimeError once the call's time is over."""
        if self.time_left() <= 0:
            raise OutOfTimeError("the time of this call is over")

    def ready(self, block: Block, arm: Arm) -> Ready:
        """An arm on the block's model."""
        return ready(arm, self.models.parts(block.model, block.dtype), self.nodes)

    def facts(self, block: Block, arm: Arm) -> dict[str, Any]:
        """What a row says of the arm, whatever becomes of it."""
        scene = self.scene(block)
        return {
            "shows": block.shows, "model": block.model, "dtype": block.dtype, "plan": arm.stack,
            "width": scene.width, "height": scene.height, "batch": scene.batch, "steps": scene.steps,
        }  # fmt: skip

    def write(self, block: Block, arm: Arm, **fields: Any) -> None:
        """An arm's row."""
        self.journal.write(block.row(arm), {**self.facts(block, arm), **fields})
        log.info("%s done, %.0f s left", block.row(arm), self.time_left())

    @contextmanager
    def into_row(self, block: Block, arm: Arm) -> Iterator[None]:
        """What goes wrong inside is the arm's row. Raises what ends the call: its time, a cancel, a lost device."""
        import comfy.model_management as mm

        failure: dict[str, Any] | None = None
        lost, row = "", block.row(arm)
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
                self.write(block, arm, **failure)
            if lost:
                raise LostDeviceError(lost)
            release_unused_memory()
            if failure["status"] == "oom":
                release()


def is_lost(error: BaseException) -> bool:
    """Whether an error means that the device's context is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)

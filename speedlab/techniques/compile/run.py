"""One run of a compiled model: calls of compiled code, what failed, and what goes into the record.

Where compiled code is kept for the next start: a folder of this pack among ComfyUI's user files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...common.core import progress_bar
from ...common.cpu import instructions_word
from ...common.errors import SpeedLabError, first_line
from ...patching.notes import report_note, report_ran
from ...patching.wrappers import SharedState
from .backends import CompileOptions

log = logging.getLogger(__name__)


class CompileError(SpeedLabError):
    """Something could not be compiled; the message names backend, part, cause and what to try."""


@dataclass
class Run(SharedState):
    """State of one run. `eager` is why compiled code is not used, "" where it is; `unquantised` whether each layer
    that was to run in 8 bits runs in floating point. Of the `graphs` compiled, `from_disk` had code on disk."""

    backend: ModuleType
    options: CompileOptions
    falls_back: bool
    eager: str = ""
    unquantised: bool = False
    notes: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    from_disk: int = 0
    parts: int = 0
    compiled: int = 0
    _bar: Any = None

    def note(self, text: str, level: int = logging.WARNING) -> None:
        """A sentence for the log and the record, once a run."""
        self.notes.setdefault(text, level)

    def fail(self, part: str, error: BaseException, remedy: str = "", doing: str = "compile") -> None:
        """Go on without compiling where the user chose so; CompileError otherwise."""
        name, remedy = self.backend.NAME, remedy or self.backend.REMEDY
        what = f"{name} could not {doing} {part}: {first_line(error)}"
        if not self.falls_back:
            raise CompileError(
                f"Compile: {what}. {remedy} Setting on_failure to eager lets the run go on uncompiled."
            ) from error
        self.eager = what
        self.note(f"{what}. The run went on uncompiled, as on_failure asks.")

    def compiling(self, what: str) -> None:
        """Something was compiled just now: show how far it is, and let a cancel act."""
        import comfy.model_management as mm

        self.compiled += 1
        log.info("SpeedLab: %s compiled %s (%d of about %d)", self.backend.NAME, what, self.compiled, self.parts)
        if self._bar is None:
            self._bar = progress_bar(max(self.parts, 1))
        self._bar.update_absolute(min(self.compiled, self.parts), max(self.parts, 1))
        mm.throw_exception_if_processing_interrupted()

    def tell(self, transformer_options: Mapping[str, Any]) -> None:
        """Hand what was noted to the log and the record, and whether the run counts as compiled at all."""
        for text, level in self.notes.items():
            log.log(level, "SpeedLab: Compile: %s", text)
            report_note(transformer_options, f"Compile: {text}")
        self.notes.clear()
        if self.eager:
            report_ran(transformer_options, "compile", None)


def raise_what_passes(error: BaseException) -> None:
    """Raise the cancel or lack of memory that an error is, or that a library has wrapped into it."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, passing()):
            raise inner from None
        inner = inner.__cause__ or inner.__context__


def passing() -> tuple[type[BaseException], ...]:
    """What is no failure to compile: a cancel, and a lack of memory."""
    import comfy.model_management as mm

    lack = () if mm.OOM_EXCEPTION is Exception else (mm.OOM_EXCEPTION,)
    return (mm.InterruptProcessingException, MemoryError, *lack)


def cache_folder(backend: str, device: torch.device) -> Path | None:
    """A folder for `backend`, this PyTorch and this kind of device, on a CPU of its instructions; None, with a warning,
    where none can be made.

    Type, shapes and code are in the names that the backends give their files in it.
    """
    import folder_paths

    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{backend}-torch{torch.__version__}-{_device_name(device)}")
    folder = Path(folder_paths.get_user_directory()) / "speedlab" / "compiled" / name.lower()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("SpeedLab: compiled code is not kept, for %s cannot be made: %s", folder, first_line(error))
        return None
    return folder


def _device_name(device: Any) -> str:
    if device.type == "cpu":
        return f"cpu-{instructions_word()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)
